"""Models, rewards and data of every command: what has no default."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from remax.errors import UserError
from remax.options import Options
from remax.untrusted import shown


def check_reward_url(url: str | None) -> None:
    """Raises UserError for what is no address of a reward server. A password in it is not shown, nor written down."""
    if url is None:
        return
    advice = "set one such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(f"--reward_url cannot be read as an address: no server can be asked; {advice}.") from None
    if "@" in url:
        raise UserError(
            "--reward_url has a user or password in it (before the @), which would be written to config.yaml and to "
            "logs; leave them out, and set the environment variable REMAX_REWARD_TOKEN."
        )
    if parts.query or parts.fragment:
        raise UserError(
            "--reward_url has a part behind ? or #, which may hold a secret and would be written to config.yaml; leave "
            "it out: /score and /health are put behind the address."
        )
    printable = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not printable:
        raise UserError(f"--reward_url is {shown(url)}: that is no address of a server; {advice}.")


@dataclass(frozen=True)
class TrainInputs(Options):
    """Models, rewards and data"""

    model: str
    """The policy to train: a folder or a hub name, usually the output of `remax sft`."""
    train_dataset: str
    """Prompts: a json, jsonl, parquet or csv file or a hub name, with a column `prompt` of texts or messages."""
    reward_model: str | None = None
    """A reward model with one label, usually the output of `remax reward`."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; several may follow, or the flag may be repeated."""
    reward_url: str | None = None
    """Address of a reward server (docs/reward-server.md), as http://127.0.0.1:8000; its token, if it has one, is in the
    environment variable REMAX_REWARD_TOKEN."""
    eval_dataset: str | None = None
    """Held-out prompts, for evaluations and the best model."""
    gold_reward_model: str | None = None
    """A second reward model, which judges the evaluations and which training never sees."""
    gold_reward_funcs: list[str] = field(default_factory=list)
    """Likewise functions, as file.py:function; all gold rewards are added up."""

    def _check(self) -> None:
        gold = self.gold_reward_model or " ".join(self.gold_reward_funcs)
        if gold and not self.eval_dataset:
            flag = "gold_reward_model" if self.gold_reward_model else "gold_reward_funcs"
            raise UserError(
                f"--{flag} is {shown(gold)}: it judges evaluations, of which there are none; set --eval_dataset too."
            )
        if not (self.reward_model or self.reward_funcs or self.reward_url):
            raise UserError(
                "neither --reward_model nor --reward_funcs is set, nor --reward_url: there is nothing to maximise; set "
                "a model, file.py:function, or the address of a reward server."
            )
        check_reward_url(self.reward_url)


@dataclass(frozen=True)
class StageInputs(Options):
    """Model and data"""

    model: str
    """The model to start from: a folder or a hub name."""
    train_dataset: str
    """For `sft`: texts (`text`), `prompt` and `completion`, or `messages`; for `reward` and `dpo`: `chosen`
    and `rejected`."""
    eval_dataset: str | None = None
    """Held-out data of the same form."""


@dataclass(frozen=True)
class EvaluateInputs(Options):
    """Models, rewards and data"""

    model: str
    """The policy to evaluate: a folder or a hub name."""
    eval_dataset: str
    """Held-out prompts: a file or a hub name, with a column `prompt`."""
    reward_model: str | None = None
    """A reward model with one label."""
    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions as file.py:function; several may follow, or the flag may be repeated."""
    reward_url: str | None = None
    """Address of a reward server (docs/reward-server.md), as http://127.0.0.1:8000; its token, if it has one, is in the
    environment variable REMAX_REWARD_TOKEN."""
    ref_model: str | None = None
    """The model that KL is measured against, usually the policy before training; without it no KL is reported."""
    perplexity_dataset: str | None = None
    """Texts whose perplexity is reported: `text`, or `prompt` with `completion` or `chosen`; by default --eval_dataset
    if it has such columns."""
    eval_split: str = "test"
    """Split of the datasets, when they have several."""

    def _check(self) -> None:
        check_reward_url(self.reward_url)


@dataclass(frozen=True)
class ChatInputs(Options):
    """Model"""

    model: str
    """The model to talk to: a folder or a hub name."""
