"""Reward modelling: the second stage, over TRL's RewardTrainer, and how well the reward model ranks held-out pairs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets
import torch
import transformers
import trl
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from remax.cards import public_name
from remax.config import RewardConfig
from remax.errors import UserError
from remax.models import add_adapter, disable_dropout, give_own_pad_token, new_reward_model
from remax.processes import ALONE, Processes
from remax.rewards import RewardModel, require_chat_template
from remax.stages.batches import STUB, MicroBatches, PairsMixin
from remax.stages.common import load_pairs, position_limit, say, short_pairs, tokenizer_for, trainer_arguments
from remax.stages.run import StageRun

Z_95 = 1.959963984540054


class Pairs(NamedTuple):
    """Preference pairs as reward-model input."""

    chosen_ids: list[list[int]]
    rejected_ids: list[list[int]]


def run_reward(
    config: RewardConfig,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    *,
    run_config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Trains a reward model on preference pairs and writes OUT/model, metrics.jsonl, config.yaml and eval.json.

    The loss is -log sigmoid(r(x, y_chosen) - r(x, y_rejected)). What the model reads is what it will read in
    reinforcement learning: `rewards.text.reward_input_ids` of finished completions.

    Args:
        config: all settings.
        model: a language model that gets a new scalar head, by hub name or folder; or a loaded sequence
            classification model with one label (which is trained in place).
        train_dataset: a datasets.Dataset with chosen and rejected, texts or messages, and prompt if they share one.
        eval_dataset: held-out pairs, likewise; without, nothing is measured, since training pairs would flatter.
        processing_class: the tokenizer, by default the one beside the model.
        run_config: what config.yaml records; by default config.

    Returns:
        loss: mean over the training steps; with eval_dataset also what `rank_pairs` returns, as eval/...

    Raises:
        UserError: a setting, dataset or model cannot be used; nothing was written.
    """
    stage = StageRun(config, model, run_config, kind="reward")
    if stage.finished:
        return stage.finished_metrics()
    model, tokenizer, arguments, train_pairs, eval_pairs = stage.processes.together(
        lambda: _prepare(config, model, train_dataset, eval_dataset, processing_class)
    )
    batches = MicroBatches(
        len(train_pairs.chosen_ids), config.batch_size, config.micro_batch_size, config.seed, stage.processes
    )

    def make_trainer() -> Any:
        rows = datasets.Dataset.from_dict(train_pairs._asdict())
        trainer = _Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.batches = batches
        return trainer

    with stage.running():
        _, model, loss = stage.train(make_trainer, model)
        metrics = {"loss": loss}
        lines = [
            f"<code>{public_name(stage.base_name)}</code> with one output, trained on {len(train_pairs.chosen_ids)} "
            "pairs of texts.",
            "A finished text is scored with its EOS token.",
        ]
        if eval_pairs is None:
            say("No --eval_dataset was given: nothing held-out was measured, so nobody knows how well the model ranks.")
        else:
            scorer = RewardModel(model, tokenizer, batch_size=arguments.eval_batch_size)
            quality = rank_pairs(scorer, eval_pairs, stage.processes)
            metrics |= {f"eval/{name}": value for name, value in quality.items()}
            stage.record_quality(quality)
            lines.append(_summary(quality))
            say(lines[-1])
        stage.save(model, tokenizer, title="Reward model", lines=lines, task="text-classification")
    say(f"The reward model is in {stage.folder.model}.")
    stage.push()
    return metrics


def _prepare(
    config: RewardConfig, model: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any
) -> tuple[Any, Any, Any, Pairs, Pairs | None]:
    """Returns model, tokenizer, TRL's arguments and the pairs of both datasets."""
    # Dropout is turned off in the model before an adapter is added: TRL would turn off --lora_dropout, too.
    own = {"max_length": None, "disable_dropout": False, "dataset_num_proc": None, "center_rewards_coefficient": None}
    arguments = trainer_arguments(trl.RewardConfig, config, **own)
    train_dataset = load_pairs(train_dataset, flag="--train_dataset")
    eval_dataset = None if eval_dataset is None else load_pairs(eval_dataset, flag="--eval_dataset")
    tokenizer = tokenizer_for(model, processing_class)
    if not isinstance(train_dataset[0]["chosen"], str):
        require_chat_template(tokenizer, flag="--model")

    transformers.set_seed(config.seed)
    model = _prepared(model, config, tokenizer)
    limit = position_limit(model, config)
    train_pairs = tokenise_pairs(train_dataset, tokenizer, limit, flag="--train_dataset")
    eval_pairs = eval_dataset and tokenise_pairs(eval_dataset, tokenizer, limit, flag="--eval_dataset")
    return model, tokenizer, arguments, train_pairs, eval_pairs


