"""What is compared: the outputs of two sides, from checkpoints or files, and which belong to the same prompt."""

import dataclasses
import gc
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from remax import data, models
from remax.assembly import assemble_evaluation
from remax.config import EvaluateConfig, EvaluateInputs, WinrateConfig, WinrateInputs
from remax.config.winrate import is_outputs_file
from remax.data.records import check_format, clean_messages, row_name
from remax.errors import UserError
from remax.evaluate import EVALUATION_STEP, PROMPTS_AT_ONCE
from remax.interfaces import Completion, Message, Prompt
from remax.untrusted import shown

Content = str | list[Message]

OF_OUR_RECORDS = (
    *("step", "prompt_index", "sample_index", "prompt", "completion", "greedy_completion", "reward", "greedy_reward"),
    *("advantage", "rewards", "length", "truncated", "greedy_truncated"),
)
"""Columns of a completions.jsonl that are no columns of the dataset."""


@dataclass(frozen=True)
class Output:
    """What one side answered to one prompt."""

    key: Any
    """What the same prompt has in common on both sides."""
    prompt: Content
    text: str
    truncated: bool = False
    """Cut by a length limit, as far as that is known."""
    token_ids: list[int] = field(default_factory=list)
    """None where they come from a file."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What reward functions get by name."""


@dataclass(frozen=True)
class Side:
    """The outputs of one side."""

    name: str
    """As set."""
    generator: str
    """What it calls itself; the name if nothing else."""
    outputs: list[Output]


@dataclass(frozen=True)
class Pair:
    """The outputs of both sides for one prompt."""

    prompt: Content
    a: Output
    b: Output

    @property
    def identical(self) -> bool:
        """Whether there is nothing to choose."""
        return self.a.text == self.b.text and self.a.truncated == self.b.truncated

    def completions(self) -> tuple[Completion, Completion]:
        """Returns both outputs as rewards take them, with the same prompt in the same format."""
        return tuple(  # type: ignore[return-value]
            Completion(Prompt(0, self.prompt, [], dict(own.columns)), -1, own.token_ids, [], own.truncated, own.text)
            for own in (self.a, self.b)
        )


def pair_up(a: Side, b: Side) -> list[Pair]:
    """Returns the pairs of outputs for the same prompt, in the order of a.

    A text and a conversation of that text alone are the same prompt; a pair is a conversation if one side's is.

    Raises:
        UserError: the sides have no prompt in common.
    """
    others = {output.key: output for output in b.outputs}
    pairs = [
        Pair(output.prompt if isinstance(output.prompt, list) else other.prompt, output, other)
        for output in a.outputs
        if (other := others.get(output.key)) is not None
    ]
    if not pairs:
        raise UserError(
            f"--a is {shown(a.name)} and --b is {shown(b.name)}: no prompt is in both, so nothing can be compared; set "
            "outputs for the same prompts."
        )
    return pairs


def numbered(prompts: Iterable[Content]) -> list[tuple[str, int]]:
    """Returns a key for every prompt: its text, and how many equal ones came before it."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        text = _plain(prompt)
        keys.append((text, seen[text]))
        seen[text] += 1
    return keys


def _plain(prompt: Content) -> str:
    """Returns a text for a prompt: the question where a user's one question is all there is."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user" and isinstance(prompt[0]["content"], str):
        return prompt[0]["content"]
    return json.dumps(prompt, sort_keys=True, default=str)


# Files ----------------------------------------------------------------------------------------------------------------


def read_outputs(path: str, *, flag: str, do_sample: bool) -> Side:
    """Returns the outputs of a file: a completions.jsonl, prompts with completions, or AlpacaEval's list.

    Of a completions.jsonl, the greedy completion of each prompt or, with do_sample, its first sample, of the latest
    step that has one. AlpacaEval's instructions are messages of a user.

    Raises:
        UserError: it cannot be read, or is none of these.
    """
    records = data.load_records(path, "test", flag=flag)
    there = records.column_names
    if {"instruction", "output"} <= set(there):
        return _alpaca_eval(path, records, flag)
    if not {"prompt", "completion"} <= set(there):
        raise UserError(
            f"{flag} is {shown(path)}: it has the columns {shown(', '.join(there))}, so there are no outputs in it; "
            "set a file with prompt and completion, or with AlpacaEval's instruction and output."
        )
    rows = list(records.with_format(None))
    conversational = check_format([row["prompt"] for row in rows], column="prompt", flag=flag) == "conversational"
    text, cut = (
        ("greedy_completion", "greedy_truncated") if "greedy_completion" in there else ("completion", "truncated")
    )
    if do_sample:
        text, cut = "completion", "truncated"
    chosen = _latest([row for row in rows if row[text] is not None or text == "completion"], path, flag)
    if not chosen:
        raise UserError(
            f"{flag} is {shown(path)}: it has no greedy completions to compare; set --do_sample for the sampled ones."
        )
    prompts = [clean_messages(row["prompt"]) if conversational else row["prompt"] for row in chosen]
    names = [name for name in there if name not in OF_OUR_RECORDS]
    return Side(
        path,
        path,
        [
            Output(
                key,
                prompt,
                _text(row[text], text, number, flag),
                bool(row.get(cut)),
                columns={name: row[name] for name in names},
            )
            for number, (key, prompt, row) in enumerate(zip(numbered(prompts), prompts, chosen, strict=True))
        ],
    )


