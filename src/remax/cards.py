"""The README.md beside a model: what it is, and how it was made."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

from remax.untrusted import printable, shown

SHOWN_OF_SETTINGS = (
    *("method", "train_dataset", "eval_dataset", "reward_model", "reward_funcs", "reward_weights"),
    *("batch_size", "num_generations", "learning_rate", "lr_scheduler_type", "optim", "beta", "kl_mode"),
    *("max_length", "max_completion_length", "temperature", "top_p", "top_k", "use_peft", "seed"),
)
"""What the model card lists; config.yaml has everything."""
NAMES = ("train_dataset", "eval_dataset", "reward_model", "reward_funcs")
"""Settings that may be paths, which concern nobody else."""
METHOD_NAMES = {
    "remax": "ReMax (REINFORCE with the reward of the greedy completion as baseline, "
    "[arXiv 2310.10505](https://arxiv.org/abs/2310.10505))",
    "reinforce": "REINFORCE",
    "rloo": "RLOO (REINFORCE with a leave-one-out baseline)",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "ppo": "PPO",
}
CURVES = {
    "reward": "reward",
    "reward/greedy": "greedy reward",
    "kl": "KL (nats per completion)",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "length (tokens)",
}
"""The metrics of training that the card shows, and what they are called there."""
MAX_CURVE_ROWS = 9
INHERITED = ("license", "license_name", "license_link", "language")
"""What holds for a model that was made from another one, as its card has it."""
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
MARKUP = re.compile(r"[\\`*\[\]<>|&#!~$]")
"""What can mean something in Markdown, HTML or a table, wherever it stands."""


def policy_card(
    base_model: str,
    method: str,
    rewards: Sequence[str],
    settings: Mapping[str, Any],
    num_steps: int,
    *,
    curve: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns the card of a policy after so many steps of a method with these settings.

    curve: the lines of metrics.jsonl. evaluations: those of eval.jsonl.
    """
    lines = [
        f"<code>{public_name(base_model)}</code> trained for {num_steps} steps with {METHOD_NAMES[method]} by remax. "
        f"Rewards: {', '.join(map(plain, rewards))}.",
        *_table_of(settings),
        *_evaluation(evaluations),
        *_curve([line for line in curve if line["step"] <= num_steps], CURVES),
    ]
    return model_card(
        base_model=base_model,
        title=f"Model after {METHOD_NAMES[method].split(' (')[0]}",
        lines=lines,
        datasets=[str(settings.get("train_dataset") or "")],
    )


def stage_card(
    base_model: str,
    title: str,
    lines: Iterable[str],
    settings: Mapping[str, Any],
    *,
    curve: Sequence[Mapping[str, Any]],
    shown: Mapping[str, str],
    task: str,
) -> str:
    """Returns the card of a model after a supervised stage with these settings.

    lines: what was done, and what was measured. curve: the lines of metrics.jsonl. shown: which of their metrics the
    card shows, and what they are called there.
    """
    return model_card(
        base_model=base_model,
        title=title,
        lines=[*lines, *_table_of(settings), *_curve(curve, shown)],
        task=task,
        datasets=[str(settings.get("train_dataset") or "")],
    )


def model_card(
    *,
    base_model: str,
    title: str,
    lines: Iterable[str],
    task: str = "text-generation",
    datasets: Sequence[str] = (),
) -> str:
    """Returns the README.md that the Hugging Face hub shows for a model.

    Its licence is the one that the base model's card names; none if it names none. datasets: those that have a name on
    the hub are named; files are not.
    """
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["remax"], "pipeline_tag": task}
    base = base_card(base_model)
    front |= {name: base[name] for name in INHERITED if _is_metadata(base.get(name))}
    if _is_on_hub(base_model) and "/" in base_model:
        front["base_model"] = base_model
    elif _is_metadata(base.get("base_model")):
        front["base_model"] = base["base_model"]
    if on_hub := [name for name in datasets if _is_on_hub(name)]:
        front["datasets"] = on_hub
    versions = ", ".join(f"{name} {version(name)}" for name in ("remax-rlhf", "transformers", "torch", "trl"))
    body = [
        "---",
        yaml.safe_dump(front, allow_unicode=True).strip(),
        "---",
        f"# {title}",
        "",
        *lines,
        "",
        f"Made with {versions}. The exact settings are in `config.yaml` of the run.",
        "",
    ]
    return "\n".join(body)


