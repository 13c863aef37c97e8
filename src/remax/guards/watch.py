"""The guards beside a training: what they count, what they say, what a resumed run has to know."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remax.checkpoint.writer import FAILURES
from remax.components import Components
from remax.config import ReMaxConfig
from remax.errors import GuardStop
from remax.evaluate import Evaluation
from remax.guards.alarms import Alarms
from remax.guards.dumps import write_dump
from remax.guards.finite import SkipCount, Skipped
from remax.methods import PPO, Method
from remax.metrics import StepRecord
from remax.sharding import trainable_weights


class Guards:
    """Watches a training. Every piece of news is a line of alarms.jsonl; `said` is what the user reads of it."""

    def __init__(
        self,
        args: ReMaxConfig,
        parts: Components,
        method: Method,
        folder: Path,
        config: Mapping[str, Any],
        last_checkpoint: Callable[[], Path | None],
    ) -> None:
        """folder: of the run, which has the dumps. config: the settings of the run, which dumps name."""
        self.args, self.parts, self.method, self.folder, self.config = args, parts, method, folder, config
        self.last_checkpoint = last_checkpoint
        self.memory = parts.memory
        self.skips = SkipCount(args.max_skipped_steps)
        self.alarms = Alarms(args)
        self._dump: dict[str, Any] = {}
        self._stop: str | None = None
        method.on_skip = self._keep

    def _keep(self, record: StepRecord, skipped: Skipped) -> None:
        """Takes note of an update that was not taken; of a step's first one, a dump is written."""
        record.skipped.append(skipped)
        if len(record.skipped) > 1:
            return
        writes = self.parts.processes.is_main
        weights = {"policy": trainable_weights(self.parts.policy, keeps=writes)}
        if isinstance(self.method, PPO) and skipped.network == "value":
            weights["value_model"] = trainable_weights(self.method.critic.module, keeps=writes)
        facts = {
            "config": {"model": self.parts.model_name, **dataclasses.asdict(self.args), **self.config},
            "seed": self.args.seed,
            "sampling": dataclasses.asdict(self.parts.sampling),
            "micro_batch_tokens": self.memory.size("micro_batch_tokens", self.args.micro_batch_tokens),
        }
        if not writes:
            return
        try:
            path = write_dump(self.folder, record, skipped, weights, facts)
        except FAILURES as error:
            self._dump = {"dump": None, "dump_failed": str(error)}
        else:
            self._dump = {"dump": path and path.relative_to(self.folder).as_posix()}

    def count(self, record: StepRecord) -> dict[str, float]:
        """Takes a step into account and returns its metrics: skipped steps and passes that were redone, so far."""
        self.skips.count(skipped=bool(record.skipped))
        return {"skipped_steps": self.skips.num_skipped, "redone_passes": self.memory.num_redone}

    def after_step(self, record: StepRecord, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
        """Returns the news of a step."""
        news = self.take_news(record.step)
        if record.stop is not None:
            self._stop = str(record.stop)
        if record.skipped:
            news.append(self._skipped(record))
        return news + self._raised(self.alarms.after_step(record.step, metrics))

    def after_evaluation(self, step: int, evaluation: Evaluation) -> list[dict[str, Any]]:
        """Returns the news of an evaluation."""
        news, values = self.take_news(step), evaluation.values
        if "gold" in values:
            news += self._raised(self.alarms.after_evaluation(step, values["reward"].tolist(), values["gold"].tolist()))
        return news

    def take_news(self, step: int) -> list[dict[str, Any]]:
        """Returns what was redone for lack of memory since the last call."""
        news = [{"step": step, **own} for own in self.memory.news]
        self.memory.news.clear()
        return news

    def _skipped(self, record: StepRecord) -> dict[str, Any]:
        step, number = record.step, len(record.skipped)
        causes = list(dict.fromkeys(skipped.cause for skipped in record.skipped))
        what = f"{' and '.join(causes)} {'is' if len(causes) == 1 else 'are'} not finite"
        which = f"{number} of the updates of step {step}" if isinstance(self.method, PPO) else f"step {step}"
        about = {"causes": causes, "updates": number, "in_a_row": self.skips.in_a_row, **self._dump}
        message = f"Skipped {which} because {what}: the weights stay as they are"
        news = {"step": step, "event": "skipped", **about, "message": message}
        if self.skips.too_many:
            flag = "learning_rate" if record.skipped[0].network == "policy" else "value_learning_rate"
            in_a_row = f"{self.skips.in_a_row} step{'s in a row' * (self.skips.in_a_row > 1)} skipped"
            self._stop = (
                f"{in_a_row}, and --max_skipped_steps is {self.args.max_skipped_steps}: {what}{self._paths(news)}; set "
                f"what that shows, such as a lower --{flag} or more --warmup_steps, and go on from the last checkpoint "
                "before."
            )
        return news

    def _raised(self, alarms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if alarms:
            checkpoint = self.last_checkpoint()  # Not without alarms: it may have to be waited for.
            for alarm in alarms:
                alarm["last_checkpoint"] = checkpoint and checkpoint.relative_to(self.folder).as_posix()
            if self.args.alarms == "stop":
                self._stop = f"--alarms is stop: {alarms[0]['message']}{self._paths(alarms[0])}."
        return alarms

    def said(self, news: Mapping[str, Any]) -> str:
        """Returns what the user reads: one sentence, with the paths that belong to it."""
        return f"{news['message']}{self._paths(news)}."

    def _paths(self, news: Mapping[str, Any]) -> str:
        """Returns what of a sentence has the path of the run's folder, which differs between equal runs."""
        clauses = ""
        if news.get("dump"):
            clauses += f"; `remax replay {self.folder / news['dump']}` takes it apart"
        elif "dump_failed" in news:
            clauses += f"; its batch could not be kept ({news['dump_failed']})"
        if news["event"] == "alarm":
            saved = news["last_checkpoint"]
            clauses += f"; the last checkpoint is {self.folder / saved}" if saved else "; there is no checkpoint yet"
        return clauses

    def stop_if_needed(self) -> None:
        """Raises GuardStop if one of the guards stops the run; to be called when a step is recorded in full."""
        reason, self._stop = self._stop, None
        if reason is not None:
            raise GuardStop(reason, known_to_all=True)  # All have seen the whole step.

    def state_dict(self) -> dict[str, Any]:
        """Returns what the news of the next steps depend on; plain JSON."""
        return {
            "memory": self.memory.state_dict(),
            "skips": self.skips.state_dict(),
            "alarms": self.alarms.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.memory.load_state_dict(state["memory"])
        self.skips.load_state_dict(state["skips"])
        self.alarms.load_state_dict(state["alarms"])
