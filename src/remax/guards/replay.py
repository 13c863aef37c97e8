"""`remax replay`: a skipped update again, pass by pass and row by row, to see what in it is not finite.

Legend: B rows of a pass, T tokens of its longest completion, R rows of the update.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from remax import models
from remax.batching import collate
from remax.components import Components, Rewards
from remax.config import ReMaxConfig, ReplayConfig
from remax.critic import load_value_model
from remax.errors import UserError
from remax.guards.dumps import Dump, read_dump
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.loading import load_policy, load_reference
from remax.logprobs import CompletionScorer
from remax.methods.critic_free import CriticFree
from remax.methods.ppo import PPO, Experience
from remax.metrics import Credit, StepRecord
from remax.processes import make_accelerator
from remax.untrusted import printable

SHOWN_WEIGHTS = 5
"""How many names of weights are printed."""


class Pass(NamedTuple):
    """What a forward pass over B rows gives."""

    loss: Tensor
    tokens: Tensor
    """[B, T] log-probabilities under the policy, or values; detached."""


@dataclass(frozen=True)
class Finding:
    """What one pass, or one row alone, showed."""

    rows: list[int]
    """Of the training step's samples."""
    loss: float
    num_bad_weights: int
    """Weight tensors whose gradient is not finite."""
    first: str
    """What is not finite first, in the order in which things are computed; of a single row only."""

    @property
    def is_finite(self) -> bool:
        """Whether nothing is wrong."""
        return math.isfinite(self.loss) and not self.num_bad_weights and not self.first


@dataclass(frozen=True)
class Replay:
    """An update that was done again."""

    reproduced: bool
    """Whether its loss or gradient is not finite again."""
    loss: float
    grad_norm: float
    passes: list[Finding]
    rows: list[Finding]
    """Of the passes that are not finite, every row alone that is not either."""
    bad_weights: list[str]
    """Weights whose gradient over the whole update is not finite."""


def run_replay(args: ReplayConfig) -> Replay:
    """Does a skipped update again and prints what is not finite in it.

    Raises:
        UserError: the dump or the model that it needs cannot be used.
    """
    dump = read_dump(args.dump)
    update = _Update(dump, args.model)
    replay = update.replay()
    _print(dump, replay)
    return replay