def plain(value: object) -> str:
    """Returns a value as one line of Markdown that means nothing but itself."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", shown(value))


def public_name(path: object) -> str:
    """Returns what a model, file or function is called, without the folders of this machine that it is in.

    What a run left as model or best_model goes by the name of the run's folder. Nothing in it is Markdown.
    """
    name = printable(str(path))
    if _is_on_hub(name):
        return name
    file, _, function = name.rpartition(":") if ".py:" in name else (name, "", "")
    parts = [part for part in re.split(r"[/\\]", file) if part not in ("", ".", "..")] or ["model"]
    own = parts[-2] if parts[-1] in ("model", "best_model") and len(parts) > 1 else parts[-1]
    return plain(f"{own}:{function}" if function else own)


@functools.cache
def base_card(base_model: str) -> dict[str, Any]:
    """Returns the metadata of a model's card; nothing if it has none, or it cannot be had within seconds."""
    file = Path(base_model) / "README.md"
    with suppress(Exception):  # A card is a courtesy: without the hub, or with nonsense in one, there is none.
        if not Path(base_model).exists():
            cached = try_to_load_from_cache(base_model, file.name)
            if not isinstance(cached, str):
                # Asks once: without the hub, the download alone would try for half a minute.
                get_hf_file_metadata(hf_hub_url(base_model, file.name), timeout=5)
                cached = hf_hub_download(base_model, file.name, etag_timeout=5)
            file = Path(cached)
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", file.read_text(encoding="utf-8"), re.DOTALL)
        content = yaml.safe_load(front[1]) if front else None
        return content if isinstance(content, dict) else {}
    return {}


def _is_metadata(value: Any) -> bool:
    """Whether a value from another card is a short text, or a few of them."""
    texts = value if isinstance(value, list) else [value]
    return 0 < len(texts) <= 20 and all(isinstance(t, str) and 0 < len(t) <= 200 and t.isprintable() for t in texts)


def _is_on_hub(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def _table_of(settings: Mapping[str, Any]) -> list[str]:
    rows = (f"| {name} | {value} |" for name, value in _shown_settings(settings))
    return ["", "## Settings", "", "| setting | value |", "|---|---|", *rows]


def _shown_settings(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name in SHOWN_OF_SETTINGS:
        value = settings.get(name)
        if value in (None, [], ""):
            continue
        values = value if isinstance(value, list) else [value]
        yield name, ", ".join(public_name(item) if name in NAMES else plain(item) for item in values)


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the first and the last evaluation side by side; nothing unless there are two."""
    if len(evaluations) < 2:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in first if name != "step" and name in last]
    return [
        *("", "## Evaluation on held-out prompts", ""),
        f"| metric | before (step {first['step']}) | after (step {last['step']}) |",
        "|---|---|---|",
        *(
            f"| {plain(name.removeprefix('eval/'))} | {_number(first[name])} | {_number(last[name])} |"
            for name in names
        ),
    ]


def _curve(curve: Sequence[Mapping[str, Any]], shown: Mapping[str, str]) -> list[str]:
    """Returns a table of the training at a few steps, evenly spread. shown: the metrics and what they are called."""
    if not curve:
        return []
    last = len(curve) - 1
    count = min(MAX_CURVE_ROWS, len(curve))
    rows = [curve[round(row * last / max(count - 1, 1))] for row in range(count)]
    names = [name for name in shown if any(row.get(name) is not None for row in curve)]
    return [
        *("", "## Training", ""),
        f"| step | {' | '.join(shown[name] for name in names)} |",
        "|---" * (len(names) + 1) + "|",
        *(f"| {row['step']} | {' | '.join(_number(row.get(name)) for name in names)} |" for row in rows),
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
