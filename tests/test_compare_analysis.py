"""What a comparison says about its runs: the results, the table, pictures and page."""

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from remax.compare.analysis import analyse
from remax.compare.plots import _draw_cost, _draw_path, _looks, aligned, plot
from remax.compare.records import Run
from remax.compare.results import collect
from remax.compare.tables import headline, markdown_table, print_table
from remax.errors import UserError

HOSTILE = '$\\frac{$</title><script>alert(1)</script>"><img src=http://x onerror=y> [red]|\x1b[2J'


# --- a comparison on disk ---------------------------------------------------------------------------------------------


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_comparison(folder: Path, methods: Sequence[str], seeds: Sequence[int], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    comparison = {
        "budget": {"unit": "prompts", "amount": 64},
        "methods": {label: {"method": label, "learning_rate": 1e-3} for label in methods},
        "seeds": list(seeds),
        "shared": {"batch_size": 32},
        "model": "tiny",
        "reward": "learned",
        "gold": "hidden",
        "hardware": {"cores": 2},
        "versions": {"torch": "2"},
        "commit": None,
        "command": "remax compare --config x.yaml",
    }
    (folder / "comparison.json").write_text(json.dumps(comparison | more), encoding="utf-8")
    lengths = [{"prompt_index": i, "length": 10 + i, "reward": -0.5, "gold": None} for i in range(3)]
    write_lines(folder / "initial_samples.jsonl", lengths)
    return folder


def write_run(
    folder: Path, label: str, seed: int, reward: float, gold: float | None, *, memory: bool = True, **summary: Any
) -> None:
    home = folder / "runs" / label / f"seed{seed}"
    home.mkdir(parents=True)
    evaluations = []
    for step in (0, 1, 2):
        spent = {"step": step, "prompts": 32 * step, "tokens": 100 * step + 7 * seed * step, "seconds": 1.5 * step}
        values = {"reward": reward * step / 2, "reward/greedy": reward, "kl": step / 2, "length": 11.0, "entropy": None}
        evaluations.append(spent | values | {"gold": None if gold is None else gold * step / 2})
    write_lines(home / "evaluations.jsonl", evaluations)
    steps = [
        {"step": 1, "time/rollout": 9.0, "time/reward": 0.1, "time/update": 0.3, "time/step": 9.9, "kl": None},
        {"step": 2, "time/rollout": 0.5, "time/reward": 0.1, "time/update": 0.3, "time/step": 1.0},
        {"step": 3, "time/rollout": 0.4, "time/reward": 0.1, "time/update": 0.3, "time/step": 0.9},
    ]
    if memory:
        for record, peak in zip(steps, (2**30, 3 * 2**30, 2**30), strict=True):
            record |= {"memory/rollout": peak, "memory/reward": 2**29, "memory/update": 2**31}
    write_lines(home / "metrics.jsonl", steps)
    samples = [{"prompt_index": i, "length": 10 + 2 * i, "reward": reward + 0.1 * i, "gold": gold} for i in range(3)]
    write_lines(home / "final_samples.jsonl", [*samples, {"prompt_index": 3, "length": 5, "reward": None}])
    finished = {"finished": True, "steps": 2, "prompts": 64, "tokens": 200, "seconds": 3.0, "parameters": 10}
    (home / "run.json").write_text(json.dumps({"label": label, "seed": seed} | finished | summary), encoding="utf-8")


def strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def nothing_missing(folder: Path) -> Path:
    write_comparison(folder, ["remax", "other"], [0, 1, 2], hyperparameters={"remax": [], "other": ["clip"]})
    for seed, (ours, theirs) in enumerate([(1.0, 1.5), (2.0, 2.25), (6.0, 6.75)]):
        write_run(folder, "remax", seed, ours, 0.5)
        write_run(folder, "other", seed, theirs, 0.5 + 0.25 * (seed == 0), seconds=None)
    return folder


def test_results_hold_the_exact_figures(tmp_path: Path) -> None:
    results = collect(nothing_missing(tmp_path))
    assert strictly((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    remax, other = results["methods"]["remax"], results["methods"]["other"]
    assert (remax["seeds"], remax["hyperparameters"], other["hyperparameters"]) == ([0, 1, 2], [], ["clip"])
    assert other["settings"] == {"method": "other", "learning_rate": 1e-3}
    assert remax["metrics"]["reward"] == {
        "mean": 3.0,
        "mean_interval": [1.0, 6.0],
        "iqm": pytest.approx((0.25 * 1 + 2 + 0.25 * 6) / 1.5),
        "iqm_interval": [1.0, 6.0],
        "values": [1.0, 2.0, 6.0],
    }
    assert remax["metrics"]["time/step"]["mean"] == 1.0, "the slow first step does not count"
    assert remax["metrics"]["time/rollout"]["mean"] == 0.5
    assert remax["metrics"]["memory/rollout"]["mean"] == remax["metrics"]["memory/peak"]["mean"] == 3 * 2**30
    assert remax["metrics"]["memory/reward"]["mean"] == 2**29
    assert remax["metrics"]["entropy"] == {
        **dict.fromkeys(("mean", "mean_interval", "iqm", "iqm_interval")),
        "values": [None] * 3,
    }
    assert remax["metrics"]["seconds"]["mean"] == 3.0
    assert other["metrics"]["seconds"]["mean"] is None
    # Rewards rise by 0.05 a token around 12 tokens; the reference is 11 tokens: 0.1 of the mean at 12 goes, 0.05 stays.
    assert results["length_control"]["reward"]["slope"]["value"] == pytest.approx(0.05)
    assert results["length_control"]["gold"]["slope"]["value"] == pytest.approx(0.0, abs=1e-12)
    assert remax["metrics"]["reward/length_controlled"]["values"] == pytest.approx([1.05, 2.05, 6.05])
    assert remax["metrics"]["reward/length_controlled"]["mean"] == pytest.approx(3.05)
    assert results["initial"] == {"num_samples": 3, "reward": -0.5, "gold": None, "length": 11.0}
    assert results["missing"] == []


def test_methods_are_compared_with_the_first_seed_by_seed(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["remax", "other"], [0, 1, 2])
    for seed, value in {0: 1.0, 1: 10.0}.items():
        write_run(tmp_path, "remax", seed, value, None)
    for seed, value in {1: 11.0, 2: 0.0}.items():
        write_run(tmp_path, "other", seed, value, None)
    results = collect(tmp_path)
    assert results["missing"] == [{"label": "remax", "seed": 2}, {"label": "other", "seed": 0}]
    [pair] = results["pairwise"]
    assert (pair["label"], pair["against"]) == ("other", "remax")
    reward = pair["metrics"]["reward"]
    assert reward["difference"] == {"value": 1.0, "interval": None, "seeds": [1]}
    assert reward["probability_of_improvement"]["value"] == 2 / 4
    assert pair["metrics"]["gold"] is None
    notes = " ".join(results["notes"])
    assert "remax seed 2, other seed 0" in notes
    assert "no gold reward" in notes
    assert "same sign with probability 50%" in notes


def test_unequal_spending_is_told(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["remax", "other"], [0])
    write_run(tmp_path, "remax", 0, 1.0, 1.0)
    write_run(tmp_path, "other", 0, 1.0, 1.0, prompts=32)
    assert "other spent 32 of a budget of 64 prompts: the methods are not on a par." in collect(tmp_path)["notes"]


def test_what_is_not_finite_or_not_there_is_null(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["remax"], [0, 1], hardware={"speed": math.nan})
    write_run(tmp_path, "remax", 0, math.inf, math.nan, memory=False)
    write_run(tmp_path, "remax", 1, 2.0, None, memory=False)
    (tmp_path / "initial_samples.jsonl").unlink()
    results = collect(tmp_path)
    assert strictly((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    metrics = results["methods"]["remax"]["metrics"]
    assert metrics["reward"]["values"] == [None, 2.0]
    assert metrics["reward"]["mean"] == 2.0
    assert metrics["reward"]["mean_interval"] is None
    assert metrics["memory/peak"]["mean"] is metrics["gold"]["mean"] is results["hardware"]["speed"] is None
    assert results["length_control"] == {"reward": None, "gold": None}


def test_damaged_files_and_folders_without_a_comparison_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no comparison \(no comparison.json\)"):
        collect(tmp_path)
    folder = nothing_missing(tmp_path)
    with (folder / "runs/remax/seed1/evaluations.jsonl").open("a") as file:
        file.write('{"step": 3')
    with pytest.raises(UserError, match=r"seed1/evaluations.jsonl, line 4 is damaged"):
        collect(folder)


# --- table and headline -----------------------------------------------------------------------------------------------


def printed(results: Mapping[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    print_table(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_fits_120_characters_and_cuts_nothing(tmp_path: Path) -> None:
    labels = ["remax", "x" * 50, HOSTILE.replace("/", "|")]
    write_comparison(tmp_path, labels, [0, 1])
    for label, seed in itertools.product(labels, (0, 1)):
        write_run(tmp_path, label, seed, -0.1234 - seed, -0.9876 + seed / 2)
    results = collect(tmp_path)
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 120
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("x" * 18) >= 2, "folded, not cut"
    assert "[red]" in text
    assert "\x1b[2J" not in text
    assert "-1.12 to -0.12" in text
    assert "-0.988 to -0.488" in text
    assert "3.00" in text, "GiB"


def test_what_is_unknown_is_a_dash_or_no_column(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["remax", "later"], [0])
    write_run(tmp_path, "remax", 0, 0.5, None, memory=False)
    results = collect(tmp_path)
    [row] = [line for line in markdown_table(results).splitlines() if line.startswith("| later")]
    assert set(row.removeprefix("| later").split()) == {"|", "0", "\N{EN DASH}"}
    text = printed(results)
    assert "gold reward\n" not in text
    assert "memory " not in text
    assert "0.500" in text


def test_markdown_shows_hostile_labels_as_text(tmp_path: Path) -> None:
    write_comparison(tmp_path, ["remax", "a|b\n<i>*c*"], [0])
    rows = markdown_table(collect(tmp_path)).splitlines()
    assert rows[3].startswith("| a\\|b \\<i\\>\\*c\\* | 0 |")


@pytest.mark.parametrize(
    ("remax", "other", "expected"),
    [
        (
            [1.0, 2.0, 6.0],
            [1.5, 2.25, 6.75],
            "After 64 prompts, other reaches a gold reward of 3.50 (1.50 to 6.75), the highest of 2 methods; the "
            "difference to remax is 0.50 (0.25 to 0.75), beyond the spread of the seeds, but 3 seeds are few.",
        ),
        (
            [1.5, 2.25, 6.75],
            [1.0, 2.0, 7.0],
            "After 64 prompts, remax reaches a gold reward of 3.50 (1.50 to 6.75), the highest of 2 methods; the "
            "difference to other is 0.17 (-0.25 to 0.50), within the spread of the seeds.",
        ),
        (
            [1.0],
            [0.5],
            "After 64 prompts, remax reaches a gold reward of 1.00, the highest of 2 methods; the difference to other "
            "is 0.50, from one seed, which cannot tell it from chance.",
        ),
        (
            [0.5],
            [],
            "With 1 of 2 runs finished, after 64 prompts, remax reaches a gold reward of 0.500.",
        ),
        ([], [], "No run is finished yet."),
    ],
)
def test_the_headline(tmp_path: Path, remax: list[float], other: list[float], expected: str) -> None:
    write_comparison(tmp_path, ["remax", "other"], range(max(len(remax), 1)))
    for label, values in (("remax", remax), ("other", other)):
        for seed, value in enumerate(values):
            write_run(tmp_path, label, seed, 0.0, value)
    assert headline(collect(tmp_path)) == expected


# --- pictures and page ------------------------------------------------------------------------------------------------


def run_of(seed: int, points: Sequence[tuple[float | None, ...]]) -> Run:
    names = ("step", "tokens", "reward", "kl")
    return Run(seed, {}, [], [dict(zip(names, point, strict=True)) for point in points], [])


def test_curves_are_interpolated_only_where_all_seeds_are() -> None:
    first = run_of(0, [(0, 0, 1.0, 0), (1, 10, 2.0, 0), (2, 20, 4.0, 0)])
    second = run_of(1, [(0, 5, 0.0, 0), (1, 9, None, 0), (2, 15, 10.0, 0)])
    points, values = aligned([first, second, run_of(2, [])], "tokens", "reward")
    assert points.tolist() == [5, 10, 15]
    assert values.tolist() == [[1.5, 2.0, 3.0], [0.0, 5.0, 10.0]]
    assert [len(part) for part in aligned([run_of(2, [])], "tokens", "reward")] == [0, 0]


def test_the_path_over_kl_follows_the_steps_and_not_the_order_of_kl() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    runs = [run_of(0, [(0, 0, 0.0, 0.0), (1, 1, 1.0, 4.0), (2, 2, 2.0, 2.0)])]
    runs.append(run_of(1, [(0, 0, 0.0, 0.0), (1, 1, 3.0, 6.0), (2, 2, 4.0, 2.0)]))
    _draw_path(axis, runs, "reward", _looks(["remax"])["remax"])
    assert axis.lines[0].get_xydata().tolist() == [[0, 0], [5, 2], [2, 3]]


def test_bars_of_a_step_add_up_to_all_of_it_and_the_legend_names_each() -> None:
    seconds = {"rollout": 1.0, "reward": 2.0, "reference": 3.0, "update": 4.0}
    figures = {f"time/{phase}": {"mean": value} for phase, value in seconds.items()} | {"time/step": {"mean": 10.5}}
    figures |= {f"memory/{phase}": {"mean": None} for phase in seconds}
    figure = _draw_cost({"methods": {"remax": {"seeds": [0], "metrics": figures}}}, _looks(["remax"]))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [1.0, 2.0, 3.0, 4.0, 0.5]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*seconds, "rest"]
    assert [patch.get_facecolor() for patch in legend.get_patches()] == sorted(
        {patch.get_facecolor() for patch in legend.get_patches()}
    ), "five shades, the first the darkest"


class Elements(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_report_of_hostile_texts_is_harmless_and_complete(tmp_path: Path) -> None:
    label = HOSTILE.replace("/", "|")
    bad = {"model": HOSTILE, "command": HOSTILE, "shared": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: [HOSTILE]}}
    write_comparison(tmp_path, ["remax", label, "_none"], [0, 1], **bad, hyperparameters={label: [HOSTILE]})
    for seed in (0, 1):
        write_run(tmp_path, "remax", seed, 1.0 + seed, 0.5)
        write_run(tmp_path, label, seed, 2.0 + seed, 0.75)
    results = analyse(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert not page.open, "every element is closed"
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "link", "object", "form", "a"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert text.count("url(") == 0
    assert "\x1b" not in text
    shown = HOSTILE.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert shown in page.texts, "the command, as it was"
    assert headline(results).replace("\x1b", "\N{REPLACEMENT CHARACTER}") in page.texts
    assert all(any(note[:20] in part for part in page.texts) for note in results["notes"])


def test_a_comparison_of_one_method_one_seed_and_no_gold_and_one_that_has_not_begun(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "a", ["_only"], [3], gold=None)
    results = analyse(folder)
    assert results["missing"] == [{"label": "_only", "seed": 3}]
    assert "No run is finished yet." in (folder / "report.html").read_text(encoding="utf-8")
    assert plot(folder, results) == {}
    write_run(folder, "_only", 3, 1.0, None, memory=False, finished=False)
    assert collect(folder) == results, "a run that was cut off does not count"
    (folder / "runs").rename(tmp_path / "cut off")
    write_run(folder, "_only", 3, 1.0, None, memory=False)
    results = analyse(folder)
    assert results["pairwise"] == results["missing"] == []
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["cost.png", "policy.png", "rewards.png"]
    assert "Against" not in (folder / "report.html").read_text(encoding="utf-8")
    (folder / "runs").rename(tmp_path / "away")
    assert plot(folder, collect(folder)) == {}
    assert not list((folder / "plots").iterdir()), "no pictures of runs that are gone"


def test_a_method_keeps_its_look_whatever_is_finished() -> None:
    labels = [f"m{index}" for index in range(9)]
    looks = _looks(labels)
    assert looks["m3"] == _looks(labels[:4])["m3"]
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == 9
