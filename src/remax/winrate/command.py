"""`remax winrate`: from two names to a result, a table of pairs and the files that keep them."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from remax import models
from remax.config import WinrateConfig, WinrateInputs
from remax.config.winrate import is_outputs_file
from remax.errors import UserError
from remax.loading import load_rewards
from remax.processes import make_accelerator
from remax.recording import RunFolder, write_json
from remax.rewards import require_chat_template, resolve_weights
from remax.rewards.named import named_rewards, wait_until_ready
from remax.untrusted import printable, shown
from remax.winrate.endpoint import Endpoint
from remax.winrate.judges import EndpointJudge, Judge, RewardJudge, Verdicts
from remax.winrate.outputs import Pair, Side, check_side, complete, load_contents, pair_up, read_outputs
from remax.winrate.statistics import length_controlled, position_bias, sign_test, win_rate

OF_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


def run_winrate(inputs: WinrateInputs, args: WinrateConfig) -> dict[str, Any]:
    """Returns, prints and, given a folder, writes how often side A is judged better than side B.

    Raises:
        UserError: a side or a judge cannot be used, or no pair could be judged.
    """
    folder = RunFolder(args.output_dir) if args.output_dir else None
    sides: dict[str, Side] = {}
    for flag, name in (("--a", inputs.a), ("--b", inputs.b)):
        check_side(name, flag=flag)
        if is_outputs_file(name):
            sides[flag] = read_outputs(name, flag=flag, do_sample=args.do_sample)
    prompts = load_contents(inputs) if inputs.eval_dataset else []
    conversational = any(
        isinstance(p, list) for p in [*prompts[:1], *(own.outputs[0].prompt for own in sides.values())]
    )
    rewards = _check_judge(inputs, args, conversational=conversational)
    for flag, name in (("--a", inputs.a), ("--b", inputs.b)):
        if flag not in sides:
            sides[flag] = complete(name, prompts, inputs, args, flag=flag)
    a, b = sides["--a"], sides["--b"]
    pairs = pair_up(a, b)
    judged = _judge(inputs, args, rewards, conversational=conversational)(pairs)
    result = summary(pairs, judged, args.seed)
    described = {"a": _described(a), "b": _described(b), "judge": _judge_name(inputs), **result}
    described["num_unpaired"] = {"a": len(a.outputs) - len(pairs), "b": len(b.outputs) - len(pairs)}
    _print(described, judged.example)
    if folder is not None:
        folder.create({**dataclasses.asdict(inputs), **dataclasses.asdict(args)})
        records = list(pair_records(pairs, judged))
        folder.append("pairs.jsonl", records)
        with folder.writing("pairs.csv"):
            _write_csv(folder, records)
            write_json(folder.path / "winrate.json", described)
    return described


def summary(pairs: Sequence[Pair], judged: Verdicts, seed: int) -> dict[str, Any]:
    """Returns the statistics of the pairs that have a verdict, lengths beside the rate.

    Raises:
        UserError: none has.
    """
    counted = [(pair, v) for pair, v in zip(pairs, judged.verdicts, strict=True) if v.score is not None]
    if not counted:
        raise UserError(
            f"no pair of {len(pairs)} could be judged ({judged.example or 'no output has a reward'}): there is no win "
            "rate; correct the judge, or set another."
        )
    scores = [float(v.score) for _, v in counted if v.score is not None]
    lengths = [(len(pair.a.text), len(pair.b.text)) for pair, _ in counted]
    rate, interval = win_rate(scores, seed)
    controlled = length_controlled(scores, [a - b for a, b in lengths], seed)
    bias = position_bias([v.positions for _, v in counted if v.positions is not None])
    wins, losses = sum(s > 0.5 for s in scores), sum(s < 0.5 for s in scores)
    return {
        "num_pairs": len(pairs),
        "num_judged": len(counted),
        "num_identical": sum(pair.identical for pair, _ in counted),
        **judged.counts,
        "wins": wins,
        "ties": len(scores) - wins - losses,
        "losses": losses,
        "win_rate": {"mean": rate, "interval": interval},
        "length_controlled_win_rate": None
        if controlled is None
        else {
            "mean": controlled.rate,
            "interval": controlled.interval,
            "slope": controlled.slope,
            "extrapolated": controlled.extrapolated,
        },
        "sign_test": {"p_value": sign_test(wins, losses)},
        "position": None if bias is None else dataclasses.asdict(bias),
        "mean_length": {
            "a": sum(a for a, _ in lengths) / len(lengths),
            "b": sum(b for _, b in lengths) / len(lengths),
            "unit": "characters",
        },
    }


def pair_records(pairs: Sequence[Pair], judged: Verdicts) -> Iterable[dict[str, Any]]:
    """Returns the table of pairs: prompt, outputs, lengths, and what the judge made of them."""
    names = {1.0: "a", 0.0: "b", 0.5: "tie"}
    for number, (pair, verdict) in enumerate(zip(pairs, judged.verdicts, strict=True)):
        score = verdict.score
        yield {
            "pair": number,
            "score": score,
            "winner": None if score is None else names[(score > 0.5) + 0.5 * (score == 0.5)],
            "length_a": len(pair.a.text),
            "length_b": len(pair.b.text),
            **verdict.details,
            "prompt": pair.prompt,
            "a": pair.a.text,
            "b": pair.b.text,
        }


def _write_csv(folder: RunFolder, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes the table for spreadsheets: no cell is a formula to them, and none steers a terminal."""
    names = list(dict.fromkeys(name for record in records for name in record))
    with (folder.path / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for record in records:
            writer.writerow([_cell(record.get(name)) for name in names])


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, int | float):
        return value
    text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return f"'{text}" if text.lstrip(" ").startswith(OF_FORMULAS) else text


