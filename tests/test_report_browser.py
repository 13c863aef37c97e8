"""The report in a real browser: it draws itself without a complaint, and everything on it can be used."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remax.report.page import page
from remax.report.reading import read_runs
from report_runs import held_out, metrics_of, sampled, write_lines, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `dev` has it)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on the PATH (Debian's package is chromium)", allow_module_level=True)

pytestmark = pytest.mark.slow
HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror=\'document.title = "taken"\'>&lt;b&gt;'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Opened:
    """A page with what the browser complained of and asked for."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme="dark" if dark else "light"
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def texts(self, selector: str) -> list[str]:
        texts: list[str] = self.page.locator(selector).all_inner_texts()
        return texts

    def rewards(self) -> list[float]:
        """The rewards of the completions that are listed."""
        return [
            float(text.split("reward ")[1].split()[0].replace("\N{MINUS SIGN}", "-").replace(",", ""))
            for text in self.texts("#completions-list .completion header")
        ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", steps=60, prompts=30)
    second = write_run(folder / "second", steps=50, prompts=30)
    hostile = write_run(folder / HOSTILE.replace("/", "|"), steps=4)
    write_lines(hostile / "metrics.jsonl", [metrics_of(s, **{f"rewards/{HOSTILE}/mean": 1.0}) for s in (1, 2, 3, 4)])
    texts = {"prompt": HOSTILE, "completion": HOSTILE, "greedy_completion": HOSTILE}
    write_lines(hostile / "eval_completions.jsonl", [held_out(s, 0, **texts) for s in (0, 2, 4)])
    write_lines(hostile / "completions.jsonl", [sampled(1, 0, **texts)])
    write_lines(hostile / "alarms.jsonl", [{"step": 1, "event": "alarm", "metric": "kl", "message": HOSTILE}])
    group = write_run(folder / "group", steps=4)
    write_lines(group / "completions.jsonl", [sampled(step, 0, greedy_reward=None) for step in (1, 2)])
    made = {"one": [first], "two": [first, second], "hostile": [hostile], "three": [first, second, group]}
    for name, runs in made.items():
        text = page(read_runs([str(run) for run in runs]))
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def one(chromium: Any, files: dict[str, Path]) -> Opened:
    return Opened(chromium, files["one"])


@pytest.mark.parametrize("name", ["one", "two", "hostile"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_draws_itself_without_a_complaint(
    name: str, width: int, dark: bool, chromium: Any, files: dict[str, Path]
) -> None:
    opened = Opened(chromium, files[name], width=width, dark=dark)
    assert opened.complaints == []
    assert opened.requests == [files[name].as_uri()]
    assert opened.page.title().startswith("remax report: ")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    if width > 1000:  # Before and after are read without scrolling.
        hidden = "boxes => boxes.map(box => box.scrollWidth - box.clientWidth)"
        assert max(opened.page.locator(".beside .scroll").evaluate_all(hidden)) <= 1
    for box in opened.page.locator(".plot svg").evaluate_all("svgs => svgs.map(s => s.getBoundingClientRect().width)"):
        assert 250 < box < width
    red, *_ = opened.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red < 60) == dark
    # A line of a chart takes the theme's colour.
    stroke = opened.page.locator("#chart-kl g.run0 path").first.evaluate("path => getComputedStyle(path).stroke")
    assert stroke == ("rgb(92, 180, 234)" if dark else "rgb(0, 104, 168)")
    opened.context.close()


def test_hostile_texts_are_shown_as_they_are(chromium: Any, files: dict[str, Path]) -> None:
    opened = Opened(chromium, files["hostile"])
    opened.page.get_by_role("button", name="Across steps").first.click()
    for selector in ("#completions-list dd", "#across-prompt", "#alarms td:last-child"):
        assert HOSTILE in opened.texts(selector)[0]
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script").count() == 2
    assert opened.page.title() != "taken"
    # Even if a text became markup, the page's policy would not let it run.
    opened.page.evaluate("text => { document.body.insertAdjacentHTML('beforeend', text) }", HOSTILE)
    opened.page.wait_for_timeout(100)
    assert opened.page.title() != "taken"
    opened.context.close()


def test_sorting_and_its_buttons(one: Opened) -> None:
    page = one.page
    page.get_by_role("button", name="Best").click()
    # At step 60, prompt i has reward 60 (i + 1) + i.
    assert one.rewards()[:3] == [60 * 30 + 29, 60 * 29 + 28, 60 * 28 + 27]
    assert one.texts("#found") == ["30 completions of step 60"]
    page.get_by_role("button", name="Worst").click()
    assert one.rewards()[:2] == [60, 121]
    page.get_by_role("button", name="Most changed").click()
    assert one.rewards()[:2] == [60 * 30 + 29, 60 * 29 + 28]
    page.get_by_label("Sort by").select_option("gold down")
    assert one.rewards()[0] == 60
    page.get_by_label("From", exact=True).select_option("1")
    page.get_by_label("Step (empty for all)").fill("")
    page.get_by_label("Sort by").select_option("gap up")
    assert one.rewards()[0] == 1
    page.get_by_label("Sort by").select_option("gap down")
    assert one.rewards()[0] == 60 + 29
    page.get_by_label("Sort by").select_option("length up")
    assert one.texts("#found") == ["1,800 completions of all steps"]
    page.get_by_label("From", exact=True).select_option("0")
    page.get_by_label("Sort by").select_option("length down")
    assert "tokens 36" in one.texts("#completions-list header")[0]
    assert one.complaints == []


def test_only_orders_that_the_completions_have_a_value_for_are_offered(chromium: Any, files: dict[str, Path]) -> None:
    opened = Opened(chromium, files["three"])
    page = opened.page

    def offered() -> set[str]:
        enabled = "options => options.filter((o) => !o.disabled && !o.hidden).map((o) => o.value.split(' ')[0])"
        return set(page.locator("#sort option").evaluate_all(enabled))

    always = {"reward", "length", "step"}
    assert offered() == always | {"gap", "gold", "change"}
    page.get_by_label("Sort by").select_option("gold up")
    page.get_by_label("From", exact=True).select_option("1")
    assert offered() == always | {"gap", "change"}  # Gold rewards are of evaluations only.
    assert page.get_by_label("Sort by").input_value() == "reward down"
    page.get_by_label("Run", exact=True).select_option("2")
    page.get_by_label("Step (empty for all)").fill("")
    assert offered() == always | {"change"}
    assert page.get_by_role("button", name="Most changed").is_enabled()
    assert opened.texts("#found") == ["2 completions of all steps"]
    assert opened.complaints == []
    opened.context.close()


def test_searching_and_paging(one: Opened) -> None:
    page = one.page
    page.get_by_label("From", exact=True).select_option("0")
    page.get_by_label("Step (empty for all)").fill("60")
    page.get_by_label("Sort by").select_option("reward up")
    page.get_by_role("searchbox").fill("NUMBER 7 sat")
    assert one.texts("#found") == ["1 completion of step 60"]
    assert one.texts("#completions-list mark") == ["number 7 sat"]
    page.get_by_role("searchbox").fill("question 1")
    assert one.texts("#found") == ["11 completions of step 60"]
    page.get_by_role("searchbox").fill("nowhere")
    assert one.texts("#found") == ["0 completions of step 60"]
    page.get_by_role("searchbox").fill("")
    first = one.texts("#completions-list article")
    assert one.texts("#page") == ["page 1 of 2"]
    page.get_by_role("button", name="Next").click()
    assert one.texts("#page") == ["page 2 of 2"]
    assert len(one.texts("#completions-list article")) == 10
    assert page.get_by_role("button", name="Next").is_disabled()
    page.get_by_role("button", name="Previous").click()
    assert one.texts("#completions-list article") == first
    page.get_by_label("Step (empty for all)").fill("37")  # The nearest step that was evaluated.
    assert one.texts("#found") in (["30 completions of step 36"], ["30 completions of step 38"])
    assert one.complaints == []


def test_one_prompt_across_steps_with_what_changed(one: Opened) -> None:
    page = one.page
    page.get_by_role("button", name="Best").click()
    page.get_by_role("button", name="Across steps").first.click()
    assert page.locator("dialog").get_attribute("open") is not None
    assert one.texts("#across-prompt") == ["Question 29"]
    versions = one.texts("#across-list .version")
    assert len(versions) == 31
    assert versions[0] == "the cat number 29 sat for 0 steps"
    # "for 58 steps" became "for 60 steps".
    last = page.locator("#across-list .version").last
    assert last.locator("del").all_inner_texts() == [" 58"]
    assert last.locator("ins").all_inner_texts() == [" 60"]
    page.get_by_label("Compared, word by word, with").select_option("first")
    assert last.locator("del").all_inner_texts() == [" 0"]
    page.get_by_label("Completions").select_option("greedy")
    assert last.inner_text() == "a cat sat 0 60"
    page.get_by_label("Compared, word by word, with").select_option("nothing")
    assert page.locator("#across-list :is(ins, del)").count() == 0
    page.keyboard.press("Escape")
    assert page.locator("dialog").get_attribute("open") is None
    assert one.complaints == []


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("a b c", "a b c", "a b c"),
        ("a b c", "a x c", "a[- b][+ x] c"),
        ("", "new words", "[+new words]"),
        ("old words", "", "[-old words]"),
        ("one two", "two", "[-one] two"),
        ("one two three four", "two four five", "[-one] two[- three] four[+ five]"),
        ("the cat, sat", "the cat sat.", "the cat[-,] sat[+.]"),
        ("a  b", "a\nb", "a\nb"),  # What is between words is no change.
        ("我喜欢猫", "我喜欢狗", "我喜欢[-猫][+狗]"),
        ("été <b>", "été <i>", "été <[-b][+i]>"),
    ],
)
def test_differences_between_words(before: str, now: str, expected: str, one: Opened) -> None:
    script = """([before, now]) => difference(before, now).map(
        (part) => typeof part === "string" ? part
          : (part.tagName === "INS" ? "[+" : "[-") + part.textContent + "]").join("")"""
    assert one.page.evaluate(script, [before, now]) == expected