class _Update:
    """A skipped update with its models."""

    def __init__(self, dump: Dump, model: str | None) -> None:
        self.dump, self.facts = dump, dump.facts
        config = self.facts["config"]
        known = {f.name for f in fields(ReMaxConfig)}
        settings = {name: value for name, value in config.items() if name in known}
        changes = {"micro_batch_tokens": self.facts["micro_batch_tokens"], "resume": "none"}
        self.args = ReMaxConfig(**{**settings, **changes})
        self.record = self._record()
        name = model or config.get("model")
        if not name:
            raise UserError(
                "--model is not set: the dump is of a model without a name; set the one the run began with."
            )
        models.check_model_exists(name, flag="--model")
        self.parts = self._components(name)
        ids = [token for c in self.record.rollout.samples for token in c.prompt.token_ids + c.token_ids]
        if max(ids) >= (known := self.parts.policy.get_input_embeddings().num_embeddings):
            raise UserError(
                f"--dump is {dump.path}: it has token {max(ids)}, and the model's tokens end at {known - 1}; set "
                "--model to the one that the run began with."
            )
        rows = list(range(len(self.facts["samples"])))
        if self.args.method == "ppo":
            self.groups, self.run_pass, self.network = self._ppo(rows)
        else:
            self.groups, self.run_pass, self.network = self._critic_free(rows)
        self.rows_of_step = [sample["row"] for sample in self.facts["samples"]]

    def _record(self) -> StepRecord:
        """Returns the step with the update's samples alone."""
        samples, tensors = self.facts["samples"], self.dump.samples
        lengths = [len(sample["completion_ids"]) for sample in samples]
        completions = [
            Completion(
                Prompt(sample["prompt_index"], sample["prompt"], sample["prompt_ids"]),
                sample["sample_index"],
                sample["completion_ids"],
                logprobs.tolist(),
                sample["truncated"],
                sample["completion"],
            )
            for sample, logprobs in zip(samples, torch.split(tensors["logprobs"], lengths), strict=True)
        ]
        missing = torch.full_like(tensors["rewards"], math.nan)
        ref_logprobs = tensors.get("ref_logprobs")
        return StepRecord(
            Rollout(completions, []),
            Rewards(tensors["rewards"], missing[:0], {}, {}, {}),
            Credit(tensors["advantages"], missing),
            None if ref_logprobs is None else list(torch.split(ref_logprobs, lengths)),
            int(self.facts["step"]),
        )

    def _components(self, name: str) -> Components:
        tokenizer = models.load_tokenizer(name, flag="--model")
        accelerator = make_accelerator(self.args.bf16)
        policy = load_policy(name, self.args).to(accelerator.device)
        reference = load_reference(policy) if self.args.needs_exact_kl else None
        self._put_in(policy, "policy")
        if self.record.ref_logprobs is not None:
            self.record.ref_logprobs = [own.to(accelerator.device) for own in self.record.ref_logprobs]
        sampling = self.facts["sampling"]
        nothing: Any = None
        return Components(
            accelerator=accelerator,
            policy=policy,
            reference=reference,
            reference_placed=None,
            tokenizer=tokenizer,
            engine=nothing,
            reward_functions=[],
            reward_weights=[],
            sampling=Sampling(**{**sampling, "eos_token_ids": tuple(sampling["eos_token_ids"])}),
            prompts=[],
            eval_prompts=[],
            model_name=name,
        )

    def _put_in(self, network: nn.Module, name: str) -> None:
        """Puts the dumped weights into a network."""
        own = {n: p for n, p in network.named_parameters() if p.requires_grad}
        dumped = self.dump.weights(name)
        if {n: p.shape for n, p in own.items()} != {n: tensor.shape for n, tensor in dumped.items()}:
            raise UserError(
                f"--dump is {self.dump.path}: its {name}.safetensors has other weights than the model that is loaded; "
                "set --model to the one that the run began with."
            )
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(dumped[n])

    def _critic_free(self, rows: list[int]) -> tuple[list[list[int]], Callable[[list[int]], Pass], nn.Module]:
        learner: Any = SimpleNamespace(network=CompletionScorer(self.parts.policy))
        method = CriticFree(self.parts, self.args, learner)
        denominator = method.denominator(self.record, rows)

        def run(group: list[int]) -> Pass:
            result = method.loss(self.record, group, denominator)
            return Pass(result.loss, result.logprobs)

        return [group for group, _, _ in method.micro_batches(self.record, rows)], run, self.parts.policy

    def _ppo(self, rows: list[int]) -> tuple[list[list[int]], Callable[[list[int]], Pass], nn.Module]:
        device = self.parts.accelerator.device
        prefix = "experience/"
        tensors = {n.removeprefix(prefix): t.to(device) for n, t in self.dump.samples.items() if n.startswith(prefix)}
        samples = self.record.rollout.samples
        if tensors.keys() != {f.name for f in fields(Experience)} - {"samples"}:
            raise UserError(f"--dump is {self.dump.path}: its samples are none of PPO's; set another one.")
        experience = Experience(samples, **tensors)
        num_tokens = int(experience.mask.sum())
        of_value = self.facts["network"] == "value"
        learner: Any = SimpleNamespace(network=CompletionScorer(self.parts.policy))
        value_model = self._value_model() if of_value else None
        critic: Any = SimpleNamespace(network=value_model, module=value_model)
        method = PPO(self.parts, self.args, learner, critic)

        def run(group: list[int]) -> Pass:
            batch = collate([samples[row] for row in group], self.parts.tokenizer.pad_token_id, device)
            own = experience.part(group, batch.completion_mask.shape[1])
            if of_value:
                return Pass(*method.value_loss(own, batch, num_tokens))
            result, _ = method.policy_loss(own, batch, len(rows), num_tokens)
            return Pass(result.loss, result.logprobs)

        groups = [group for group, _, _, _ in method.micro_batches(experience, rows)]
        return groups, run, value_model if value_model is not None else self.parts.policy

    def _value_model(self) -> nn.Module:
        source = self.args.value_model or self.facts["config"].get("reward_model")
        args = replace(self.args, value_model=source)
        network = load_value_model(args, self.parts.policy, self.parts.tokenizer, []).to(self.parts.accelerator.device)
        self._put_in(network, "value_model")
        return network

    # Doing it again ---------------------------------------------------------------------------------------------------

    def replay(self) -> Replay:
        """Returns what is not finite in the update."""
        total = 0.0
        self.network.zero_grad()
        for group in self.groups:
            total += self._differentiate(group).loss.item()
        bad_weights = self._bad_weights()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        passes = [self._find(group) for group in self.groups]
        suspects = [
            row for group, found in zip(self.groups, passes, strict=True) if not found.is_finite for row in group
        ]
        rows = [found for row in sorted(suspects) if not (found := self._find([row])).is_finite]
        finite = math.isfinite(total) and math.isfinite(norm)
        return Replay(not finite, total, norm, passes, rows, bad_weights)

    def _differentiate(self, rows: list[int]) -> Pass:
        result = self.run_pass(rows)
        if result.loss.requires_grad:
            self.parts.accelerator.backward(result.loss)
        return result

    def _find(self, rows: list[int]) -> Finding:
        self.network.zero_grad()
        result = self._differentiate(rows)
        bad = len(self._bad_weights())
        first = next(self._not_finite(rows[0], result.tokens[0]), "") if len(rows) == 1 else ""
        self.network.zero_grad()
        return Finding([self.rows_of_step[row] for row in rows], result.loss.item(), bad, first)

    def _bad_weights(self) -> list[str]:
        named = self.network.named_parameters()
        return [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]

    def _not_finite(self, row: int, tokens: Tensor) -> Iterator[str]:
        """Yields what of a row is not finite, given its log-probabilities or values of the pass, [T]."""
        record, of_value = self.record, self.facts["network"] == "value"
        sample = record.rollout.samples[row]
        length = len(sample.token_ids)
        own = {name: t[row, :length] for name, t in self.dump.samples.items() if name.startswith("experience/")}
        series = {"log-probability in the rollout": torch.tensor(sample.logprobs)}
        series |= {"reward": record.rewards.sampled[row : row + 1]}
        if record.ref_logprobs is not None:
            series |= {"log-probability under the reference": record.ref_logprobs[row]}
        for name, words in (("log_ratios", "KL"), ("old_values", "value"), ("advantages", "advantage")):
            if f"experience/{name}" in own:
                series |= {f"{words} before the update": own[f"experience/{name}"]}
        if not own:
            series |= {"advantage": record.advantages[row : row + 1]}
        series |= {"value" if of_value else "log-probability": tokens[:length]}
        if record.ref_logprobs is not None and not of_value:
            series |= {"KL": tokens[:length].cpu() - record.ref_logprobs[row].cpu()}
        for name, values in series.items():
            for position in (~values.isfinite()).nonzero().flatten().tolist()[:1]:
                where = f" of token {position} (id {sample.token_ids[position]})" if len(values) == length > 1 else ""
                yield f"{name}{where}"


