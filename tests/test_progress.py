"""What a run shows: the live panel, plain lines, and that a completion cannot steer the terminal."""

import io
from typing import Any

from rich.console import Console

from remax.interfaces import Completion, Prompt
from remax.progress import LivePanel, PlainLines, printable

HOSTILE = "\x1b[2J[bold red]gone[/] \x07 ok"


def metrics(step: int, reward: float) -> dict[str, float]:
    return {
        "step": step,
        "reward": reward,
        "reward/greedy": 0.25,
        "kl": 1.5,
        "completions/mean_length": 12.0,
        "tokens_per_second": 4321.0,
        "time/rollout": 0.5,
    }


def sample(text: str) -> Completion:
    return Completion(Prompt(0, "Once [link]", [1]), 0, [2], [0.0], truncated=False, text=text)


def test_the_panel_shows_progress_first_and_current_values_phases_and_a_sample() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    panel = LivePanel(console)
    panel.start(10)
    panel.update(metrics(1, -0.125), sample("a tale"))
    panel.update(metrics(2, 0.875), sample(HOSTILE))
    shown = Console(file=io.StringIO(), width=100, record=True)
    assert panel.live is not None
    shown.print(panel.live.renderable)
    panel.stop()
    panel.stop()
    text = shown.export_text()
    parts = ("step 2/10", "left", "s/step", "4,321 tokens/s", "-0.125", "0.875", "rollout 0.50 s", "[link]")
    for part in parts:
        assert part in text, part
    assert "a tale" in text, "samples change only every few seconds"


def test_control_characters_and_markup_of_completions_are_shown_not_obeyed() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    panel = LivePanel(console)
    panel.start(10)
    panel.update(metrics(1, 0.0), sample(HOSTILE))
    shown = Console(file=io.StringIO(), width=100, record=True)
    assert panel.live is not None
    shown.print(panel.live.renderable)
    panel.stop()
    text = shown.export_text()
    assert "[bold red]gone[/]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert printable("a\nb\x1b[0m\u202e") == "a\nb\ufffd[0m\ufffd"


def test_plain_lines(capsys: Any) -> None:
    lines = PlainLines()
    lines.start(2)
    lines.update(metrics(1, 0.5), sample("x"))
    lines.update({"step": 2, "completions/mean_length": 3.0}, sample("x"))
    lines.stop()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2  reward 0.5  greedy 0.25  kl 1.5  length 12  ")
    assert second.startswith("step 2/2  length 3  ")
    assert second.endswith("0:00 left")