def test_very_long_texts_are_compared_in_time(one: Opened) -> None:
    script = """() => { const words = (n, w) => Array.from({ length: n }, (_, i) => w + i).join(" ");
        const parts = difference(words(30000, "a"), words(30000, "b")); return parts.map((part) => part.tagName) }"""
    assert one.page.evaluate(script) == ["DEL", "INS"]


def test_curves_read_out_their_values(one: Opened) -> None:
    page = one.page
    plot = page.locator("#chart-held-out .plot")
    plot.focus()
    page.keyboard.press("End")
    text = one.texts("#chart-held-out .readout")[0]
    assert text.startswith("step 60 ")
    mean = sum(60 * (i + 1) + i for i in range(30)) / 30
    assert f"reward, sampled {mean:,.1f}" in text
    page.keyboard.press("ArrowLeft")
    assert one.texts("#chart-held-out .readout")[0].startswith("step 58 ")
    page.keyboard.press("Home")
    assert one.texts("#chart-held-out .readout")[0].startswith("step 0 ")
    # The mouse, over the middle of the axes.
    plot = page.locator("#chart-reward .plot")
    plot.scroll_into_view_if_needed()
    box = page.locator("#chart-reward .plot svg").bounding_box()
    axes = page.evaluate("data.charts.reward.panels[0]")
    middle = (axes["box"][0] + axes["box"][2]) / 2 / 310
    page.mouse.move(box["x"] + middle * box["width"], box["y"] + box["height"] / 2)
    step = round(sum(axes["x"]) / 2)
    assert one.texts("#chart-reward .readout")[0].startswith(f"step {step} ") or step != sum(axes["x"]) / 2
    assert "greedy" in one.texts("#chart-reward .readout")[0]
    page.mouse.move(0, 0)
    assert one.texts("#chart-reward .readout") == [""]
    # A path is read by its nearest point.
    end = page.evaluate("data.charts['against-kl'].panels[0]")
    box = page.locator("#chart-against-kl .plot svg").bounding_box()
    line = end["lines"][0]
    x = end["box"][0] + (line["x"][-1] - end["x"][0]) / (end["x"][1] - end["x"][0]) * (end["box"][2] - end["box"][0])
    y = end["box"][3] - (line["y"][-1] - end["y"][0]) / (end["y"][1] - end["y"][0]) * (end["box"][3] - end["box"][1])
    page.mouse.move(box["x"] + x * box["width"] / 310, box["y"] + y * box["width"] / 310)
    assert one.texts("#chart-against-kl .readout")[0].startswith("step 60  reward, sampled")
    assert one.complaints == []


