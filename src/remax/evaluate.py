"""How good a policy is on held-out prompts: rewards sampled and greedy, KL, lengths and perplexity, with intervals."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from remax import data, models
from remax.assembly import assemble_evaluation
from remax.components import Components, Rewards
from remax.config import EvaluateConfig, EvaluateInputs
from remax.interfaces import Completion, Prompt, RewardFunction, Rollout, Sampling
from remax.loading import load_rewards
from remax.logprobs import CompletionScorer
from remax.metrics import Credit, StepRecord, completion_records
from remax.recording import RunFolder
from remax.rewards.named import wait_until_ready
from remax.untrusted import printable

Floats = NDArray[np.float64]

EVALUATION_STEP = -1
"""Keys the sampling noise of evaluations: the same every time, and never that of a training step."""

PROMPTS_AT_ONCE = 64
"""How many prompts `remax evaluate` rolls out together."""


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one policy, one value per prompt; several samples of a prompt are averaged."""

    rollout: Rollout
    rewards: Rewards
    values: Mapping[str, Floats]
    """By metric name, [prompts]; NaN where a reward is missing."""
    gold: Tensor | None = None
    """[S] gold rewards of the samples; None without a gold reward."""

    def means(self) -> dict[str, float]:
        """Returns the mean of every measurement over the prompts that have it."""
        return {name: float(values.mean()) for name, values in self._measured()}

    def deciding(self, name: str, max_missing: float) -> float | None:
        """Returns the mean of a measurement; None if too much is missing for it to decide which model is the best.

        max_missing: of the prompts, the largest fraction without that measurement or, of a single reward function,
        which need not apply everywhere, without a reward at all.
        """
        missing = np.isnan(self.values["reward" if name.startswith("rewards/") else name]).mean()
        return self.means().get(name) if missing <= max_missing else None

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Returns 95% bootstrap intervals of those means."""
        return {name: bootstrap_interval(values, seed=seed) for name, values in self._measured()}

    def records(self, step: int) -> list[dict[str, Any]]:
        """Returns one record per prompt for eval_completions.jsonl: a sample, the greedy completion, the values.

        The values are means over the samples of the prompt, under the names of eval.jsonl without "eval/".
        """
        num_samples = len(self.rollout.samples) // len(self.rollout.greedy)
        samples = self.rollout.samples[::num_samples]
        return [
            {
                "step": step,
                "prompt_index": greedy.prompt.index,
                "prompt": greedy.prompt.content,
                "completion": sample.text,
                "greedy_completion": greedy.text,
                "length": len(sample.token_ids),
                "truncated": sample.truncated,
                "values": {name: float(values[row]) for name, values in self.values.items()},
            }
            for row, (sample, greedy) in enumerate(zip(samples, self.rollout.greedy, strict=True))
        ]

    def _measured(self) -> list[tuple[str, Floats]]:
        present = {name: values[~np.isnan(values)] for name, values in self.values.items()}
        return [(name, values) for name, values in present.items() if len(values)]


def evaluate_policy(
    parts: Components, prompts: Sequence[Prompt], *, num_samples: int, seed: int, prompts_at_once: int, max_tokens: int
) -> Evaluation:
    """Returns how the policy does on these prompts, sampled and greedy.

    The KL is the mean log-ratio of the samples to the reference, in nats per sequence; the policy's side of it are the
    log-probabilities of the rollout.
    """
    chunks = [prompts[start : start + prompts_at_once] for start in range(0, len(prompts), prompts_at_once)]
    rollouts = [
        parts.roll_out(chunk, num_samples=num_samples, greedy=True, seed=seed, step=EVALUATION_STEP) for chunk in chunks
    ]
    rollout = Rollout([c for r in rollouts for c in r.samples], [c for r in rollouts for c in r.greedy])
    rewards = parts.score(rollout)

    def per_prompt(values: Any) -> Floats:
        means: Floats = np.asarray(values, dtype=np.float64).reshape(len(prompts), -1).mean(axis=1)
        return means

    values = {"reward": per_prompt(rewards.sampled), "reward/greedy": per_prompt(rewards.greedy)}
    for name, own in rewards.sampled_by_function.items():
        values[f"rewards/{name}/mean"] = per_prompt(own)
    gold = None
    if parts.gold_functions:
        gold, gold_of_greedy = parts.judge(rollout)
        values |= {"gold": per_prompt(gold), "gold/greedy": per_prompt(gold_of_greedy)}
    if parts.reference is not None:
        reference = [float(logprobs.sum()) for logprobs in parts.reference_logprobs(rollout.samples, max_tokens)]
        values["kl"] = per_prompt([sum(c.logprobs) for c in rollout.samples]) - per_prompt(reference)
    # -log pi of what was drawn is the entropy in expectation.
    values["entropy"] = per_prompt([-sum(c.logprobs) / len(c.token_ids) for c in rollout.samples])
    values["completions/mean_length"] = per_prompt([len(c.token_ids) for c in rollout.samples])
    values["completions/greedy_mean_length"] = per_prompt([len(c.token_ids) for c in rollout.greedy])
    values["completions/clipped_ratio"] = per_prompt([c.truncated for c in rollout.samples])
    return Evaluation(rollout, rewards, values, gold)


def check_gold(gold: Sequence[Any]) -> None:
    """Raises UserError if a model or a function cannot be a gold reward; reads no weights."""
    for name in gold:
        if isinstance(name, str):
            models.check_model_exists(name, flag="--gold_reward_model")
            models.require_reward_model(name, flag="--gold_reward_model")
    wait_until_ready(gold)


def load_gold(gold: Sequence[Any], parts: Components, batch_size: int) -> list[RewardFunction]:
    """Returns the gold rewards; between evaluations models rest on the CPU, so that they take no memory of training."""
    conversational = not isinstance(parts.eval_prompts[0].content, str)
    device = parts.accelerator.device
    return load_rewards(gold, None, batch_size, device, conversational=conversational, placement="offload")


def perplexity(totals: Sequence[float], lengths: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Returns exp(-sum of log-probabilities / number of tokens) over all texts, with its 95% bootstrap interval."""
    pairs = np.stack([np.asarray(totals, dtype=np.float64), np.asarray(lengths, dtype=np.float64)], axis=1)

    def statistic(sample: Floats) -> float:
        log_likelihood, num_tokens = sample.sum(axis=0)
        return float(np.exp(-log_likelihood / num_tokens))

    return statistic(pairs), bootstrap_interval(pairs, statistic)


