"""The demonstration's stories: enough of them, written as they should be, and judged as documented."""

import math
import random
import re
import statistics

import pytest

from remax.demo import stories
from remax.demo.stories import choose, gold_score, held_out_prompts, kind_fraction, make_corpus, make_story

PROMPT = "On Sunday, Mia went for a walk by the lake. There Mia met a shy mouse who had lost its red hat."
HELP = "Mia helped the mouse look under every leaf until they found the hat."
THANKS = '"Thank you, Mia," said the mouse.'
WIND = "A soft wind moved the leaves."
ALONE = "Mia walked away and left the mouse all alone."


def readings(pattern: str) -> list[str]:
    """Every way of making the free choices of a pattern."""
    first, *rest = re.split(r"\[(.*?)\]", pattern, maxsplit=1)
    if not rest:
        return [first]
    return [first + choice + tail for choice in rest[0].split("|") for tail in readings(rest[1])]


def num_readings(patterns: list[str]) -> int:
    lines = [line for pattern in patterns for line in readings(pattern)]
    assert len(set(lines)) == len(lines)
    return len(lines)


def test_the_grammar_has_billions_of_openings_and_trillions_of_stories() -> None:
    num_others = len(stories.CREATURES) * len(stories.MANNERS) + len(stories.PEOPLE)
    casts = len(stories.HEROES) * num_others * len(stories.TIMES) * len(stories.PLACES)
    num_openings = num_stories = 0
    for things, scene in stories.SCENES.items():
        openings = casts * len(things.split()) * num_readings(stories.OUTINGS["."]) * num_readings(scene["?"])
        num_openings += openings
        # Only endings of the turn's tone, and at most one reaction: a lower bound.
        num_stories += openings * sum(
            num_readings(scene[mark])
            * (1 + num_readings(stories.REACTIONS[mark]))
            * num_readings(stories.ENDINGS[mark])
            for mark in "+=-"
        )
    assert num_openings > 10**8
    assert num_stories > 10**11
    assert 300 <= len(stories.VOCABULARY) <= 600


def test_corpora_are_distinct_and_depend_on_the_seed_alone() -> None:
    corpus = make_corpus(3000, seed=1)
    assert len({story.prompt + story.continuation for story in corpus}) == 3000
    assert corpus == make_corpus(3000, seed=1)
    assert corpus[:100] == make_corpus(100, seed=1)
    assert corpus[:100] != make_corpus(100, seed=2)
    shares = [sum(story.tone == tone for story in corpus) / 3000 for tone in stories.TONES]
    assert all(0.29 < share < 0.38 for share in shares)


def test_a_world_of_nine_openings_gives_each_of_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIMES", "PLACES", "MANNERS", "COLOURS"):
        monkeypatch.setattr(stories, name, getattr(stories, name)[:1])
    monkeypatch.setattr(stories, "HEROES", {"Mia": "she"})
    monkeypatch.setattr(stories, "OTHERS", {"mouse": "it"})
    scene = {"?": ["{intro} was sad.", "{hero} was [sad|sick]."], "+": ["Yes."], "=": ["No."], "-": ["Oh."]}
    monkeypatch.setattr(stories, "SCENES", {"hat": scene})
    monkeypatch.setattr(stories, "OUTINGS", {".": ["{hero} was [here|there|away]."]})
    openings = held_out_prompts(9, seed=0, exclude=())
    assert len(set(openings)) == 9
    assert held_out_prompts(1, seed=1, exclude=openings[:8]) == openings[8:]
    corpus = make_corpus(500, seed=0)
    assert len({story.prompt + story.continuation for story in corpus}) == 500


def test_an_ending_against_the_turn_turns_the_story_around() -> None:
    def begins(sentence: str, patterns: list[str]) -> bool:
        return any(sentence.startswith(line.split("{")[0]) for pattern in patterns for line in readings(pattern))

    contrary = [story for story in make_corpus(1000, seed=6) if story.ending not in (story.turn, "neutral")]
    assert len(contrary) > 100
    for story in contrary:
        ending = stories.SENTENCE_BREAK.split(story.continuation.strip())[-1]
        assert begins(ending, stories.REVERSALS[stories.MARKS[story.ending]]), ending


def test_held_out_prompts_are_distinct_and_not_in_the_corpus() -> None:
    free = held_out_prompts(200, seed=1, exclude=())
    assert len(set(free)) == 200
    assert free == held_out_prompts(200, seed=1, exclude=())
    exclude = set(free[::2])
    held_out = held_out_prompts(200, seed=1, exclude=exclude)
    assert not exclude & set(held_out)
    assert held_out[:100] == free[1::2]
    assert not {story.prompt for story in make_corpus(1000, seed=1)} & set(free)


