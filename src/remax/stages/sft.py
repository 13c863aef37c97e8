"""Supervised fine-tuning: the first stage, over TRL's SFTTrainer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
import trl

from remax.cards import public_name
from remax.config import SFTConfig
from remax.data import check_columns
from remax.data.records import check_format
from remax.errors import UserError
from remax.processes import ALONE, Processes
from remax.rewards import reward_input_ids
from remax.stages.batches import STUB, MicroBatches, TogetherMixin
from remax.stages.common import (
    all_stop_ids,
    ids_of_prompt,
    policy_to_train,
    position_limit,
    quiet_training,
    say,
    shared_length,
    tokenizer_for,
    trainer_arguments,
)
from remax.stages.run import StageRun

ANSWER = "[remax:an-answer]"


def run_sft(
    config: SFTConfig,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    *,
    run_config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Fine-tunes a language model on examples and writes OUT/model, metrics.jsonl, config.yaml and eval.json.

    Args:
        config: all settings.
        model: a causal language model: hub name, folder or loaded model (which is trained in place).
        train_dataset: a datasets.Dataset with prompt and completion, or preferences with prompt and chosen (loss on
            the completion alone); or with text, messages or chosen (loss on everything). EOS is learned.
        eval_dataset: held-out examples, likewise.
        processing_class: the tokenizer, by default the one beside the model.
        run_config: what config.yaml records; by default config.

    Returns:
        loss: mean over the training steps, nats per token; with eval_dataset also eval/loss, over its tokens, and
        eval/perplexity.

    Raises:
        UserError: a setting, dataset or model cannot be used; nothing was written.
    """
    stage = StageRun(config, model, run_config, kind="sft")
    if stage.finished:
        return stage.finished_metrics()
    model, tokenizer, arguments, train_rows, eval_rows, stop_ids = stage.processes.together(
        lambda: _prepare(config, model, train_dataset, eval_dataset, processing_class)
    )
    batches = MicroBatches(len(train_rows), config.batch_size, config.micro_batch_size, config.seed, stage.processes)

    def make_trainer() -> Any:
        trainer = _Trainer(model, arguments, train_dataset=train_rows, processing_class=tokenizer)
        trainer.batches = batches
        return trainer

    with stage.running():
        trainer, model, loss = stage.train(make_trainer, model)
        metrics = {"loss": loss}
        lines = [
            f"<code>{public_name(stage.base_name)}</code> after supervised fine-tuning on {len(train_rows)} examples."
        ]
        if eval_rows is None:
            say("No --eval_dataset was given: nothing held-out was measured.")
        else:
            collate, batch_size = trainer.data_collator, arguments.eval_batch_size
            eval_loss = token_loss(model, eval_rows, collate, batch_size, stage.processes)
            quality = {"loss": eval_loss, "perplexity": math.exp(min(eval_loss, 700.0))}
            metrics |= {f"eval/{name}": value for name, value in quality.items()}
            stage.record_quality(quality)
            lines.append(f"Held-out: loss {eval_loss:.4f} nats per token, perplexity {quality['perplexity']:.2f}.")
            say(lines[-1])
        ids = all_stop_ids(model, tokenizer, stop_ids)
        stage.save(model, tokenizer, title="Fine-tuned model", lines=lines, eos_token_ids=ids)
    say(f"The model is in {stage.folder.model}.")
    stage.push()
    return metrics


def _prepare(
    config: SFTConfig, model: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any
) -> tuple[Any, Any, Any, Any, Any, list[int]]:
    """Returns model, tokenizer, TRL's arguments, both datasets as token ids, and the stop token that is learned."""
    arguments = trainer_arguments(trl.SFTConfig, config, packing=False, dataset_num_proc=None, loss_type="nll")
    train_dataset = as_examples(train_dataset, flag="--train_dataset")
    eval_dataset = None if eval_dataset is None else as_examples(eval_dataset, flag="--eval_dataset")
    tokenizer = tokenizer_for(model, processing_class)
    stop_ids = [] if _is_text(train_dataset) else [chat_stop_id(tokenizer)]

    transformers.set_seed(config.seed)
    model = policy_to_train(model, config)
    limit = position_limit(model, config)
    train_rows = tokenise(train_dataset, tokenizer, limit)
    _say_what_is_cut(train_rows, len(train_dataset), limit)
    if len(train_rows) == 0:
        raise UserError(
            f"--max_length is {config.max_length}: no example of --train_dataset is left; set a larger one."
        )
    eval_rows = None if eval_dataset is None else tokenise(eval_dataset, tokenizer, limit)
    return model, tokenizer, arguments, train_rows, eval_rows, stop_ids


def tokenise(dataset: Any, tokenizer: Any, max_length: int) -> Any:
    """Returns rows of input_ids and labels (-100 where nothing is trained), cut to max_length; prompts alone dropped.

    The ids are those that the reward model reads of a finished text: exactly one EOS, or what the chat template has.
    """

    def ids_of(row: Mapping[str, Any]) -> dict[str, list[int]]:
        prompt, completion = row.get("prompt"), row[dataset.column_names[-1]]
        ids = reward_input_ids(tokenizer, prompt or "", completion, True)
        # The end of the prompt may be written otherwise when it is continued (merged tokens, a prefilled answer).
        start = 0 if prompt is None else shared_length(ids_of_prompt(tokenizer, prompt), ids)
        labels = [-100] * start + ids[start:]
        return {"input_ids": ids[:max_length], "labels": labels[:max_length]}

    with quiet_training():
        # Not from the cache, which does not know when functions outside of this one have changed.
        rows = dataset.map(ids_of, remove_columns=dataset.column_names, load_from_cache_file=False)
        return rows.filter(lambda row: any(label != -100 for label in row["labels"]), load_from_cache_file=False)


