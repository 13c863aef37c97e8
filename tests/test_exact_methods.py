"""Every critic-free method against exact enumeration, in float64, to 1e-12.

The code under test is the real CriticFree, from greedy_wanted to update, with the real objective and scorer; only the
optimiser is left out. An expectation over groups of samples is one update on all groups, where every row's gradient
has the probability of its group as weight. Each group's credit is taken alone, as a batch of its own.
"""

import contextlib
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from enumeration import (
    BETA,
    CLIP,
    COMPLETIONS,
    EOS,
    PLAIN,
    POLICY,
    POLICY_SCORER,
    PROMPT,
    REFERENCE,
    REFERENCE_SCORER,
    REWARDS,
    assert_close,
    gradient,
    greedy_completion,
    objective,
    sequence_logprob,
    step_logprobs,
)
from remax.batching import Batch, collate
from remax.components import Components, Rewards
from remax.config import ReMaxConfig
from remax.interfaces import Completion, Prompt, Rollout, Sampling
from remax.logprobs import CompletionScorer, TokenStatistics
from remax.methods import CriticFree, critic_free
from remax.metrics import Credit, StepRecord

Group = Sequence[list[int]]
Scores = dict[tuple[int, ...], float]
OLDER_POLICY = 2.75
"""Greedy reward of a policy that is no more: any constant."""


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Rewards in float64 too; training holds them in float32."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class GradientOnly:
    """In the place of a Learner: adds the gradients of the losses up and takes no step."""

    def __init__(self, network: Any = POLICY_SCORER) -> None:
        self.network = network
        self.gradient = torch.zeros(())

    def update(self, losses: Iterable[Tensor], num_losses: int) -> float:
        POLICY.zero_grad()
        for loss in losses:
            loss.backward()
        self.gradient = torch.cat([p.grad.flatten() for p in POLICY.parameters()])
        return self.gradient.norm().item()


class WeightedScorer:
    """The policy's scorer with the gradient of every row times its weight; the values are as they were."""

    weights: Tensor

    def __call__(self, batch: Batch, sampling: Sampling, reference: CompletionScorer | None = None) -> TokenStatistics:
        result = POLICY_SCORER(batch, sampling, reference)

        def weighted(values: Tensor) -> Tensor:
            return values.detach() + self.weights.unsqueeze(-1) * (values - values.detach())

        return TokenStatistics(weighted(result.logprobs), result.entropies, weighted(result.kl))


def make(network: Any = POLICY_SCORER, **settings: Any) -> CriticFree:
    args = ReMaxConfig(**{"beta": BETA, "micro_batch_tokens": 10**6, **settings})
    nothing: dict[str, Any] = dict.fromkeys(("policy", "engine", "reward_functions", "reward_weights", "prompts"))
    parts = Components(
        accelerator=SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext),
        reference=REFERENCE_SCORER if args.needs_reference else None,
        reference_placed=None,
        tokenizer=SimpleNamespace(pad_token_id=0),
        sampling=PLAIN,
        eval_prompts=[],
        model_name="enumerated",
        **nothing,
    )
    return CriticFree(parts, args, GradientOnly(network))


def credited(
    method: CriticFree, groups: Sequence[Group], scores: Scores = REWARDS, greedy: float | Sequence[float] | None = None
) -> StepRecord:
    """One step up to its credit: a prompt for each group; greedy: rewards of the completions that were asked for."""
    prompts = [Prompt(i, "x", PROMPT.token_ids) for i in range(len(groups))]
    rows = [
        Completion(prompt, k, tokens, [0.0] * len(tokens), tokens[-1] != EOS)
        for prompt, group in zip(prompts, groups, strict=True)
        for k, tokens in enumerate(group)
    ]
    drawn = [
        Completion(prompt, -1, greedy_completion(), [0.0], False)
        for prompt, wanted in zip(prompts, method.greedy_wanted(prompts), strict=True)
        if wanted
    ]
    own = scores[tuple(greedy_completion())] if greedy is None else greedy
    per_prompt = list(own) if isinstance(own, Sequence) else [own] * len(prompts)
    rollout = Rollout(rows, drawn)
    with float64():
        rewards = Rewards(
            torch.tensor([scores[tuple(c.token_ids)] for c in rows]),
            torch.tensor([per_prompt[c.prompt.index] for c in drawn]),
            {},
            {},
            {},
        )
        credit = method.credit(rollout, rewards)
    return StepRecord(rollout, rewards, credit, method.parts.begin_reference(rollout, method.args)())


