"""Settings of `remax winrate`."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from remax.config.groups import (
    LONGEST_TIMEOUT_SECONDS,
    PrecisionOptions,
    PromptOptions,
    SamplingOptions,
    ScoringOptions,
)
from remax.config.inputs import check_reward_url
from remax.errors import UserError
from remax.options import Options
from remax.untrusted import shown


def is_outputs_file(name: str) -> bool:
    """Whether a name is that of a file of outputs, rather than of a checkpoint."""
    return name.lower().endswith((".json", ".jsonl"))


def check_judge_url(url: str) -> None:
    """Raises UserError for what is no address of an endpoint. A password in it is not shown, nor written down."""
    advice = "set one such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(f"--judge_url cannot be read as an address: no judge can be asked; {advice}.") from None
    if "@" in url or parts.query or parts.fragment:
        raise UserError(
            "--judge_url has a part (before an @, or behind ? or #) that may hold a secret and would be written to "
            "config.yaml; leave it out, and set the environment variable REMAX_JUDGE_KEY."
        )
    printable = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not printable:
        raise UserError(f"--judge_url is {shown(url)}: that is no address of an endpoint; {advice}.")


@dataclass(frozen=True)
class WinrateInputs(Options):
    """What is compared, and by whom"""

    a: str
    """What the win rate is of: a checkpoint (a folder or a hub name), or a .json or .jsonl file of outputs (a
    completions.jsonl of ours, or AlpacaEval's list of instruction, output and generator). May stand without the flag:
    `remax winrate A B`."""
    b: str
    """What it is compared with, likewise."""
    eval_dataset: str | None = None
    """The prompts that checkpoints complete: a file or a hub name, with a column `prompt`."""
    eval_split: str = "test"
    """Split of --eval_dataset, when it has several."""
    reward_model: str | None = None
    """Judge: a reward model with one label; the completion with the higher reward wins."""
    reward_funcs: list[str] = field(default_factory=list)
    """Judge: reward functions as file.py:function; several rewards are added up by --reward_weights."""
    reward_url: str | None = None
    """Judge: address of a reward server (docs/reward-server.md), as http://127.0.0.1:8000."""
    judge_url: str | None = None
    """Judge: base address of an endpoint with OpenAI's chat completions, as https://api.openai.com/v1; its key, if it
    needs one, is in the environment variable REMAX_JUDGE_KEY. Every pair is asked about in both orders."""
    judge_model: str | None = None
    """The endpoint's name of the model that judges."""

    def _check(self) -> None:
        files = [is_outputs_file(name) for name in (self.a, self.b)]
        if self.a == self.b:
            raise UserError(f"--b is {shown(self.b)}: that is --a too, so there is nothing to compare; set another.")
        if not all(files) and not self.eval_dataset:
            name = self.b if files[0] else self.a
            raise UserError(
                f"--eval_dataset is not set: the checkpoint {shown(name)} needs prompts to complete; set a file or a "
                "hub name, or a .json or .jsonl file of outputs in its place."
            )
        if all(files) and self.eval_dataset:
            raise UserError(
                f"--eval_dataset is {shown(self.eval_dataset)}: two files of outputs have their own prompts, so it "
                "would be ignored; leave it out."
            )
        rewards = bool(self.reward_model or self.reward_funcs or self.reward_url)
        if rewards == bool(self.judge_url):
            there = "are both set: there can be one judge" if rewards else "are not set: there is no judge"
            raise UserError(
                f"rewards (--reward_model, --reward_funcs, --reward_url) and --judge_url {there}; set one of the two."
            )
        if bool(self.judge_url) != bool(self.judge_model):
            missing, other = ("judge_model", "judge_url") if self.judge_url else ("judge_url", "judge_model")
            raise UserError(f"--{missing} is not set: --{other} alone names no judge; set both.")
        check_reward_url(self.reward_url)
        if self.judge_url:
            check_judge_url(self.judge_url)


@dataclass(frozen=True)
class WinrateConfig(PromptOptions, SamplingOptions, ScoringOptions, PrecisionOptions):
    """Comparison"""

    do_sample: bool = False
    """Compare one sampled completion of each prompt instead of the greedy one; of a completions.jsonl likewise."""
    judge_timeout_seconds: float = 120.0
    """Longest wait for one answer of --judge_url."""
    judge_concurrency: int = 8
    """How many answers of --judge_url are waited for at once."""
    seed: int = 42
    """Seed of the sampling noise and of the bootstrap."""
    output_dir: str | None = None
    """Folder for winrate.json and the table of pairs (pairs.jsonl, pairs.csv); by default the result is only printed.
    """

    def _check(self) -> None:
        for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            self._require(
                self.do_sample or getattr(self, name) == neutral,
                name,
                "greedy completions do not depend on it",
                "--do_sample too, or leave it out",
            )
        self._require(
            0 < self.judge_timeout_seconds <= LONGEST_TIMEOUT_SECONDS,
            "judge_timeout_seconds",
            "no answer can be waited for so",
            f"seconds up to {LONGEST_TIMEOUT_SECONDS}",
        )
        self._require(0 < self.judge_concurrency <= 256, "judge_concurrency", "nothing sane is asked so", "1 to 256")
        self._require(self.seed >= 0, "seed", "no generator takes it", "0 or more")
