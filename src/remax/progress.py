"""What a run shows while it goes on: one live panel in a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from remax.interfaces import Completion
from remax.untrusted import printable

SHOWN = {
    "reward": "reward, sampled",
    "reward/greedy": "reward, greedy",
    "kl": "KL, nats per sequence",
    "entropy": "entropy, nats per token",
    "completions/mean_length": "length, tokens",
    "grad_norm": "gradient norm",
}
SECONDS_BETWEEN_SAMPLES = 5.0


class View(Protocol):
    """Shows the progress of a run."""

    def start(self, max_steps: int, step: int = 0) -> None:
        """Begins the display of a run that has done some steps already."""

    def update(self, metrics: Mapping[str, float], sample: Completion) -> None:
        """Takes one step's metrics and one of its completions."""

    def note(self, line: str) -> None:
        """Shows a line that stays."""

    def stop(self) -> None:
        """Ends the display; may be called twice."""


def default_view() -> View:
    """Returns the live panel if standard output is a terminal, else plain lines."""
    return LivePanel() if sys.stdout.isatty() else PlainLines()


class NoView:
    """Shows nothing."""

    def start(self, max_steps: int, step: int = 0) -> None:
        """A training begins."""

    def update(self, metrics: Mapping[str, float], sample: Completion) -> None:
        """A step is done."""

    def note(self, line: str) -> None:
        """There is something to say."""

    def stop(self) -> None:
        """The training ends."""


class _Clock:
    """Steps done, seconds per step and seconds left."""

    def __init__(self, max_steps: int, step: int) -> None:
        self.max_steps, self.first_step = max_steps, step
        self.started = time.monotonic()

    def read(self, step: int) -> tuple[float, str]:
        """Returns seconds per step and the time left as text."""
        per_step = (time.monotonic() - self.started) / max(1, step - self.first_step)
        minutes, seconds = divmod(round(per_step * (self.max_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return per_step, f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class PlainLines:
    """One line per logged step, for files and pipes."""

    def start(self, max_steps: int, step: int = 0) -> None:
        self.clock = _Clock(max_steps, step)

    def update(self, metrics: Mapping[str, float], sample: Completion) -> None:
        step = int(metrics["step"])
        per_step, left = self.clock.read(step)
        parts = [f"step {step}/{self.clock.max_steps}"]
        names = {"reward": "reward", "reward/greedy": "greedy", "kl": "kl", "completions/mean_length": "length"}
        parts += [f"{short} {metrics[name]:.3g}" for name, short in names.items() if name in metrics]
        parts += [f"{per_step:.2f} s/step", f"{left} left"]
        print("  ".join(parts), flush=True)

    def note(self, line: str) -> None:
        print(printable(line), flush=True)

    def stop(self) -> None:
        pass


class LivePanel:
    """One panel that is redrawn in place: progress, metrics at the start and now, time by phase, a sample."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live: Live | None = None

    def start(self, max_steps: int, step: int = 0) -> None:
        self.clock = _Clock(max_steps, step)
        self.first: Mapping[str, float] = {}
        self.sample: Completion | None = None
        self.sample_time = 0.0
        self.live = Live(Panel("rolling out the first batch"), console=self.console, refresh_per_second=4)
        self.live.start()

    def update(self, metrics: Mapping[str, float], sample: Completion) -> None:
        self.first = self.first or metrics
        if time.monotonic() - self.sample_time > SECONDS_BETWEEN_SAMPLES:
            self.sample, self.sample_time = sample, time.monotonic()
        if self.live is not None:
            self.live.update(self._panel(metrics))

    def note(self, line: str) -> None:
        self.console.print(Text(printable(line)))

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _panel(self, metrics: Mapping[str, float]) -> Panel:
        step = int(metrics["step"])
        per_step, left = self.clock.read(step)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step {step}/{self.clock.max_steps}",
            ProgressBar(total=self.clock.max_steps, completed=step, width=30),
            f"{left} left",
            f"{per_step:.2f} s/step",
            f"{metrics.get('tokens_per_second', 0.0):,.0f} tokens/s",
        )
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for title in ("", "first step", "now"):
            table.add_column(title, justify="left" if not title else "right")
        for name, title in SHOWN.items():
            if name in metrics:
                table.add_row(title, f"{self.first.get(name, float('nan')):.3f}", f"{metrics[name]:.3f}")
        phases = "   ".join(
            f"{name.removeprefix('time/')} {seconds:.2f} s"
            for name, seconds in metrics.items()
            if name.startswith("time/")
        )
        parts: list[RenderableType] = [head, table, Text(phases, style="dim")]
        if self.sample is not None:
            prompt = self.sample.prompt.content
            prompt = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
            text = Text(printable(prompt[-200:]), style="dim")
            text.append(printable(self.sample.text[:600]), style="not dim bold")
            parts.append(Panel(text, title="a sample", title_align="left", border_style="dim"))
        return Panel(Group(*parts), title="remax", title_align="left")
