"""Direct preference optimisation: the offline alternative to reinforcement learning, over TRL's DPOTrainer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import trl
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from remax.batching import collate
from remax.cards import public_name
from remax.config import DPOConfig
from remax.interfaces import Completion, Prompt, Sampling
from remax.logprobs import CompletionScorer
from remax.models import adapter_is_new, copy_as_reference, disable_dropout
from remax.stages.batches import STUB, MicroBatches, PairsMixin
from remax.stages.common import (
    all_stop_ids,
    base_of,
    ids_of_prompt,
    load_pairs,
    policy_to_train,
    position_limit,
    say,
    shared_length,
    short_pairs,
    tokenizer_for,
    trainer_arguments,
)
from remax.stages.reward import wilson_interval
from remax.stages.run import StageRun
from remax.stages.sft import chat_stop_id

PLAIN = Sampling(max_completion_length=1, eos_token_ids=())
"""The model's own distribution; nothing is drawn here."""


class Preference(NamedTuple):
    """A pair of completions of one prompt, under the names that DPOTrainer has for them."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def run_dpo(
    config: DPOConfig,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    *,
    run_config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Trains a policy on preference pairs and writes OUT/model, metrics.jsonl, config.yaml and eval.json.

    The loss is -log sigmoid(r(x, y_chosen) - r(x, y_rejected)) with the implicit reward
    r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)), summed over the tokens of y through its EOS (Rafailov et al., arXiv
    2305.18290, equation 7). The reference is the policy as given: with a new adapter, the same model with the adapter
    off; else a frozen copy. Dropout is off in both.

    Args:
        config: all settings.
        model: a causal language model: hub name, folder or loaded model (which is trained in place).
        train_dataset: a datasets.Dataset with chosen and rejected, texts or messages, and prompt if they share one;
            see `preferences` for those without.
        eval_dataset: held-out pairs, likewise; without, nothing is measured.
        processing_class: the tokenizer, by default the one beside the model.
        run_config: what config.yaml records; by default config.

    Returns:
        loss: mean over the training steps; with eval_dataset also what `rank_preferences` returns, as eval/...

    Raises:
        UserError: a setting, dataset or model cannot be used, and nothing was written; or the loss is not finite any
            more.
    """
    stage = StageRun(config, model, run_config, kind="dpo")
    if stage.finished:
        return stage.finished_metrics()
    model, reference, tokenizer, arguments, train_pairs, eval_pairs, stop_ids = stage.processes.together(
        lambda: _prepare(config, model, train_dataset, eval_dataset, processing_class)
    )
    batches = MicroBatches(len(train_pairs), config.batch_size, config.micro_batch_size, config.seed, stage.processes)
    # Before TRL puts forwards of its own on both models.
    scorers = CompletionScorer(model), CompletionScorer(reference or model, adapters=reference is not None)

    def make_trainer() -> Any:
        rows = datasets.Dataset.from_list([pair._asdict() for pair in train_pairs])
        trainer = _Trainer(model, reference, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.batches = batches
        if reference is None:
            # TRL's copy of the adapter; without it, TRL takes the model with the adapter off.
            model.delete_adapter("ref")
        return trainer

    with stage.running():
        _, model, loss = stage.train(make_trainer, model)
        metrics = {"loss": loss}
        lines = [
            f"<code>{public_name(stage.base_name)}</code> after direct preference optimisation on {len(train_pairs)} "
            f"pairs, beta {config.beta}."
        ]
        if eval_pairs is None:
            say("No --eval_dataset was given: nothing held-out was measured.")
        else:
            processes = stage.processes
            parts = processes.each(
                lambda: implicit_margins(
                    *scorers, processes.part(eval_pairs), config.beta, tokenizer, arguments.eval_batch_size
                )
            )
            quality = rank_preferences(torch.cat(parts))
            metrics |= {f"eval/{name}": value for name, value in quality.items()}
            stage.record_quality(quality)
            lines.append(_summary(quality))
            say(lines[-1])
        ids = all_stop_ids(model, tokenizer, stop_ids)
        stage.save(model, tokenizer, title="Model after DPO", lines=lines, eos_token_ids=ids)
    say(f"The model is in {stage.folder.model}.")
    stage.push()
    return metrics


class _Prepared(NamedTuple):
    model: Any
    reference: Any
    tokenizer: Any
    arguments: Any
    train_pairs: "list[Preference]"
    eval_pairs: "list[Preference] | None"
    stop_ids: list[int]


def _prepare(config: DPOConfig, model: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any) -> _Prepared:
    own = {"beta": config.beta, "loss_type": ["sigmoid"], "max_length": None, "disable_dropout": False}
    arguments = trainer_arguments(trl.DPOConfig, config, **own)
    train_dataset = load_pairs(train_dataset, flag="--train_dataset")
    eval_dataset = None if eval_dataset is None else load_pairs(eval_dataset, flag="--eval_dataset")
    tokenizer = tokenizer_for(model, processing_class)
    stop_ids = [] if isinstance(train_dataset[0]["chosen"], str) else [chat_stop_id(tokenizer)]

    transformers.set_seed(config.seed)
    model = policy_to_train(model, config)
    disable_dropout(model)
    limit = position_limit(model, config)
    train_pairs = preferences(train_dataset, tokenizer, limit, flag="--train_dataset")
    eval_pairs = eval_dataset and preferences(eval_dataset, tokenizer, limit, flag="--eval_dataset")
    return _Prepared(model, _reference_of(model), tokenizer, arguments, train_pairs, eval_pairs, stop_ids)


def _reference_of(model: Any) -> Any:
    """Returns a frozen copy of the policy as given; None for a new adapter, where that is the model without it."""
    if isinstance(model, PeftModel) and adapter_is_new(model):
        return None
    return copy_as_reference(base_of(model))


class _Trainer(PairsMixin, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's trainer, whose step is the mean over its pairs however they are divided."""

    def collate_counting(self, rows: list[Any], counts: list[bool]) -> Any:
        def stub(row: Any) -> dict[str, list[int]]:
            """No completion against none: the loss is log 2, whatever the policy, and the gradient zero."""
            return {"prompt_ids": [*row["prompt_ids"], *row["chosen_ids"]][:STUB], "chosen_ids": [], "rejected_ids": []}

        pairs = zip(rows, counts, strict=True)
        return super().collate_counting([row if own else stub(row) for row, own in pairs], counts)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts = inputs.pop("counts")
        mean = super().compute_loss(model, inputs)
        return self.share_of(mean * len(counts) - math.log(2) * (~counts).sum(), counts, num_items_in_batch)


def preferences(dataset: Any, tokenizer: Any, max_length: int, *, flag: str) -> list[Preference]:
    """Returns the pairs of which both sequences have at most max_length tokens, and says how many were dropped.

    Without a column prompt, texts are completions of an empty prompt, which is BOS, and conversations of the messages
    that both share at their start. What chosen and rejected share beyond the prompt cancels in the loss.

    Raises:
        UserError: no pair is left.
    """
    pairs = []
    for row, chosen, rejected in short_pairs(dataset, tokenizer, max_length, flag=flag):
        # The end of the prompt may be written otherwise when it is continued (EOS, merged tokens, a prefilled answer).
        start = shared_length(ids_of_prompt(tokenizer, _prompt_of(row)), chosen, rejected)
        pairs.append(Preference(chosen[:start], chosen[start:], rejected[start:]))
    return pairs


def _prompt_of(row: Mapping[str, Any]) -> Any:
    """Returns the prompt of a pair: a text, or messages."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) or "prompt" in row:
        return row.get("prompt", "")
    # A last message is always a completion, even where the other side goes on behind it.
    return chosen[: shared_length(chosen[:-1], rejected[:-1])]


@torch.no_grad()
def implicit_margins(
    policy: CompletionScorer,
    reference: CompletionScorer,
    pairs: Sequence[Preference],
    beta: float,
    tokenizer: Any,
    batch_size: int,
) -> Tensor:
    """Returns r(x, y_chosen) - r(x, y_rejected) of every pair, [pairs], where r = beta * log(pi / pi_ref)."""
    policy.eval()
    device = next(policy.parameters()).device
    margins = [torch.empty(0, dtype=torch.float64)]
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        sides = [(pair.prompt_ids, pair.chosen_ids) for pair in some]
        sides += [(pair.prompt_ids, pair.rejected_ids) for pair in some]
        batch = collate([_completion(*side) for side in sides], tokenizer.pad_token_id, device)
        log_ratios = policy(batch, PLAIN).logprobs - reference(batch, PLAIN).logprobs
        chosen, rejected = log_ratios.double().sum(dim=-1).cpu().chunk(2)
        margins.append(beta * (chosen - rejected))
    return torch.cat(margins)


def _completion(prompt_ids: list[int], completion_ids: list[int]) -> Completion:
    ids = prompt_ids + completion_ids
    start = max(1, len(prompt_ids))  # Without a BOS, nothing predicts the first token of a text.
    return Completion(Prompt(0, "", ids[:start]), 0, ids[start:], [], truncated=False)


def rank_preferences(margins: Tensor) -> dict[str, float]:
    """Returns how well the implicit reward ranks pairs with these margins.

    num_pairs; loss: mean of -log sigmoid(margin); accuracy: share of pairs with a margin above 0, with its 95% Wilson
    interval accuracy_low and accuracy_high; margin: its mean.
    """
    accuracy = (margins > 0).double().mean().item()
    low, high = wilson_interval(accuracy, len(margins))
    return {
        "num_pairs": len(margins),
        "loss": functional.softplus(-margins).mean().item(),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": margins.mean().item(),
    }


def _summary(quality: Mapping[str, float]) -> str:
    low, high = 100 * quality["accuracy_low"], 100 * quality["accuracy_high"]
    return (
        f"Held-out pairs ranked right by the implicit reward: {100 * quality['accuracy']:.1f}% (95% interval {low:.1f} "
        f"to {high:.1f}) of {quality['num_pairs']:.0f}; loss {quality['loss']:.4f}, mean margin "
        f"{quality['margin']:.3f}."
    )
