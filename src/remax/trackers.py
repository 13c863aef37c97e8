"""Where metrics and completions go beside the run's folder: trackers, through Accelerate, in the main process alone."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from remax.config import DPOConfig, ReMaxConfig, RewardConfig, SFTConfig
from remax.errors import GuardStop, Interrupted, UserError
from remax.recording import RunFolder, write_json
from remax.untrusted import CREDENTIALS, shown

FILE = "trackers.json"
"""In the run's folder: what trackers call the run, so that a run that is resumed goes on there too."""
MAX_TABLES, MAX_ROWS, MAX_CHARACTERS = 50, 32, 2000
"""Tables of a run, completions of a table, characters of a text: completions.jsonl has all of them."""
FAILURES_IN_A_ROW = 3
"""A tracker that cannot be reached makes every step wait; after so many it is left alone."""
PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "trackio": "TRACKIO_PROJECT",
}
SECRET = re.compile(r"(^|_)(token|password|secret|api_key)$")

Row = Mapping[str, Any]


class Trackers:
    """The trackers of --report_to; none of what goes wrong in them after the start ends a training."""

    def __init__(
        self,
        args: ReMaxConfig | SFTConfig | RewardConfig | DPOConfig,
        folder: RunFolder,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Takes the settings; starts nothing. Who does not write the folder does not track either. say: shows a line.

        Raises:
            UserError: a tracker is not installed, or Weights & Biases would ask for a key that nobody can type.
        """
        _check_installed(args.report_to)
        self.args, self.folder, self.say = args, folder.path, say
        self.names = [name for name in args.report_to if name != "none"] if folder.writes else []
        self.running: list[Any] = []
        self._failures: dict[str, int] = {}
        if "wandb" in self.names:
            _check_wandb()

    def start(self, accelerator: Accelerator, settings: Mapping[str, Any], *, step: int, max_steps: int) -> None:
        """Begins a run in every tracker, or goes on with the one that this training had there.

        step: how many are done. The trackers can be had from accelerator.get_tracker then.

        Raises:
            UserError: one cannot be started.
        """
        self.table_steps = max(self.args.logging_steps, -(-max_steps // MAX_TABLES))
        known = self._known()
        for name in self.names:
            try:
                tracker = LOGGER_TYPE_TO_CLASS[name](**self._arguments(name, known.get(name), step))
                tracker.start()
                accelerator.trackers.append(tracker)
                self.running.append(tracker)
                if name not in known:  # MLflow takes a setting once only.
                    tracker.store_init_configuration(public_settings(settings))
            except Exception as error:
                raise UserError(
                    f"--report_to is {name}: it could not be started ({type(error).__name__}: {shown(error, 300)}); "
                    f"correct that, or leave {name} out of --report_to."
                ) from error
            known[name] = _id_of(tracker)
        if self.names:
            write_json(self.folder / FILE, known)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs what is finite of the metrics."""
        values = {name: value for name, value in metrics.items() if name != "step" and math.isfinite(value)}
        self._each(lambda tracker: tracker.log(_renamed(values, tracker.name), step=step))

    def log_completions(self, records: Callable[[], Sequence[Row]], step: int) -> None:
        """Logs a step's completions as a table, where the tracker has tables, every now and then.

        records: returns them as in completions.jsonl.
        """
        if self.running and (step == 1 or step % self.table_steps == 0):
            columns = table_of(records()[:MAX_ROWS])
            self._each(lambda tracker: _log_table(tracker, columns, step))

    def finish(self, error: BaseException | None = None) -> None:
        """Ends the run in every tracker, as failed if an error ended it. May be called twice."""
        running, self.running = self.running, []
        for tracker in running:
            try:
                _finish(tracker, error)
            except Exception as failure:
                self.say(f"Warning: --report_to {tracker.name}: the run could not be ended there ({shown(failure)}).")

    def _each(self, log: Callable[[Any], None]) -> None:
        for tracker in list(self.running):
            try:
                log(tracker)
                self._failures[tracker.name] = 0
            except Exception as error:
                failures = self._failures[tracker.name] = self._failures.get(tracker.name, 0) + 1
                if failures == 1:
                    reason = f"{type(error).__name__}: {shown(error)}"
                    self.say(f"Warning: --report_to {tracker.name}: something was not logged ({reason}).")
                if failures == FAILURES_IN_A_ROW:
                    self.say(f"Warning: --report_to {tracker.name}: nothing more is logged there.")
                    self.running.remove(tracker)

    def _known(self) -> dict[str, str]:
        """Returns what trackers called this run before it was resumed."""
        try:
            return dict(json.loads((self.folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _arguments(self, name: str, known: str | None, step: int) -> dict[str, Any]:
        """Returns what Accelerate's class for the tracker is made with."""
        project = self.args.project or os.environ.get(PROJECT_VARIABLES.get(name, "")) or "remax"
        run_name = self.args.run_name or self.folder.resolve().name
        if name == "tensorboard":
            purge = {"purge_step": step + 1} if step else {}
            return {"run_name": "tensorboard", "logging_dir": str(self.folder), **purge}
        if name == "wandb":
            place = {} if "WANDB_DIR" in os.environ else {"dir": str(self.folder)}
            resumed = {"id": known, "resume": "allow"} if known else {}
            return {"run_name": project, "name": run_name, **place, **resumed}
        if name == "mlflow":
            # The variable is looked at by Accelerate too, and would win over --project.
            if self.args.project:
                os.environ.pop(PROJECT_VARIABLES["mlflow"], None)
            return {"experiment_name": project, "run_name": run_name, "run_id": known}
        if name == "trackio":
            return {"run_name": project, "name": run_name, "resume": "allow", "embed": False}
        return {"run_name": project}


def public_settings(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Returns the settings as trackers take them: what is no number as text; what is not set, or secret, left out."""
    return {
        name: value if isinstance(value, bool | int | float) else CREDENTIALS.sub("***@", str(value))
        for name, value in settings.items()
        if value not in (None, []) and not SECRET.search(name)
    }


def table_of(records: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns columns of equal length, each of numbers and None alone or of texts alone."""
    rows = [{**record, **{f"rewards/{name}": value for name, value in record["rewards"].items()}} for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "rewards"))
    return {name: _column([row.get(name) for row in rows]) for name in names}


def _column(values: list[Any]) -> list[Any]:
    if all(value is None or isinstance(value, int | float) for value in values):
        return [None if value is None or not math.isfinite(value) else value for value in values]
    return [_text(value)[:MAX_CHARACTERS] for value in values]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# What differs between trackers ----------------------------------------------------------------------------------------


def _check_installed(report_to: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not there."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to:
        if name not in (*available, "none"):
            raise UserError(
                f"--report_to is {name}: that is no tracker that is installed here, so nothing would be tracked; "
                f"set {' or '.join(available)}, or none."
            )


def _check_wandb() -> None:
    """Raises UserError if Weights & Biases would ask for a key, and there is nobody to be asked."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared") or sys.stdin.isatty():
        return
    wandb: Any = import_module("wandb")
    advice = "set the environment variable WANDB_API_KEY to one that works (wandb login), or WANDB_MODE=offline"
    try:
        found = wandb.login(prompt=False)
    except TypeError:  # A release that cannot look for a key without asking: then the start of the run will tell.
        return
    except Exception as error:
        raise UserError(
            f"--report_to is wandb: Weights & Biases cannot be logged in to ({shown(error, 200)}), so nothing would be "
            f"tracked; {advice}."
        ) from error
    if not found:
        raise UserError(
            f"--report_to is wandb: there is no key for Weights & Biases here, so nothing would be tracked; {advice}."
        )


def _renamed(values: Mapping[str, float], tracker: str) -> dict[str, float]:
    """Returns the metrics under names that the tracker takes.

    MLflow has a narrow alphabet, and its store of files takes a/b for a file in a folder, which a metric `a` excludes.
    """
    if tracker != "mlflow":
        return dict(values)
    return {re.sub(r"[^\w. -]", "_", name.replace("/", "."), flags=re.ASCII): value for name, value in values.items()}


def _log_table(tracker: Any, columns: Mapping[str, list[Any]], step: int) -> None:
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    if tracker.name == "wandb":
        tracker.log_table("completions", columns=list(columns), data=rows, step=step)
    elif tracker.name == "tensorboard":
        tracker.writer.add_text("completions", _markdown(list(columns), rows), global_step=step)
        tracker.writer.flush()
    elif tracker.name == "mlflow":
        file, run_id = f"completions/step-{step:06d}.json", tracker.tracker.info.run_id
        import_module("mlflow").log_table(data=dict(columns), artifact_file=file, run_id=run_id)
    elif tracker.name == "trackio":
        table = import_module("trackio").Table(dataframe=import_module("pandas").DataFrame(dict(columns)))
        tracker.log({"completions": table}, step=step)


def _markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """Returns a table in Markdown; what could mean something there, or in HTML, is spelled as an entity."""
    cells = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(value if value == "---" else _cell(value) for value in row) + "|" for row in cells)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return re.sub(r"[\\`*_\[\]<>|&#!~]", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


def _id_of(tracker: Any) -> str:
    if tracker.name == "wandb":
        return str(tracker.run.id)
    return str(tracker.tracker.info.run_id) if tracker.name == "mlflow" else ""


def _finish(tracker: Any, error: BaseException | None) -> None:
    stopped = isinstance(error, KeyboardInterrupt | Interrupted | GuardStop)
    if tracker.name == "wandb":
        tracker.run.finish(exit_code=0 if error is None else 1)
    elif tracker.name == "mlflow":
        import_module("mlflow").end_run("FINISHED" if error is None else "KILLED" if stopped else "FAILED")
    else:
        tracker.finish()