def test_runs_over_each_other_can_be_hidden(chromium: Any, files: dict[str, Path]) -> None:
    opened = Opened(chromium, files["two"])
    page = opened.page
    first, second = (page.locator(f"#chart-kl g.run{run}").first for run in (0, 1))
    assert first.is_visible()
    assert second.is_visible()
    assert first.locator("path").first.evaluate("p => getComputedStyle(p).stroke") != second.locator(
        "path"
    ).first.evaluate("p => getComputedStyle(p).stroke")
    page.get_by_label("run 1: first").uncheck()
    assert not first.is_visible()
    assert second.is_visible()
    page.locator("#chart-kl .plot").focus()
    page.keyboard.press("End")
    readout = opened.texts("#chart-kl .readout")[0]
    assert "run 2" in readout
    assert "run 1" not in readout
    page.get_by_label("run 1: first").check()
    assert first.is_visible()
    page.get_by_label("Run", exact=True).select_option("1")
    page.get_by_role("button", name="Best").click()
    assert opened.texts("#found") == ["30 completions of step 50"]
    page.get_by_role("button", name="Across steps").first.click()
    headers = opened.texts("#across-list header")
    assert len(headers) == 31 + 26
    assert headers[0].startswith("run 1, step 0")
    assert headers[-1].startswith("run 2, step 50")
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("source", ["0", "1"])
def test_the_worst_of_all_runs_are_those_at_the_end_of_each(source: str, chromium: Any, files: dict[str, Path]) -> None:
    opened = Opened(chromium, files["two"])
    opened.page.get_by_label("From", exact=True).select_option(source)
    opened.page.get_by_role("button", name="Worst").click()
    assert opened.texts("#found") == ["60 completions of step 60 (run 1), step 50 (run 2)"]
    # At step s, prompt i has reward s (i + 1) + i when it is evaluated, and s + i in training.
    ends = [s * (i + 1) + i if source == "0" else s + i for s in (60, 50) for i in range(30)]
    assert opened.rewards() == sorted(ends)[:20]
    opened.page.get_by_label("Step (empty for all)").fill("20")
    assert opened.texts("#found") == ["60 completions of step 20"]
    assert opened.complaints == []
    opened.context.close()