# Judges ---------------------------------------------------------------------------------------------------------------


def _check_judge(inputs: WinrateInputs, args: WinrateConfig, *, conversational: bool) -> list[Any]:
    """Returns the rewards that judge, none for an endpoint; finds a wrong judge before anything is drawn."""
    if inputs.judge_url:
        _endpoint(inputs, args).check()
        return []
    if inputs.reward_model:
        models.check_model_exists(inputs.reward_model, flag="--reward_model")
        models.require_reward_model(inputs.reward_model, flag="--reward_model")
        if conversational:
            require_chat_template(
                models.load_tokenizer(inputs.reward_model, flag="--reward_model"), flag="--reward_model"
            )
    rewards = named_rewards(inputs, args.reward_timeout_seconds)
    resolve_weights(args.reward_weights, len(rewards))
    wait_until_ready(rewards)
    return rewards


def _judge(inputs: WinrateInputs, args: WinrateConfig, rewards: list[Any], *, conversational: bool) -> Judge:
    if inputs.judge_url:
        endpoint = _endpoint(inputs, args)
        return EndpointJudge(endpoint, concurrency=args.judge_concurrency, shows_progress=sys.stdout.isatty())
    functions = load_rewards(
        rewards,
        None,
        args.reward_batch_size,
        make_accelerator(args.bf16).device,
        conversational=conversational,
        timeout_seconds=args.reward_timeout_seconds,
        seed=args.seed,
    )
    return RewardJudge(functions, resolve_weights(args.reward_weights, len(rewards)))


def _endpoint(inputs: WinrateInputs, args: WinrateConfig) -> Endpoint:
    return Endpoint(str(inputs.judge_url), str(inputs.judge_model), timeout_seconds=args.judge_timeout_seconds)


def _judge_name(inputs: WinrateInputs) -> str:
    if inputs.judge_url:
        return f"{inputs.judge_model} at {inputs.judge_url}"
    rewards = [inputs.reward_model, *inputs.reward_funcs, inputs.reward_url]
    return " + ".join(reward for reward in rewards if reward)


# What is printed ------------------------------------------------------------------------------------------------------


def _described(side: Side) -> dict[str, Any]:
    return {"name": side.name, "generator": side.generator, "num_outputs": len(side.outputs)}


def _print(result: Mapping[str, Any], example: str) -> None:
    console = Console()
    for name in ("a", "b"):
        label = shown(result[name]["generator"])
        console.print(
            Text(f"{name.upper()}: {label}, {result['mean_length'][name]:.0f} characters on average"), soft_wrap=True
        )
    console.print(
        Text(f"Judge: {shown(result['judge'], 300)}, {result['num_judged']} of {result['num_pairs']} pairs"),
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2))
    for name in ("", "A against B", "95% interval"):
        table.add_column(name, justify="left" if not name else "right")
    _add_rate(table, "win rate, ties as half", result["win_rate"])
    if result["length_controlled_win_rate"]:
        _add_rate(table, "length-controlled", result["length_controlled_win_rate"])
    table.add_row("wins / ties / losses", f"{result['wins']} / {result['ties']} / {result['losses']}", "")
    table.add_row("sign test", f"p = {result['sign_test']['p_value']:.3g}", "")
    if result["position"]:
        first = result["position"]["first_rate"]
        table.add_row("judge chose the first", "-" if first is None else f"{first:.1%}", "")
        table.add_row("judge agreed with itself", f"{result['position']['agreement']:.1%}", "")
    console.print(table)
    for line in _remarks(result, example):
        console.print(Text(line), soft_wrap=True)


def _add_rate(table: Table, name: str, rate: Mapping[str, Any]) -> None:
    low, high = rate["interval"]
    table.add_row(name, f"{rate['mean']:.1%}", f"{low:.1%} to {high:.1%}")


def _remarks(result: Mapping[str, Any], example: str) -> Iterable[str]:
    """Returns what a reader has to know besides."""
    controlled = result["length_controlled_win_rate"]
    if controlled is None:
        yield "All pairs have the same difference of length: its influence cannot be told from anything else."
    elif controlled["extrapolated"]:
        yield (
            "One side is longer in every pair, so the length-controlled rate is extrapolated: no pair shows what equal "
            "lengths would do."
        )
    if identical := result["num_identical"]:
        yield f"{identical} pairs have the same output twice, and count as ties."
    if result["ties"] == result["num_judged"] > identical:
        yield (
            "Outputs differ and every pair is a tie: the judge sees no difference. A reward function gets lists of "
            "messages where prompts are messages, as AlpacaEval's are."
        )
    left_out = result["num_pairs"] - result["num_judged"]
    if left_out:
        why = {name: result.get(name, 0) for name in ("missing_rewards", "malformed_answers", "unanswered")}
        counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in why.items() if number)
        yield f"{left_out} pairs are left out: {counts}{f'; {example}' if example else ''}."
    for name, number in result["num_unpaired"].items():
        if number:
            yield f"{number} outputs of {name.upper()} have no counterpart and are left out."
