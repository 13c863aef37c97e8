"""Figures that tell of a run gone wrong: each has a bound, and says once when it crosses it.

What is compared is the mean over --alarm_window steps, so that one unusual batch raises no alarm, and nothing is
compared before there are so many. Bounds that are relative are so to the mean of the first --alarm_window steps. An
alarm that was raised is raised again only after the figure has been within its bound meanwhile.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remax.config import GuardOptions

Floats = NDArray[np.float64]

STANDARD_ERRORS = 2.0
"""By how many of them the rewards have to move: by chance, a gold reward that stands still falls so far in 2% of all
comparisons."""
GOLD = "gold"


@dataclass(frozen=True)
class Rule:
    """A figure with its bound."""

    metric: str
    bound: Callable[[GuardOptions, float], float]
    """From the settings and the mean at the start."""
    above: bool
    """Whether the alarm is above the bound, or below."""
    flag: str
    says: str
    advice: str


RULES = {
    "kl": Rule(
        "kl",
        lambda args, start: args.max_kl,
        True,
        "max_kl",
        "the policy runs away from the reference",
        "a higher --beta or a lower --learning_rate",
    ),
    "truncated": Rule(
        "completions/clipped_ratio",
        lambda args, start: max(args.max_truncated, 2 * start),
        True,
        "max_truncated",
        "completions no longer end before the length limit",
        "a reward that does not grow with length, a higher --beta or a larger --max_completion_length",
    ),
    "length": Rule(
        "completions/mean_length",
        lambda args, start: args.max_length_ratio * start,
        True,
        "max_length_ratio",
        "completions become longer and longer",
        "a reward that does not grow with length, or a higher --beta",
    ),
    "entropy": Rule(
        "entropy",
        lambda args, start: args.min_entropy_ratio * start,
        False,
        "min_entropy_ratio",
        "the policy hardly varies what it writes any more",
        "a higher --beta or a lower --learning_rate",
    ),
}


class Alarms:
    """All alarms of a run. What it remembers is plain JSON, so that a resumed run raises the same ones."""

    def __init__(self, args: GuardOptions) -> None:
        self.args = args
        self.first: dict[str, list[float]] = {name: [] for name in RULES}
        """By rule, the values of the first steps."""
        self.last: dict[str, list[float]] = {name: [] for name in RULES}
        """And of the last ones."""
        self.since: dict[str, int] = {}
        """By rule, the first step of all those in a row, up to now, that are beyond the bound by themselves."""
        self.raised: list[str] = []
        self.evaluations: list[dict[str, Any]] = []
        """The last ones: step, and by prompt the reward and the gold reward, None where it is missing."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
        """Returns the alarms of a step, given its metrics; values that are missing or not finite are passed over."""
        found = []
        for name, rule in RULES.items():
            value = metrics.get(rule.metric, math.nan)
            if self.args.alarms != "off" and math.isfinite(value):
                alarm = self._take(name, rule, step, value)
                found += [alarm] if alarm else []
        return found

    def _take(self, name: str, rule: Rule, step: int, value: float) -> dict[str, Any] | None:
        window = self.args.alarm_window
        first, last = self.first[name], self.last[name]
        if len(first) < window:
            first.append(value)
        self.last[name] = last = [*last, value][-window:]
        bound = rule.bound(self.args, sum(first) / len(first))
        mean = sum(last) / len(last)

        def beyond(figure: float) -> bool:
            return figure > bound if rule.above else figure < bound

        if beyond(value):
            self.since.setdefault(name, step)
        else:
            self.since.pop(name, None)
        if len(last) < window or not self._is_new(name, beyond(mean)):
            return None
        since = self.since.get(name, step)
        side = "above" if rule.above else "below"
        message = (
            f"Alarm after step {step}: {rule.says}: {rule.metric} is {mean:.3g} ({_mean_of(window)}), {side} "
            f"the {bound:.3g} of --{rule.flag} {getattr(self.args, rule.flag):g}, since step {since}; what may help is "
            f"{rule.advice}"
        )
        return self._alarm(name, step, since, rule.metric, mean, bound, message)

    def after_evaluation(self, step: int, rewards: Sequence[float], gold: Sequence[float]) -> list[dict[str, Any]]:
        """Returns the alarm of an evaluation, if it raises one.

        rewards, gold: what each prompt got, in the same order every time; NaN where it is missing. Differences are
        taken prompt by prompt, for the same prompts with the same noise are judged each time.
        """
        if self.args.alarms == "off":
            return []
        number = self.args.gold_evaluations
        self.evaluations.append({"step": step, "reward": _plain(rewards), "gold": _plain(gold)})
        self.evaluations = self.evaluations[-number:]
        if len(self.evaluations) < number:
            return []
        before, now = self.evaluations[0], self.evaluations[-1]
        rise, rise_error = _difference(before["reward"], now["reward"])
        fall, fall_error = _difference(now["gold"], before["gold"])
        apart = rise > STANDARD_ERRORS * rise_error and fall > STANDARD_ERRORS * fall_error
        if not self._is_new(GOLD, apart):
            return []
        message = (
            f"Alarm after step {step}: the policy learns to please the reward and not what it stands for: since the "
            f"evaluation after step {before['step']} eval/reward rose by {rise:.3g} (standard error {rise_error:.2g}) "
            f"and eval/gold fell by {fall:.3g} ({fall_error:.2g}); what may help is a higher --beta, a better reward "
            "model, or to stop there"
        )
        bound = -STANDARD_ERRORS * fall_error
        return [self._alarm(GOLD, step, before["step"], "eval/gold", -fall, bound, message)]

    def _is_new(self, name: str, beyond: bool) -> bool:
        """Whether an alarm is to be raised now; remembers that it was until the figure is within its bound."""
        new = beyond and name not in self.raised
        if new:
            self.raised.append(name)
        elif not beyond and name in self.raised:
            self.raised.remove(name)
        return new

    def _alarm(
        self, name: str, step: int, since: int, metric: str, value: float, bound: float, message: str
    ) -> dict[str, Any]:
        about = {"metric": metric, "value": value, "threshold": bound, "since_step": since}
        return {"step": step, "event": "alarm", "alarm": name, **about, "message": message}

    def state_dict(self) -> dict[str, Any]:
        """Returns what the alarms to come depend on."""
        return {
            "first": {name: list(values) for name, values in self.first.items()},
            "last": {name: list(values) for name, values in self.last.items()},
            "since": dict(self.since),
            "raised": list(self.raised),
            "evaluations": list(self.evaluations),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.first = {name: list(values) for name, values in state["first"].items()}
        self.last = {name: list(values) for name, values in state["last"].items()}
        self.since, self.raised = dict(state["since"]), list(state["raised"])
        self.evaluations = list(state["evaluations"])


def _mean_of(window: int) -> str:
    return "in one step" if window == 1 else f"mean of {window} steps"


def _plain(values: Sequence[float]) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _difference(before: Sequence[float | None], now: Sequence[float | None]) -> tuple[float, float]:
    """Returns the mean of what was added to each value that is there both times, and its standard error."""
    changes = np.asarray(now, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    changes = changes[np.isfinite(changes)]
    if len(changes) < 2:
        return 0.0, math.inf
    return float(changes.mean()), float(changes.std(ddof=1) / math.sqrt(len(changes)))