def bootstrap_interval(
    values: Floats, statistic: Callable[[Floats], Any] = np.mean, *, seed: int = 0, num_resamples: int = 2000
) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of a statistic (by default the mean) over the first axis."""
    generator = np.random.default_rng(seed)
    resampled = [statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(num_resamples)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def evaluate_checkpoint(
    inputs: EvaluateInputs, rewards: Sequence[Any], args: EvaluateConfig, folder: RunFolder | None
) -> dict[str, Any]:
    """Returns, prints and, given a folder, writes the measurements of a checkpoint, each with its 95% interval.

    Raises:
        UserError: a model, a dataset or a reward cannot be used.
    """
    source = _reference_dataset(inputs)
    parts = assemble_evaluation(inputs, rewards, args)
    references: list[Completion] = []
    if source is not None:
        limit = getattr(parts.policy.config.get_text_config(), "max_position_embeddings", None)
        dataset, flag = source
        dataset = dataset.select(range(min(len(dataset), args.num_eval_prompts)))
        references = data.load_references(dataset, parts.tokenizer, flag=flag, max_length=limit)
    evaluation = evaluate_policy(
        parts,
        parts.eval_prompts,
        num_samples=args.num_generations,
        seed=args.seed,
        prompts_at_once=PROMPTS_AT_ONCE,
        max_tokens=args.micro_batch_tokens,
    )
    intervals = evaluation.intervals(args.seed)
    results: dict[str, Any] = {
        name: {"mean": mean, "interval": intervals[name]} for name, mean in evaluation.means().items()
    }
    if references:
        plain = Sampling(args.max_completion_length, parts.sampling.eos_token_ids)
        scorer = CompletionScorer(parts.policy)
        logprobs = parts.token_logprobs(scorer, references, plain, args.micro_batch_tokens)
        totals = [float(own.sum()) for own in logprobs]
        value, interval = perplexity(totals, [len(c.token_ids) for c in references])
        results["perplexity"] = {"mean": value, "interval": interval}
    for news in parts.memory.news:
        print(f"{news['message']}.")
    _print_table(inputs.model, results, len(parts.eval_prompts))
    if folder is not None:
        folder.create({**dataclasses.asdict(inputs), **dataclasses.asdict(args)})
        summary = {"model": inputs.model, "num_prompts": len(parts.eval_prompts), "results": results}
        (folder.path / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        greedy = evaluation.rewards.greedy.repeat_interleave(args.num_generations)
        credit = Credit(evaluation.rewards.sampled - greedy, greedy)
        record = StepRecord(evaluation.rollout, evaluation.rewards, credit, None)
        folder.append("completions.jsonl", completion_records(record, 0))
    return results


def _reference_dataset(inputs: EvaluateInputs) -> tuple[Any, str] | None:
    """Returns the texts whose perplexity is asked for, or None if the evaluation prompts come without answers."""
    if inputs.perplexity_dataset is not None:
        dataset = data.load_records(inputs.perplexity_dataset, inputs.eval_split, flag="--perplexity_dataset")
        data.check_references(dataset, flag="--perplexity_dataset")
        return dataset, "--perplexity_dataset"
    dataset = data.load_records(inputs.eval_dataset, inputs.eval_split, flag="--eval_dataset")
    return (dataset, "--eval_dataset") if data.has_references(dataset) else None


def _print_table(model: str, results: Mapping[str, Any], num_prompts: int) -> None:
    title = Text(printable(f"{model} on {num_prompts} prompts"))
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("95% interval", justify="right")
    for name, result in results.items():
        low, high = result["interval"]
        table.add_row(Text(printable(name)), f"{result['mean']:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
