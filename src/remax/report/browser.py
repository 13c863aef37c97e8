"""The part of the page in which completions are searched, sorted and compared."""

from collections.abc import Iterator, Sequence

import numpy as np

from remax.markup import prose, safe
from remax.report.completions import Kept
from remax.report.reading import Run

# page.js offers those that the chosen completions have a value for.
SORTS = {
    "reward down": "reward, highest first",
    "reward up": "reward, lowest first",
    "gap down": "gap to greedy, highest first",
    "gap up": "gap to greedy, lowest first",
    "gold down": "gold reward, highest first",
    "gold up": "gold reward, lowest first",
    "length down": "length, longest first",
    "length up": "length, shortest first",
    "change down": "change of the prompt's reward, largest first",
    "step up": "step, first to last",
}


def browser(runs: Sequence[Run], kept: Sequence[Kept]) -> Iterator[str]:
    """Yields the section; page.js fills it."""
    yield '<section id="completions"><h2>Completions</h2>'
    yield "".join(f"<p>{prose(text)}</p>" for text in _what_is_kept(runs, kept))
    if not any(k.held_out[0] + k.training[0] for k in kept):
        hidden = " hidden"
    else:
        hidden = ""
        yield "<noscript><p>A script shows and searches the completions; here, scripts are switched off.</p></noscript>"
    sources = [name for place, name in enumerate(("held_out", "training")) if any(getattr(k, name)[0] for k in kept)]
    options = {"held_out": (0, "held-out prompts, at evaluations"), "training": (1, "training")}
    source = "".join(f'<option value="{options[s][0]}">{options[s][1]}</option>' for s in sources)
    run = '<option value="all">all</option>' + "".join(
        f'<option value="{index}">run {index + 1}: {safe(r.label)}</option>' for index, r in enumerate(runs)
    )
    sort = "".join(f'<option value="{key}">{title}</option>' for key, title in SORTS.items())
    one = " hidden" if len(runs) == 1 else ""
    yield f"""<div id="browser"{hidden}><div class="controls" role="search">
<div class="wide"><label for="search">Search</label>
<input id="search" type="search" placeholder="in prompts and completions"></div>
<div><label for="source">From</label><select id="source">{source}</select></div>
<div{one}><label for="run">Run</label><select id="run">{run}</select></div>
<div><label for="step">Step (empty for all)</label><input id="step" type="number" min="0" step="any"></div>
<div><label for="sort">Sort by</label><select id="sort">{sort}</select></div>
<button type="button" id="best" data-sort="reward down">Best</button>
<button type="button" data-sort="reward up">Worst</button>
<button type="button" data-sort="change down">Most changed</button>
</div>
<p class="soft" id="found" role="status"></p>
<div id="completions-list"></div>
<div class="pages"><button type="button" id="previous">Previous</button> <span id="page"></span>
<button type="button" id="next">Next</button></div></div>
<dialog id="across" aria-labelledby="across-title"><div class="bar">
<h3 id="across-title">The same prompt across steps</h3><button type="button" id="close">Close</button></div>
<p class="version" id="across-prompt" dir="auto"></p>
<div class="controls"><div><label for="which">Completions</label><select id="which">
<option value="text">sampled</option><option value="greedy">greedy</option></select></div>
<div><label for="against">Compared, word by word, with</label><select id="against">
<option value="before">the step before</option><option value="first">the first step</option>
<option value="nothing">nothing</option></select></div></div>
<p class="soft"><ins>Underlined</ins> is new, <del>struck through</del> is gone.</p>
<div id="across-list"></div></dialog></section>"""


def _what_is_kept(runs: Sequence[Run], kept: Sequence[Kept]) -> Iterator[str]:
    completions = [own for run in runs for own in (run.held_out, run.completions)]
    if any(np.isfinite(own.column("greedy_reward")).any() for own in completions):
        yield "Gap is the reward of the sample minus that of the greedy completion of the same prompt."
    if any(map(len, completions)):
        yield (
            "Best and worst go by the reward at the last step, most changed by how far the reward of a prompt moved "
            "from its first step here to its last. What is not seen (control characters, the direction of writing) is "
            "shown as \N{REPLACEMENT CHARACTER}."
        )
    for run, own in zip(runs, kept, strict=True):
        name = f"{run.label}: " if len(runs) > 1 else ""
        totals = own.held_out[1] + own.training[1]
        if not totals:
            yield f"{name}No completions were kept (--log_completions)."
        elif own.held_out[0] + own.training[0] < totals:
            parts = [
                f"{shown:,} of {number:,} {what}"
                for (shown, number), what in ((own.held_out, "of evaluations"), (own.training, "of training"))
                if number
            ]
            yield (
                f"{name}The page holds {' and '.join(parts)}, so that it stays below 6 MB: the extremes, and an even "
                "sample of the prompts. All are in eval_completions.jsonl and completions.jsonl of the run."
            )