def past_groups(num_generations: int) -> list[Group]:
    return [[COMPLETIONS[(7 * i + j) % 40] for j in range(num_generations)] for i in range(3)]


def with_a_past(method: CriticFree) -> dict[str, Any]:
    """Lets one batch pass, and returns what is left of it."""
    credited(
        method, past_groups(method.args.num_generations), greedy=OLDER_POLICY if method.args.greedy_every > 1 else None
    )
    return method.state_dict()


def expected_gradient(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tensor:
    """Minus the update's gradient, summed over all groups of completions times their probabilities."""
    scorer = WeightedScorer()
    method = make(scorer, **settings)
    state = with_a_past(method)
    probabilities = [sequence_logprob(POLICY, tokens).exp().item() for tokens in COMPLETIONS]
    records, weights, weight_of = [], [], {}
    for indices in itertools.product(range(40), repeat=method.args.num_generations):
        method.load_state_dict(state)
        records.append(credited(method, [[COMPLETIONS[i] for i in indices]]))
        weights.append(math.prod(probabilities[i] for i in indices))
        weight_of |= {id(sample): weights[-1] * 40 ** len(indices) for sample in records[-1].rollout.samples}
    assert sum(weights) == pytest.approx(1, abs=1e-12)

    def weighing_collate(completions: Sequence[Completion], *args: Any) -> Batch:
        scorer.weights = torch.tensor([weight_of[id(c)] for c in completions], dtype=torch.float64)
        return collate(completions, *args)

    monkeypatch.setattr(critic_free, "collate", weighing_collate)
    together = StepRecord(
        Rollout([sample for record in records for sample in record.rollout.samples], []),
        records[0].rewards,
        Credit(*(torch.cat(column) for column in zip(*(record.credit for record in records), strict=True))),
        [logprobs for record in records for logprobs in record.ref_logprobs or []] or None,
    )
    method.update(together)
    return -method.policy.gradient


def step_gradient(record: StepRecord, method: CriticFree) -> Tensor:
    method.update(record)
    return -method.policy.gradient


@functools.cache
def oracle(beta: float, clip: str | None = None) -> Tensor:
    return gradient(lambda: objective(PLAIN, beta=beta, clip=clip))


UNBIASED: dict[str, dict[str, Any]] = {
    "reinforce": {"method": "reinforce"},
    "reinforce of two samples": {"method": "reinforce", "num_generations": 2},
    "reinforce, moving average": {"method": "reinforce", "baseline": "moving_average", "num_generations": 2},
    "rloo": {"method": "rloo"},
    "remax": {"num_generations": 1},
    "remax of two samples": {"num_generations": 2},
    "remax, leave-one-out": {"baseline": "leave_one_out"},
    "remax, mixed": {"baseline": "mixed"},
    "remax, cached": {"greedy_every": 3, "num_generations": 2},
    "remax, mixed and cached": {"greedy_every": 3, "baseline": "mixed"},
}


@pytest.mark.parametrize("settings", UNBIASED.values(), ids=UNBIASED.keys())
def test_the_expected_update_is_the_gradient_of_reward_minus_kl(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_close(expected_gradient(monkeypatch, **settings), oracle(BETA))


def test_the_state_of_the_enumerated_methods_is_no_trivial_one() -> None:
    """Otherwise the test above would not see what past batches do."""
    names = ("reinforce, moving average", "remax, mixed", "remax, cached")
    average, mixed, cached = (make(**UNBIASED[name]) for name in names)
    state = with_a_past(average)["baseline"]
    assert abs(state["total"] / state["weight"]) > 0.05
    with_a_past(mixed)
    assert 0.05 < mixed.baseline.alpha < 0.95
    assert mixed.baseline.alpha != 0.5
    with_a_past(cached)
    record = credited(cached, [COMPLETIONS[:2]])
    assert not record.rollout.greedy
    assert record.credit.greedy.tolist() == [OLDER_POLICY] * 2


@pytest.mark.parametrize("method", [{"method": "rloo"}, {"num_generations": 2}, {"baseline": "mixed"}])
def test_with_raw_clipping_the_clipped_reward_takes_the_place_of_the_reward(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = expected_gradient(monkeypatch, reward_clip=CLIP, **method)
    assert_close(actual, oracle(BETA, "raw"))


def test_with_difference_clipping_the_clipped_difference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = expected_gradient(monkeypatch, reward_clip=CLIP, reward_clip_mode="difference")
    assert_close(actual, oracle(BETA, "difference"))


def test_dr_grpo_is_the_gradient_of_the_reward_times_k_minus_1_over_k(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_close(expected_gradient(monkeypatch, method="dr_grpo", kl_mode="none"), oracle(0.0) / 2)


def test_grpo_is_biased_in_direction_too(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = expected_gradient(monkeypatch, method="grpo", kl_mode="none")
    assert torch.cosine_similarity(actual, oracle(0.0), dim=0) < 0.999


# One batch against the formulas ---------------------------------------------------------------------------------------

GROUPS = [[COMPLETIONS[i] for i in indices] for indices in [(0, 2, 9), (25, 39, 3), (1, 17, 30), (33, 4, 5)]]
EIGHTHS = {tokens: round(8 * reward) / 8 for tokens, reward in REWARDS.items()}
"""Exact in float32, and so is every sum of a few."""
PATCHY = {**EIGHTHS, tuple(GROUPS[1][1]): math.nan, tuple(GROUPS[3][0]): math.nan, tuple(GROUPS[3][2]): math.nan}
EXACT_GREEDY = [0.25, -1.25, 0.75, 2.0]
GREEDY = [0.5, -1.25, math.nan, 2.0]

NUM_MISSING = {"reinforce": 3, "moving_average": 3, "dr_grpo": 3, "rloo": 4, "leave_one_out": 4, "grpo": 4} | {
    "greedy": 6,
    "mixed": 7,
}
"""Three rewards are, which leaves one sample without another to compare with; with a greedy reward, three more rows."""


def others(rewards: list[float], k: int) -> float:
    rest = [r for i, r in enumerate(rewards) if i != k and not math.isnan(r)]
    return sum(rest) / len(rest) if rest else math.nan


def literal_advantage(name: str, rewards: list[float], k: int, greedy: float, state: dict[str, float]) -> float:
    """From the definitions; NaN where there is none."""
    present = [r for r in rewards if not math.isnan(r)]
    mean = sum(present) / len(present)
    if name == "grpo":
        if len(present) < 2:
            return math.nan
        deviation = math.sqrt(sum((r - mean) ** 2 for r in present) / (len(present) - 1))
        return (rewards[k] - mean) / (deviation + 1e-4)
    baselines = {
        "reinforce": 0.0,
        "moving_average": state.get("total", 0.0) / state.get("weight", 1.0),
        "rloo": others(rewards, k),
        "leave_one_out": others(rewards, k),
        "greedy": greedy,
        "dr_grpo": mean,
    }
    if name == "mixed":
        alpha = state["products"] / state["squares"]
        return rewards[k] - (1 - alpha) * others(rewards, k) - alpha * greedy
    return rewards[k] - baselines[name]


ALL: dict[str, dict[str, Any]] = {
    "greedy": {},
    "leave_one_out": {"baseline": "leave_one_out"},
    "mixed": {"baseline": "mixed"},
    "reinforce": {"method": "reinforce"},
    "moving_average": {"method": "reinforce", "baseline": "moving_average"},
    "rloo": {"method": "rloo"},
    "grpo": {"method": "grpo"},
    "dr_grpo": {"method": "dr_grpo"},
}
each_method = pytest.mark.parametrize("name", ALL)


@each_method
@pytest.mark.parametrize("kl", ["to_go", "loss"])
@pytest.mark.parametrize("scores", [EIGHTHS, PATCHY], ids=["all rewards", "some missing"])
@pytest.mark.parametrize("micro_batch_tokens", [11, 10**6])
def test_a_batch_follows_the_literal_formula(name: str, kl: str, scores: Scores, micro_batch_tokens: int) -> None:
    method = make(**ALL[name], num_generations=3, kl_mode=kl, micro_batch_tokens=micro_batch_tokens)
    state = with_a_past(method)["baseline"]
    greedy = GREEDY if scores is PATCHY else EXACT_GREEDY
    record = credited(method, GROUPS, scores, greedy)
    literal = [
        literal_advantage(name, [scores[tuple(tokens)] for tokens in group], k, greedy_reward, state)
        for group, greedy_reward in zip(GROUPS, greedy, strict=True)
        for k in range(3)
    ]
    torch.testing.assert_close(
        record.advantages, torch.tensor(literal, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True
    )
    if scores is PATCHY:
        assert sum(map(math.isnan, literal)) == NUM_MISSING[name]

    def objective_of_the_batch() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        kept = [(tokens, a) for tokens, a in zip(itertools.chain(*GROUPS), literal, strict=True) if not math.isnan(a)]
        for tokens, advantage in kept:
            steps, ref_steps = step_logprobs(POLICY, tokens), step_logprobs(REFERENCE, tokens)
            ratios = [(p[y] - q[y]).item() for p, q, y in zip(steps, ref_steps, tokens, strict=True)]
            divisor = len(tokens) if name == "grpo" else 1
            for t, y in enumerate(tokens):
                if kl == "to_go":
                    total = total + steps[t][y] * (advantage - BETA * sum(ratios[t:])) / divisor
                else:
                    exact = (steps[t].exp() * (steps[t] - ref_steps[t].detach())).sum()
                    total = total + (steps[t][y] * advantage - BETA * exact) / divisor
        return total / len(kept)

    assert_close(step_gradient(record, method), gradient(objective_of_the_batch))


def within(number: float) -> float:
    return max(-CLIP, min(CLIP, number))


@each_method
def test_raw_clipping_is_of_samples_and_greedy_rewards_before_all_else(name: str) -> None:
    method = make(**ALL[name], num_generations=3, reward_clip=CLIP)
    state = with_a_past(method)["baseline"]
    if name == "moving_average":
        learned = [within(REWARDS[tuple(tokens)]) for group in past_groups(3) for tokens in group]
        assert state["total"] == pytest.approx(sum(learned) / 9, abs=1e-12)
    actual = credited(method, GROUPS, EIGHTHS, EXACT_GREEDY).advantages.view(4, 3)
    for group, greedy, advantages in zip(GROUPS, EXACT_GREEDY, actual.tolist(), strict=True):
        rewards = [within(EIGHTHS[tuple(tokens)]) for tokens in group]
        expected = [literal_advantage(name, rewards, k, within(greedy), state) for k in range(3)]
        assert advantages == pytest.approx(expected, abs=1e-12)


@each_method
def test_difference_clipping_is_of_the_difference_to_the_baseline_before_grpo_divides(name: str) -> None:
    method = make(**ALL[name], num_generations=3, reward_clip=CLIP, reward_clip_mode="difference")
    state = with_a_past(method)["baseline"]
    actual = credited(method, GROUPS, EIGHTHS, EXACT_GREEDY).advantages.view(4, 3)
    for group, greedy, advantages in zip(GROUPS, EXACT_GREEDY, actual.tolist(), strict=True):
        rewards = [EIGHTHS[tuple(tokens)] for tokens in group]
        centred = "dr_grpo" if name == "grpo" else name
        expected = [within(literal_advantage(centred, rewards, k, greedy, state)) for k in range(3)]
        divisor = statistics.stdev(rewards) + 1e-4 if name == "grpo" else 1.0
        assert advantages == pytest.approx([number / divisor for number in expected], abs=1e-12)


@each_method
def test_only_reinforce_notices_when_all_rewards_of_a_prompt_are_shifted(name: str) -> None:
    gradients = []
    for shifts in ([0.0] * 4, [8.0, -16.0, 32.0, 4.0]):
        method = make(**ALL[name], num_generations=3)
        with_a_past(method)
        shifted = {
            tuple(tokens): EIGHTHS[tuple(tokens)] + shift
            for group, shift in zip(GROUPS, shifts, strict=True)
            for tokens in group
        }
        greedy = [g + shift for g, shift in zip(EXACT_GREEDY, shifts, strict=True)]
        gradients.append(step_gradient(credited(method, GROUPS, shifted, greedy), method))
    change = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    assert change > 1 if name in ("reinforce", "moving_average") else change < 1e-12