class _Trainer(PairsMixin, trl.RewardTrainer):  # type: ignore[misc]
    """TRL's trainer, whose step is the mean over its pairs however they are divided."""

    def collate_counting(self, rows: list[Any], counts: list[bool]) -> Any:
        pairs = zip(rows, counts, strict=True)
        names = ("chosen_ids", "rejected_ids")
        rows = [row if own else dict.fromkeys(names, row["chosen_ids"][:STUB]) for row, own in pairs]
        return super().collate_counting(rows, counts)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts = inputs.pop("counts")
        _, outputs = super().compute_loss(model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.float().squeeze(-1).chunk(2)
        self._measure(chosen.detach(), rejected.detach(), counts, num_items_in_batch)
        total = (functional.softplus(rejected - chosen) * counts).sum()
        return self.share_of(total, counts, num_items_in_batch)

    def _measure(self, chosen: Tensor, rejected: Tensor, counts: Tensor, num_pairs: Any) -> None:
        """Puts means over the pairs of the step in the place of TRL's, which counts those that do not count.

        With the dropout of an adapter, a text does not get the same reward twice. Extremes are not told: of those of
        several micro-batches TRL takes the mean.
        """
        means = {
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
        }
        sums = torch.stack([(values * counts).sum() for values in means.values()])
        totals = self.accelerator.gather(sums[None]).sum(0) * self.current_gradient_accumulation_steps / num_pairs
        for name, value in zip(means, totals.tolist(), strict=True):
            self._metrics["train"][name][-1] = value  # TRL takes the mean over micro-batches.
        for name in ("min_reward", "max_reward"):
            self._metrics["train"].pop(name, None)


def _prepared(model: Any, config: RewardConfig, tokenizer: Any) -> Any:
    if isinstance(model, str):
        return new_reward_model(model, config, tokenizer, seed=config.seed, flag="--model")
    if "ForSequenceClassification" not in type(model).__name__ and not isinstance(model, PeftModel):
        raise UserError(
            f"--model is a {type(model).__name__}: it has no reward head; pass a name or folder, and it gets one."
        )
    if model.config.num_labels != 1:
        raise UserError(
            f"--model has {model.config.num_labels} labels: a reward is one number; load it with num_labels=1."
        )
    give_own_pad_token(model, tokenizer)
    if isinstance(model, PeftModel):
        return model
    disable_dropout(model)
    return add_adapter(model, config) if config.use_peft else model


def tokenise_pairs(dataset: Any, tokenizer: Any, max_length: int, *, flag: str) -> Pairs:
    """Returns the pairs of which both texts have at most max_length tokens, and says how many were dropped.

    Raises:
        UserError: no pair is left.
    """
    pairs = short_pairs(dataset, tokenizer, max_length, flag=flag)
    return Pairs([chosen for _, chosen, _ in pairs], [rejected for _, _, rejected in pairs])


def rank_pairs(reward_model: RewardModel, pairs: Pairs, processes: Processes = ALONE) -> dict[str, float]:
    """Returns how well a reward model ranks pairs, of which each process scores some.

    num_pairs; accuracy: share of pairs with r(chosen) > r(rejected), with its 95% Wilson interval accuracy_low and
    accuracy_high; margin: mean of r(chosen) - r(rejected); length_correlation: Pearson's, between reward and length in
    tokens, over all texts; longer_wins: the accuracy of preferring the longer text, ties counted half.
    """
    number = len(pairs.chosen_ids)
    texts = [*pairs.chosen_ids, *pairs.rejected_ids]
    parts = processes.each(lambda: reward_model.score_ids(processes.part(texts)))
    rewards = torch.tensor([reward for part in parts for reward in part], dtype=torch.float64)
    lengths = torch.tensor([len(ids) for ids in texts], dtype=torch.float64)
    margins, longer_by = rewards[:number] - rewards[number:], lengths[:number] - lengths[number:]
    accuracy = (margins > 0).double().mean().item()
    low, high = wilson_interval(accuracy, number)
    return {
        "num_pairs": number,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": margins.mean().item(),
        "length_correlation": correlation(lengths, rewards),
        "longer_wins": ((longer_by > 0).double() + 0.5 * (longer_by == 0).double()).mean().item(),
    }


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """Returns Wilson's 95% confidence interval of a share that was seen in a number of independent trials."""
    centre = share + Z_95**2 / (2 * number)
    spread = Z_95 * math.sqrt(share * (1 - share) / number + Z_95**2 / (4 * number**2))
    scale = 1 + Z_95**2 / number
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def correlation(x: Any, y: Any) -> float:
    """Returns Pearson's correlation of two vectors; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = (x.norm() * y.norm()).item()
    return float(x @ y) / norm if norm else 0.0


def _summary(quality: Mapping[str, float]) -> str:
    low, high = 100 * quality["accuracy_low"], 100 * quality["accuracy_high"]
    return (
        f"Held-out pairs ranked right: {100 * quality['accuracy']:.1f}% (95% interval {low:.1f} to {high:.1f}) of "
        f"{quality['num_pairs']:.0f}, where preferring the longer one gets {100 * quality['longer_wins']:.1f}%; mean "
        f"margin {quality['margin']:.3f}; correlation of reward and length {quality['length_correlation']:+.2f}."
    )