def test_the_theme_can_be_chosen(chromium: Any, files: dict[str, Path]) -> None:
    opened = Opened(chromium, files["one"], dark=True)
    button = opened.page.locator("#theme")
    ground = "getComputedStyle(document.body).backgroundColor"
    seen = [(button.inner_text(), opened.page.evaluate(ground))]
    for _ in range(3):
        button.click()
        seen.append((button.inner_text(), opened.page.evaluate(ground)))
    dark, light = "rgb(20, 23, 27)", "rgb(255, 255, 255)"
    titles = ("Theme: as the system", "Theme: light", "Theme: dark", "Theme: as the system")
    assert seen == list(zip(titles, (dark, light, dark, dark), strict=True))
    opened.context.close()


def test_everything_that_can_be_used_has_a_name_and_can_be_reached(chromium: Any, files: dict[str, Path]) -> None:
    opened = Opened(chromium, files["one"])
    page = opened.page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [tabindex='0'], svg[role]")].filter((item) =>
            !(item.getAttribute("aria-label") || item.textContent.trim() || item.labels?.length
              || item.closest("label"))).map((item) => item.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.closest('figure')?.id || ''"))
    assert {"theme", "chart-reward", "chart-memory", "search", "source", "step", "sort", "best"} <= reached
    opened.context.close()