def _latest(rows: Sequence[Mapping[str, Any]], path: str, flag: str) -> list[Mapping[str, Any]]:
    """Returns one row per prompt: the first sample of its latest step."""
    steps = {row.get("step") for row in rows}
    if len(steps) > 1:
        print(f"{flag} {shown(path)} has completions of {len(steps)} steps: of each prompt, the latest counts.")
    latest: dict[Any, Mapping[str, Any]] = {}
    for number, row in enumerate(rows):
        prompt_index = row.get("prompt_index")
        place = ("row", number) if prompt_index is None else prompt_index
        known = latest.get(place)
        if known is None or _rank(row) > _rank(known):
            latest[place] = row
    return list(latest.values())


def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
    return row.get("step") or 0, -(row.get("sample_index") or 0)


def _alpaca_eval(path: str, records: datasets.Dataset, flag: str) -> Side:
    rows = list(records.with_format(None))
    instructions = [row["instruction"] for row in rows]
    if check_format(instructions, column="instruction", flag=flag) != "standard":
        raise UserError(f"{flag} is {shown(path)}: its instructions are no texts; call conversations `prompt`.")
    generators = {str(row["generator"]) for row in rows if row.get("generator") is not None}
    names = [name for name in records.column_names if name not in ("instruction", "output")]
    return Side(
        path,
        generators.pop() if len(generators) == 1 else path,
        [
            Output(
                key,
                [{"role": "user", "content": row["instruction"]}],
                _text(row["output"], "output", number, flag),
                columns={name: row[name] for name in names},
            )
            for number, (key, row) in enumerate(zip(numbered(instructions), rows, strict=True))
        ],
    )


def _text(value: Any, column: str, number: int, flag: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{flag} has {'no value' if value is None else f'a {type(value).__name__}'} in column {column!r} of "
            f"{row_name(number)}: an output is a text, which may be empty; correct this row or drop it."
        )
    return value


# Checkpoints ----------------------------------------------------------------------------------------------------------


def check_side(name: str, *, flag: str) -> None:
    """Raises UserError if a checkpoint cannot be there, or has no tokenizer; reads no weights."""
    if not is_outputs_file(name):
        models.check_model_exists(name, flag=flag)
        data.check_tokenizer(models.load_tokenizer(name, flag=flag), flag=flag)


def load_contents(inputs: WinrateInputs) -> list[Content]:
    """Returns the prompts of --eval_dataset as they stand there, row by row.

    Raises:
        UserError: they cannot be read.
    """
    records = data.load_records(str(inputs.eval_dataset), inputs.eval_split, flag="--eval_dataset")
    data.check_columns(records, ["prompt"], flag="--eval_dataset", purpose="the prompts to complete")
    prompts = list(records.with_format(None)["prompt"])
    if check_format(prompts, column="prompt", flag="--eval_dataset") == "standard":
        return prompts
    return [clean_messages(messages) for messages in prompts]


def complete(name: str, contents: Sequence[Content], inputs: WinrateInputs, args: WinrateConfig, *, flag: str) -> Side:
    """Returns what a checkpoint answers to the prompts of --eval_dataset, greedy or sampled.

    contents: those prompts, by which outputs are paired: a policy may see one cut, or with a system prompt.

    Raises:
        UserError: the model or the prompts cannot be used.
    """
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(EvaluateConfig) if hasattr(args, f.name)}
    evaluation = EvaluateConfig(**{**shared, "reward_weights": [], "output_dir": None})
    source = EvaluateInputs(model=name, eval_dataset=str(inputs.eval_dataset), eval_split=inputs.eval_split)
    try:
        parts = assemble_evaluation(source, [], evaluation)
    except UserError as error:
        raise UserError(str(error).replace("--model is", f"{flag} is")) from error
    completions: list[Completion] = []
    for start in range(0, len(parts.eval_prompts), PROMPTS_AT_ONCE):
        rollout = parts.roll_out(
            parts.eval_prompts[start : start + PROMPTS_AT_ONCE],
            num_samples=int(args.do_sample),
            greedy=not args.do_sample,
            seed=args.seed,
            step=EVALUATION_STEP,
        )
        completions += rollout.samples or rollout.greedy
    for news in parts.memory.news:
        print(f"{news['message']}.")
    # The other side's model is loaded next.
    del parts
    gc.collect()
    keys = numbered(contents)
    outputs = [
        Output(keys[c.prompt.index], c.prompt.content, c.text, c.truncated, c.token_ids, c.prompt.columns)
        for c in completions
    ]
    return Side(name, name, outputs)
