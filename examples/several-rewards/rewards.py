"""Two rewards from 0 to 1, beside what a reward model says."""


def variety(completions: list[str], **columns: object) -> list[float]:
    """Returns the share of a story's words that were not in it before: 1.0 where none is repeated."""
    stories = [story.lower().split() for story in completions]
    return [len(set(words)) / len(words) if words else 0.0 for words in stories]


def ending(completions: list[str], **columns: object) -> list[float]:
    """Returns 1.0 where a story ends with a sentence, 0.0 where it breaks off."""
    return [float(story.rstrip(' "').endswith((".", "!", "?"))) for story in completions]
