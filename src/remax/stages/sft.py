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
from remax.stages.common import (
    finished_metrics,
    name_of,
    open_run,
    policy_to_train,
    position_limit,
    run_settings,
    save_policy,
    say,
    tokenizer_for,
    train,
    trainer_arguments,
    write_evaluation,
)

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
    base_name, settings = name_of(model), run_settings(config, model, run_config)
    run = open_run(config, settings, kind="sft")
    if run.finished:
        return finished_metrics(run)
    folder = run.folder
    arguments = trainer_arguments(trl.SFTConfig, config, packing=False, dataset_num_proc=None, loss_type="nll")
    train_dataset = as_examples(train_dataset, flag="--train_dataset")
    eval_dataset = None if eval_dataset is None else as_examples(eval_dataset, flag="--eval_dataset")
    tokenizer = tokenizer_for(model, processing_class)
    stop_ids = [] if _is_text(train_dataset) else [chat_stop_id(tokenizer)]

    transformers.set_seed(config.seed)
    model = policy_to_train(model, config)
    arguments.max_length = position_limit(model, config)

    def make_trainer() -> Any:
        trainer = _Trainer(
            model, arguments, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer
        )
        _say_what_is_cut(trainer.train_dataset, len(train_dataset), arguments.max_length)
        return trainer

    trainer, model, loss = train(make_trainer, model, run, config, settings)
    metrics = {"loss": loss}
    if trainer.eval_dataset is None:
        say("No --eval_dataset was given: nothing held-out was measured.")
    else:
        eval_loss = token_loss(model, trainer.eval_dataset, trainer.data_collator, arguments.eval_batch_size)
        quality = {"loss": eval_loss, "perplexity": math.exp(min(eval_loss, 700.0))}
        metrics |= {f"eval/{name}": value for name, value in quality.items()}
        write_evaluation(folder, quality)
        say(f"Held-out: loss {eval_loss:.4f} nats per token, perplexity {quality['perplexity']:.2f}.")
    lines = [
        f"<code>{public_name(base_name)}</code> after supervised fine-tuning on {len(trainer.train_dataset)} examples."
    ]
    save_policy(model, tokenizer, stop_ids, folder, base_name=base_name, title="Fine-tuned model", lines=lines)
    return metrics


def _say_what_is_cut(prepared: Any, number: int, max_length: int) -> None:
    if dropped := number - len(prepared):
        say(f"{dropped} of {number} examples were dropped: their prompts alone fill {max_length} tokens.")
    if cut := sum(len(ids) >= max_length for ids in prepared["input_ids"]):
        say(f"{cut} of {number} examples reach {max_length} tokens, where they are cut: such do not teach how to end.")


class _Trainer(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the plain loss of transformers where there is no accelerator.

    TRL's fused head saves memory that a CPU has, by recomputing what a CPU is slow at: a step of a small model takes
    1.7 times as long with it. The loss is the same.
    """

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
def token_loss(model: Any, rows: Sequence[Mapping[str, Any]], collate: Any, batch_size: int) -> float:
    """Returns the mean loss over all trained tokens of the rows, in nats: no mean of means over batches."""
    model.eval()
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        examples = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        batch = {name: tensor.to(device) for name, tensor in collate(examples).items()}
        number = int((batch["labels"][:, 1:] != -100).sum())
        if number:
            total += float(model(**batch).loss) * number
            num_tokens += number
    return total / max(num_tokens, 1)