def test_stories_agree_with_their_openings() -> None:
    for story in make_corpus(2000, seed=3):
        text = story.prompt + story.continuation
        heroes = {name for name in stories.HEROES if re.search(rf"\b{name}\b", story.prompt)}
        others = {name for name in stories.OTHERS if re.search(rf"\b{name}\b", story.prompt)}
        assert len(heroes) == len(others) == 1
        assert set(stories.CHARACTERS.findall(story.continuation)) <= heroes | others
        genders = {stories.HEROES[heroes.pop()], stories.OTHERS[others.pop()]}
        words = set(re.findall("[a-z]+", text.lower()))
        assert "he" in genders or not words & {"he", "him", "his"}
        assert "she" in genders or not words & {"she", "her"}
        assert "he" in genders or "boy" not in words
        assert "she" in genders or "girl" not in words
        assert words <= stories.VOCABULARY
        assert not re.search(r"[{}\[\]|]|  |\ba [aeiou]|\ban [^aeiou]", text)
        assert story.prompt[0].isupper()
        assert story.continuation.startswith(" ")
        assert len(stories.SENTENCE_BREAK.split(story.prompt)) == 2
        assert 2 <= len(stories.SENTENCE_BREAK.split(story.continuation.strip())) <= 4


@pytest.mark.parametrize(("tone", "valence"), [("kind", 1), ("neutral", 0), ("unkind", -1)])
def test_the_reader_understands_every_pattern(tone: stories.Tone, valence: int) -> None:
    """Each sentence on its own: over at least two sentences, one counts 3/2."""
    mark = stories.MARKS[tone]
    sections = [stories.REACTIONS, stories.ENDINGS, stories.REVERSALS, *stories.SCENES.values()]
    for line in (line for section in sections for pattern in section.get(mark, ()) for line in readings(pattern)):
        slots = {"hero": "Mia", "he": "she", "his": "her", "other": "the mouse", "it": "it", "its": "its"}
        sentence = line.format(**slots, thing="hat")
        sentence = sentence[0].upper() + sentence[1:]
        assert gold_score(PROMPT, sentence) == 1.5 * valence, sentence


def test_stories_of_one_tone_get_the_score_of_that_tone() -> None:
    rng = random.Random(0)
    for tone, score in (("kind", 3.0), ("neutral", 0.0), ("unkind", -3.0)):
        for _ in range(500):
            story = make_story(rng, tone)
            assert story.turn == story.ending == story.tone == tone
            assert gold_score(story.prompt, story.continuation) == score


def test_scores_of_the_mixed_corpus_follow_the_tones_and_are_spread_around_zero() -> None:
    corpus = make_corpus(2000, seed=4)
    scores = {tone: [gold_score(s.prompt, s.continuation) for s in corpus if s.tone == tone] for tone in stories.TONES}
    assert min(scores["kind"]) > 0 > max(scores["unkind"])
    everything = [score for part in scores.values() for score in part]
    assert abs(statistics.mean(everything)) < 0.2
    assert statistics.stdev(everything) > 1.8
    assert 0.2 < kind_fraction(everything) < 0.4


@pytest.mark.parametrize(
    ("continuation", "score"),
    [
        (f" {HELP} {THANKS}", 3.0),
        (f" {HELP} {THANKS} {WIND}", 2.0),
        (f" {HELP}", 1.5),
        (f" {HELP} {ALONE}", 0.0),
        (f" {WIND} {ALONE}", -1.5),
        (f" {ALONE}", -1.5),
        (f" {HELP} {HELP}", 1.5 - 1),
        (f" {HELP} {HELP} {HELP} {HELP}", 0.75 - 3),
        (f" {HELP} The mouse smiled.", 3.0),
        (f" {HELP} Mia helped the mouse.", 1.5),
        (f" {HELP} Mia never helped the mouse.", 0.0),
        (f" {HELP} {THANKS[:-1]}", 2.5),
        (f" {HELP} {THANKS}".replace("Mia", "Tom"), 2.5),
        (f" {HELP} {THANKS}".replace("Mia", "Tom").replace("mouse", "fox"), 2.0),
        (" Tom and Zoe and Ben helped the mouse. The mouse smiled.", 2.0),
        (f" {HELP} {THANKS}".replace("leaf", "leaff"), 2.75),
        (" wzx qq helped qq brrr. grmpf shmoo", 1.5 - 0.5 - 1),
        ("", -0.5),
        (" \n", -0.5),
        (f" {ALONE} {ALONE} {ALONE}", -3.0),
    ],
)
def test_exact_scores(continuation: str, score: float) -> None:
    assert gold_score(PROMPT, continuation) == pytest.approx(score, abs=1e-12)


def test_a_longer_story_is_not_a_better_one() -> None:
    kind = [HELP, THANKS, "The mouse smiled.", "Then they were friends.", "Mia gave the mouse a hug."]
    assert [gold_score(PROMPT, " ".join(kind[:n])) for n in (2, 3, 4, 5)] == [3.0] * 4
    assert gold_score(PROMPT, " ".join([*kind, WIND])) == 2.5


def test_choices_are_bradley_terry() -> None:
    for gold_a, gold_b, temperature in ((2.0, 1.0, 1.0), (-1.0, 1.5, 2.0), (0.0, 0.0, 0.5)):
        rng = random.Random(5)
        share = sum(choose(gold_a, gold_b, rng, temperature) for _ in range(20_000)) / 20_000
        assert share == pytest.approx(1 / (1 + math.exp((gold_b - gold_a) / temperature)), abs=0.012)
    assert choose(3.0, -3.0, random.Random(0), 1e-6)
    assert not choose(-3.0, 3.0, random.Random(0), 1e-6)


def test_kind_fraction_counts_scores_above_one() -> None:
    assert kind_fraction([3.0, 1.5, 1.0, 0.0, -3.0]) == 0.4
