"""Pushing to the hub: what is asked before a training, what is uploaded after it, and what a failure leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from remax import cards
from remax.cards import base_card, model_card, policy_card
from remax.config import ReMaxConfig
from remax.errors import UserError
from remax.hub import Destination, PushFailed, find_destination, push
from toy_training import make_trainer, read

WRITES = {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class FakeHub:
    """What HfApi was asked for; `answer` is who the token belongs to, or what is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Any = WRITES
        self.fails: Exception | None = None
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, bytes] = {}
        for name in ("whoami", "create_repo", "create_branch", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self._method(name))

    def _method(self, name: str) -> Any:
        def method(api: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, {**({"repo_id": args[0]} if args else {}), **kwargs}))
            if name == "whoami":
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer
            if name == "upload_folder":
                if self.fails:
                    raise self.fails
                folder = kwargs["folder_path"]
                self.uploaded = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            return f"https://hub/{self.calls[-1][1]['repo_id']}"

        return method

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch)


def error(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("refused", response=response)


def test_a_run_is_pushed_when_it_is_done_and_again_when_it_is_resumed(hub: FakeHub, tmp_path: Path) -> None:
    settings = {"push_to_hub": True, "hub_model_id": "lab/vowels", "hub_private_repo": True, "hub_revision": "night"}
    out = tmp_path / "out"
    make_trainer(out, **settings).train()
    assert hub.names == ["whoami", "create_repo", "create_branch", "upload_folder"]
    assert hub.calls[1][1] == {"repo_id": "lab/vowels", "private": True, "exist_ok": True}
    assert hub.calls[2][1] == {"repo_id": "lab/vowels", "branch": "night", "exist_ok": True}
    upload = hub.calls[3][1]
    assert (upload["repo_id"], upload["revision"], upload["folder_path"]) == ("lab/vowels", "night", out / "model")
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(hub.uploaded)
    card = ModelCard(hub.uploaded["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert str(tmp_path).encode() not in b"".join(hub.uploaded.values())

    make_trainer(out, **settings, resume="auto").train()
    assert hub.names[4:] == ["whoami", "create_repo", "create_branch", "upload_folder"]
    assert len(read(out / "metrics.jsonl")) == 2, "nothing was trained again"


def test_a_push_that_fails_leaves_the_run_and_says_how_to_try_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.fails = error(500)
    out = tmp_path / "my run"
    with pytest.raises(PushFailed) as caught:
        make_trainer(out, push_to_hub=True, hub_model_id="vowels").train()
    sentence = str(caught.value)
    assert sentence.startswith("--push_to_hub is true: the model could not be pushed (HfHubHTTPError")
    assert sentence.endswith(f"try again with: hf upload ada/vowels '{out}/model' .")
    assert (out / "model" / "model.safetensors").exists()
    assert len(read(out / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (LocalTokenNotFoundError("none"), r"there is no token .* hf auth login, or set .* HF_TOKEN\.$"),
        (error(401), r"does not accept the token that is set here"),
        (error(500), r"the hub refused \(refused\)"),
        (ConnectionError("no route"), r"cannot be reached \(no route\)"),
        ({**WRITES, "auth": {"accessToken": {"role": "read"}}}, r"the token of ada on the hub may only read"),
    ],
)
def test_what_would_fail_is_said_before_a_model_is_loaded(
    answer: Any, expected: str, hub: FakeHub, tmp_path: Path
) -> None:
    hub.answer = answer
    with pytest.raises(UserError, match=expected):
        make_trainer(tmp_path / "out", model="no-such-model", push_to_hub=True)
    assert hub.names == ["whoami"]
    assert not (tmp_path / "out").exists()


def test_the_repository_is_the_users_own_unless_another_is_named(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "vowels"
    assert find_destination(ReMaxConfig(), out) is None
    assert hub.calls == [], "who does not push is not asked about"
    assert find_destination(ReMaxConfig(push_to_hub=True), out) == Destination("ada/vowels", False, None)
    assert find_destination(ReMaxConfig(push_to_hub=True, hub_model_id="lab/x"), out).repo_id == "lab/x"  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"ada is not in other, .* set one of ada/x, lab/x\.$"):
        find_destination(ReMaxConfig(push_to_hub=True, hub_model_id="other/x"), out)
    with pytest.raises(UserError, match=r"set --hub_model_id ada/NAME\.$"):
        find_destination(ReMaxConfig(push_to_hub=True), tmp_path / "a run")


@pytest.mark.parametrize("name", ["a/b/c", "a b", "/x", "x/", "-x", "a..b", "../x", "x.git", "a--b", ""])
def test_names_that_the_hub_does_not_have_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^--hub_model_id is"):
        ReMaxConfig(push_to_hub=True, hub_model_id=name)


@pytest.mark.parametrize("setting", [{"hub_model_id": "a/b"}, {"hub_private_repo": True}, {"hub_revision": "x"}])
def test_a_repository_without_a_push_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"nothing is pushed; set --push_to_hub too\.$"):
        ReMaxConfig(**setting)


def test_a_token_is_no_setting() -> None:
    with pytest.raises(UserError, match="here it is the environment variable HF_TOKEN"):
        ReMaxConfig(hub_token="hf_x")


@pytest.mark.parametrize(("base", "pattern"), [("local", "adapter/*"), ("someone/base", "adapter/README.md")])
def test_an_adapter_of_a_local_model_stays_here(base: str, pattern: str, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "model" / "adapter").mkdir(parents=True)
    config = {"base_model_name_or_path": str(tmp_path / "local") if base == "local" else base}
    (tmp_path / "model" / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    push(tmp_path / "model", Destination("ada/x", False, None), message="m")
    assert hub.calls[-1][1]["ignore_patterns"] == [pattern]


# The card -------------------------------------------------------------------------------------------------------------


def card_of(base: str = "someone/base", **changes: Any) -> ModelCard:
    settings = {"method": "remax", "train_dataset": "trl-lib/tldr", "beta": 0.1, **changes.pop("settings", {})}
    return ModelCard(policy_card(base, "remax", changes.pop("rewards", ["r"]), settings, 100, **changes))


def test_the_card_has_data_method_settings_and_valid_metadata() -> None:
    card = card_of(settings={"reward_model": "someone/reward", "top_p": 0.9})
    assert card.data.to_dict() == {
        "base_model": "someone/base",
        "datasets": ["trl-lib/tldr"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["remax"],
    }
    for line in ("| method | remax |", "| train_dataset | trl-lib/tldr |", "| beta | 0.1 |", "| top_p | 0.9 |"):
        assert line in card.text.splitlines()
    assert "2310.10505" in card.text


def test_the_card_has_the_curve_and_the_evaluations() -> None:
    curve = [{"step": step, "reward": step / 8, "kl": None, "reward/greedy": 1.0} for step in range(1, 121)]
    evaluations = [{"step": step, "eval/reward": step / 10, "eval/kl": None} for step in (0, 50, 100)]
    lines = card_of(curve=curve, evaluations=evaluations).text.splitlines()
    start = lines.index("| step | reward | greedy reward |")
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in lines[start + 2 :] if line[:2] == "| "]
    assert [row[0] for row in rows] == [1, 13, 26, 38, 51, 63, 75, 88, 100], "later steps are another model's"
    assert all(row == [row[0], pytest.approx(row[0] / 8, rel=1e-3), 1] for row in rows)
    assert "| metric | before (step 0) | after (step 100) |" in lines
    assert "| reward | 0 | 10 |" in lines
    assert "evaluation" not in card_of(evaluations=evaluations[:1]).text.lower()


def test_a_card_shows_no_path_and_obeys_no_markup(tmp_path: Path) -> None:
    (tmp_path / "sft" / "model").mkdir(parents=True)
    hostile = "x | <script>alert(1)</script>\n# title\n---\n[a](http://b) `c`"
    settings = {
        "train_dataset": str(tmp_path / "prompts.jsonl"),
        "reward_funcs": [f"{tmp_path}/rewards.py:vowels"],
        "reward_model": str(tmp_path / "rm" / "model"),
        "kl_mode": hostile,
    }
    card = card_of(str(tmp_path / "sft" / "model"), rewards=[hostile], settings=settings)
    assert str(tmp_path) not in str(card)
    assert "<code>sft</code> trained for 100 steps" in card.text
    for line in ("| train_dataset | prompts.jsonl |", "| reward_funcs | rewards.py:vowels |", "| reward_model | rm |"):
        assert line in card.text.splitlines()
    assert "<script>" not in card.text
    assert "[a](" not in card.text
    assert "# title" not in card.text.splitlines()
    assert all(line.count("|") == 3 for line in card.text.splitlines() if line.startswith("| kl_mode"))
    assert "base_model" not in card.data.to_dict()
    assert "datasets" not in card.data.to_dict()


def test_licence_and_origin_come_from_the_card_of_the_base_model(tmp_path: Path) -> None:
    base_card.cache_clear()
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama2\nbase_model: meta/l\nlanguage: [en, fr]\nsecret: x\n---\n# It\n"
    )
    front = ModelCard(model_card(base_model=str(tmp_path), title="T", lines=[])).data.to_dict()
    assert {name: front[name] for name in ("license", "license_name", "base_model", "language")} == {
        "license": "other",
        "license_name": "llama2",
        "base_model": "meta/l",
        "language": ["en", "fr"],
    }
    assert "secret" not in front


@pytest.mark.parametrize(
    "text", ["", "no front", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: 1}\n---\n"]
)
def test_a_base_model_without_a_proper_card_has_no_licence(text: str, tmp_path: Path) -> None:
    base_card.cache_clear()
    (tmp_path / "README.md").write_text(text)
    assert "license" not in ModelCard(model_card(base_model=str(tmp_path), title="T", lines=[])).data.to_dict()


def test_a_hub_that_cannot_be_reached_is_asked_once_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def unreachable(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise ConnectionError("no route")

    def tries_again_and_again(*_: Any, **__: Any) -> str:
        raise AssertionError("the download waits for half a minute")

    base_card.cache_clear()
    monkeypatch.setattr(cards, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(cards, "hf_hub_download", tries_again_and_again)
    assert base_card("someone/unknown") == {}
    assert base_card("someone/unknown") == {}
    assert asked == [("https://huggingface.co/someone/unknown/resolve/main/README.md", 5)]