def _say_what_is_cut(prepared: Any, number: int, max_length: int) -> None:
    if dropped := number - len(prepared):
        say(f"{dropped} of {number} examples were dropped: their prompts alone fill {max_length} tokens.")
    if cut := sum(len(ids) >= max_length for ids in prepared["input_ids"]):
        say(f"{cut} of {number} examples reach {max_length} tokens, where they are cut: such do not teach how to end.")


class _Trainer(TogetherMixin, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the plain loss of transformers where there is no accelerator.

    TRL's fused head saves memory that a CPU has, by recomputing what a CPU is slow at: a step of a small model takes
    1.7 times as long with it. The loss is the same: the mean over the tokens of the step, however they are divided.
    """

    def collate_counting(self, rows: list[Any], counts: list[bool]) -> Any:
        def stub(row: Any) -> dict[str, list[int]]:
            ids = row["input_ids"][:STUB]
            return {"input_ids": ids, "labels": [-100] * len(ids)}

        return self.data_collator([row if own else stub(row) for row, own in zip(rows, counts, strict=True)])

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer = trl.SFTTrainer if torch.accelerator.is_available() else transformers.Trainer
        return trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def as_examples(dataset: Any, *, flag: str) -> Any:
    """Returns the dataset with just the columns that SFTTrainer knows: prompt and completion, messages, or text.

    Raises:
        UserError: there is nothing to fine-tune on, or a value is empty or of the wrong type.
    """
    check_columns(dataset, [], flag=flag, purpose="fine-tuning")
    there = set(dataset.column_names)
    if "rejected" in there and not there & {"completion", "messages", "text"}:
        say(f"{flag} has pairs: what was chosen is learned, what was rejected is left out.")
    if "prompt" in there and ("completion" in there or "chosen" in there):
        if "completion" not in there:
            dataset = dataset.rename_column("chosen", "completion")
        dataset = dataset.select_columns(["prompt", "completion"])
    elif "messages" in there or "text" in there:
        dataset = dataset.select_columns(["messages" if "messages" in there else "text"])
    elif "chosen" in there:
        is_text = len(dataset) and isinstance(dataset[0]["chosen"], str)
        dataset = dataset.select_columns(["chosen"]).rename_column("chosen", "text" if is_text else "messages")
    else:
        raise UserError(
            f"{flag} has the columns {', '.join(sorted(there))}: there is nothing to fine-tune on; name columns "
            "prompt and completion, text, messages, or prompt and chosen."
        )
    if len(dataset) == 0:
        raise UserError(f"{flag} has no rows: there is nothing to fine-tune on; pass at least one.")
    dataset = dataset.with_format(None)
    formats = {name: check_format(list(dataset[name]), column=name, flag=flag) for name in dataset.column_names}
    wanted = {"messages": "conversational", "text": "standard", "prompt": formats.get("completion")}
    for name, kind in formats.items():
        if wanted.get(name, kind) != kind:
            raise UserError(
                f"{flag} has a column {name!r} in {kind} format: {wanted[name]} is needed there; make prompt and "
                "completion both texts or both lists of messages, text a text and messages a list."
            )
    return dataset


def _is_text(dataset: Any) -> bool:
    return isinstance(dataset[0][dataset.column_names[-1]], str)


def chat_stop_id(tokenizer: Any) -> int:
    """Returns the token that the chat template puts behind an assistant's message, which the model learns to stop at.

    It need not be the tokenizer's EOS: a base model that is taught a chat template has another one.

    Raises:
        UserError: there is no chat template, or none that ends a message with a special token.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"--model is {name}: its tokenizer has no chat template, so messages cannot be written; set a model that "
            "has one, or bring the data into texts."
        )
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": ANSWER}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = tokenizer(rendered[rendered.rindex(ANSWER) + len(ANSWER) :], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    for token_id in behind:
        if token_id in special:
            return int(token_id)
    raise UserError(
        f"--model is {name}: its chat template ends an assistant's message without a special token, so the model would "
        "never learn to stop; put {{ eos_token }} behind such messages in the template."
    )


@torch.no_grad()
def token_loss(
    model: Any, rows: Sequence[Mapping[str, Any]], collate: Any, batch_size: int, processes: Processes = ALONE
) -> float:
    """Returns the mean loss over all trained tokens of the rows, in nats: no mean of means over batches.

    Each process passes some of the rows through the model.
    """
    model.eval()
    device = next(model.parameters()).device

    def own_sums() -> tuple[float, int]:
        total, num_tokens = 0.0, 0
        own = processes.part(range(len(rows)))
        for start in range(0, len(own), batch_size):
            batch = {
                name: t.to(device) for name, t in collate([rows[i] for i in own[start : start + batch_size]]).items()
            }
            number = int((batch["labels"][:, 1:] != -100).sum())
            if number:
                total += float(model(**batch, use_cache=False).loss) * number
                num_tokens += number
        return total, num_tokens

    sums = processes.each(own_sums)
    return sum(total for total, _ in sums) / max(sum(number for _, number in sums), 1)
