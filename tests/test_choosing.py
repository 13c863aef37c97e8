"""The figures of docs/choosing.md: worked out by hand from made-up runs, and the page against what is recorded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from remax.compare.spec import plan_runs
from remax.config import CompareConfig
from remax.recording import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import choosing  # noqa: E402

LABELS = sorted({label for picture in choosing.PICTURES.values() for label in picture})
REWARDS = [9.0, 9.0, 1.0, 3.0]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(home: Path, seed: int, gold: float, kl: float) -> None:
    """A run of four steps, evaluated before and after, with an alarm after its third step if the seed is 1."""
    home.mkdir(parents=True)
    settings = {"beta": 0.1, "learning_rate": 1e-4, "batch_size": 8}
    write_json(home / "run.json", {"finished": True, "seed": seed, "settings": settings})
    steps = [{"reward": reward, "kl": kl + 0.123456, "entropy": 1.0, "grad_norm": 7.0} for reward in REWARDS]
    write_lines(home / "metrics.jsonl", [{"step": step, **figures} for step, figures in enumerate(steps, start=1)])
    common = {"reward": 2.0 + seed, "kl": kl, "entropy": 1.5}
    write_lines(
        home / "evaluations.jsonl",
        [{"step": 0, "prompts": 0, "gold": -9.0, **common}, {"step": 4, "prompts": 32, "gold": gold, **common}],
    )
    texts = {0: ["Sam ran.", "sam sat"], 4: ["Happy happy d", "happly dog d"]}
    lines = [{"step": step, "completion": text} for step, both in texts.items() for text in both]
    write_lines(home / "eval_completions.jsonl", lines)
    write_lines(home / "final_samples.jsonl", [])
    if seed == 1:
        write_lines(home / "alarms.jsonl", [{"step": step, "alarm": "kl", "message": "Alarm."} for step in (3, 4)])


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "comparison"
    for label in LABELS:
        for seed, gold in ((0, -1.0), (1, -2.0)):
            write_run(folder / "runs" / label / f"seed{seed}", seed, gold, kl=float(LABELS.index(label)))
    about = dict.fromkeys(("budget", "shared", "hardware", "versions", "commit", "date"), "known")
    write_json(folder / "comparison.json", {"methods": dict.fromkeys(LABELS), "seeds": [0, 1], **about})
    return choosing.collect(folder, {"sam", "happy", "dog"})


def test_words_are_looked_up_whatever_their_case_and_without_the_last_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs.jsonl", [{"chosen": "The cat sat.", "rejected": "2 dogs!", "score": 1.0}])
    dictionary = choosing.read_dictionary([tmp_path / "pairs.jsonl"])

    # Judged are the, cat, THE, dgos: three of four are words, and there are three different ones.
    judged = choosing.judge_words(["The cat xx", "THE dgos, s", "zz", ""], dictionary)

    assert dictionary == {"the", "cat", "sat", "dogs"}
    assert judged == {"real_words": 3 / 4, "different_words": 3}


def test_the_noise_of_a_curve_is_that_of_its_single_steps() -> None:
    assert choosing.step_noise([1.0, -1.0, 1.0, -1.0]) == pytest.approx(2**0.5)
    assert choosing.step_noise([5.0, 5.0, 5.0]) == 0


def test_what_is_collected_is_what_the_runs_recorded(results: dict[str, Any]) -> None:
    run = results["methods"]["right"]["runs"][1]

    assert run["steps"]["kl"] == [LABELS.index("right") + 0.123] * 4
    assert [evaluation["real_words"] for evaluation in run["evaluations"]] == [1, 3 / 4]
    assert run["evaluations"][-1]["gold"] == -2.0
    assert run["first_prompt"] == {0: "Sam ran.", 4: "Happy happy d"}
    assert (results["hardware"], results["methods"]["right"]["settings"]["batch_size"]) == ("known", 8)


def test_the_tables_have_the_figures_of_the_last_evaluation_and_of_the_second_half(results: dict[str, Any]) -> None:
    row = next(line for line in choosing.outcomes(results).split("\n") if line.startswith("| right "))

    cells = [cell.strip() for cell in row.strip("|").split("|")]
    kl = f"{LABELS.index('right'):.1f}"
    assert cells == ["right", "2", "2.50", "-1.50 (-2.00 to -1.00)", kl, "1.50", "7", "75%", "3", "`kl` 3"]
    # Rewards of the second half are 1 and 3, whose difference is 2: a noise of 2 / sqrt(2).
    assert choosing.noise(results).split("\n")[2] == "| 8 | 4 | 1.41 | 7 |"

    # A seed that only one of the batch sizes has is not compared.
    results["methods"]["batch 8"]["runs"][1]["steps"]["grad_norm"] = [99.0] * 4
    del results["methods"]["batch 128"]["runs"][1]
    assert choosing.noise(results).split("\n")[2] == "| 8 | 4 | 1.41 | 7 |"


def test_every_picture_shows_all_of_its_runs(results: dict[str, Any], tmp_path: Path) -> None:
    paths = choosing.draw(json.loads(json.dumps(results)), tmp_path)

    assert [path.name for path in paths] == ["choosing-beta.png", "choosing-rate.png", "choosing-batch.png"]
    for path, looks in zip(paths, choosing.PICTURES.values(), strict=True):
        pixels = imread(path)[:, :, :3]
        for _, colour, _ in looks.values():
            own = (abs(pixels - to_rgb(colour)).max(-1) < 0.02)[100:]  # below the legend
            assert own.sum() > 500, (path, colour)


# The page ------------------------------------------------------------------------------------------------------------


def test_the_runs_of_the_page_can_be_run_again_and_are_all_shown() -> None:
    asked = yaml.safe_load((ROOT / "benchmarks" / "choosing.yaml").read_text(encoding="utf-8"))
    args = CompareConfig(**{name: asked[name] for name in ("settings", "methods", "seeds", "budget", "budget_amount")})
    recorded = json.loads(choosing.RESULTS.read_text(encoding="utf-8"))

    assert set(args.methods) == set(LABELS) == set(recorded["methods"])
    for run in plan_runs(args):
        own = recorded["methods"][run.label]
        assert all(getattr(run.args, name) == value for name, value in own["settings"].items()), run.label
        assert [entry["seed"] for entry in own["runs"]] == args.seeds[: len(own["runs"])]
        last = own["runs"][0]["evaluations"][-1]
        assert (last["step"], last["prompts"]) == (run.args.max_steps, args.budget_amount)


def test_the_page_has_the_tables_of_what_was_recorded() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")

    results = json.loads(choosing.RESULTS.read_text(encoding="utf-8"))
    assert choosing.outcomes(results) in page
    assert choosing.noise(results) in page
    for label in ("right", "beta 0.001", "beta 3", "rate 3e-3"):
        *_, completion = results["methods"][label]["runs"][0]["first_prompt"].values()
        assert f"| {label} | {completion.strip()} |" in page
    for name in choosing.PICTURES:
        assert f"](images/choosing-{name}.png)" in page
        assert (choosing.IMAGES / f"choosing-{name}.png").exists()