def _print(dump: Dump, replay: Replay) -> None:
    facts = dump.facts
    console = Console()
    what = f"{facts['cause']} was not finite (seed {facts['seed']})"
    console.print(Text(f"Step {facts['step']}, {len(facts['samples'])} samples: {what}."))
    table = _table("Micro-batches", "rows", "loss", "weights without a finite gradient")
    for found in replay.passes:
        numbers = ", ".join(map(str, found.rows))
        table.add_row(numbers, f"{found.loss:.4g}", str(found.num_bad_weights or ""))
    console.print(table)
    if replay.rows:
        prompts = {sample["row"]: str(sample["prompt"]) for sample in facts["samples"]}
        table = _table("Rows that are not finite", "row", "loss", "not finite first", "prompt")
        for found in replay.rows:
            first = found.first or "the loss" * (not math.isfinite(found.loss)) or "its gradient alone"
            prompt = Text(printable(prompts[found.rows[0]])[-60:])
            table.add_row(str(found.rows[0]), f"{found.loss:.4g}", first, prompt)
        console.print(table)
    if replay.bad_weights:
        names = ", ".join(replay.bad_weights[:SHOWN_WEIGHTS])
        more = len(replay.bad_weights) - SHOWN_WEIGHTS
        console.print(Text(f"No finite gradient: {names}{f' and {more} more' if more > 0 else ''}."))
    elif replay.reproduced and not replay.rows:
        console.print(Text("Every row has a finite loss and gradient: it is their sum, or its norm, that overflows."))
    verdict = "reproduced" if replay.reproduced else "not reproduced (another device or version rounds otherwise)"
    console.print(Text(f"{verdict}: loss {replay.loss:.4g}, gradient norm {replay.grad_norm:.4g}."))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    for column in columns:
        table.add_column(column)
    return table
