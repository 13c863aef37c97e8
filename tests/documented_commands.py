"""Commands of the documentation, run as they are written but on as little as they take.

`remax.cli.main` gets the very words of the page, and remax's own parser reads every flag; only what comes out of it is
made smaller. vLLM, the hub, judges and launchers are stood in for: what they do is tested elsewhere.
"""

import contextlib
import dataclasses
import inspect
import io
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import remax.stages.dpo
import remax.stages.reward
import remax.stages.sft
from judging import fake_endpoint, longer
from remax import cli, config, flags, launch
from remax.compare import accounting, runner
from remax.compare.spec import plan_runs
from remax.demo.settings import DemoConfig
from remax.rewards import CallableReward
from remax.rewards import server as reward_server
from remax.rewards.server import RewardServer, scorer
from remax.rollout.vllm import server as vllm_server
from remax.serving import GuardedServer
from remax.trainer import ReMaxTrainer
from test_hub import FakeHub

SMALLEST = {
    "max_steps": 2,
    "batch_size": 4,
    "micro_batch_size": 4,
    "max_completion_length": 4,
    "num_eval_prompts": 4,
    "num_prompts": 4,
    "num_gradients": 2,
    "num_pairs": 40,
}
"""What numbers of any command are lowered to; a plan trains nothing, so it is left alone."""
SMALLEST_DEMO = {
    "num_stories": 300,
    "num_pairs": 300,
    "sft_steps": 2,
    "reward_steps": 2,
    "max_steps": 2,
    "num_eval_prompts": 8,
}
NOT_FOR = {config.LabConfig: {"num_eval_prompts"}}
"""Settings that a command has and refuses to have changed."""
OUTPUTS = ("output_dir", "json", "output", "output_file")
"""Settings that say where something is written."""
SECONDS_TO_START = 60.0


def shrunk(settings: Any) -> Any:
    """Returns a group of settings with which as little as possible is done."""
    if isinstance(settings, config.PlanConfig):
        return settings
    if isinstance(settings, config.CompareConfig):
        return _shrunk_comparison(settings)
    smallest = SMALLEST_DEMO if isinstance(settings, DemoConfig) else SMALLEST
    changes: dict[str, Any] = {}
    names = {own.name for own in dataclasses.fields(settings)} - NOT_FOR.get(type(settings), set())
    for name, least in ((name, least) for name, least in smallest.items() if name in names):
        given = getattr(settings, name, None)
        if given is not None:
            # Below zero, and for micro_batch_size at zero, it stands for "as many as there are".
            changes[name] = min(given, least) if given > 0 else least if name == "max_steps" else given
    if hasattr(settings, "report_to"):  # TensorBoard's import takes seconds, and the other trackers are not installed.
        changes["report_to"] = ["none"]
    if getattr(settings, "optim", None) == "adamw_torch_8bit":  # It compiles itself, which takes a minute.
        changes["optim"] = "adamw_torch"
    return dataclasses.replace(settings, **changes)


def _shrunk_comparison(args: config.CompareConfig) -> config.CompareConfig:
    """Every run is planned, which checks its settings; the first method makes one step."""
    assert plan_runs(args)
    small = {"batch_size": 4, "max_completion_length": 4, "num_eval_prompts": 4, "eval_steps": 0}
    amount = {"prompts": 4.0, "tokens": 1.0, "seconds": 0.01}[args.budget]
    first = dict([next(iter(args.methods.items()))])
    return dataclasses.replace(
        args, settings={**args.settings, **small}, seeds=args.seeds[:1], budget_amount=amount, methods=first
    )


class InLine:
    """A pool of processes without any: what is submitted is run at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "InLine":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


class Commands:
    """Runs the commands of one page; `close` ends its servers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        """Commands of remax that a page has and that were run."""
        self.home = Path.cwd()
        """The page's folder."""
        self.addresses: dict[str, str] = {}
        """By the port of the page, where that server really is."""
        self._stack = contextlib.ExitStack()
        self._servers: list[GuardedServer] = []
        self._stops: list[Callable[[], Any]] = []
        self._threads: list[tuple[threading.Thread, list[int], str]] = []
        self._ready = threading.Event()
        self._made: set[Path] = set()
        self._running = False
        self._parse = flags.parse
        monkeypatch.setattr(flags, "parse", self._parse_and_shrink)
        monkeypatch.setattr(launch, "starts_others", self._check_launch)
        monkeypatch.setattr(launch, "check_launch", self._check_launch)
        for module in (runner, accounting):
            monkeypatch.setattr(module, "ProcessPoolExecutor", InLine)
        monkeypatch.setattr("builtins.input", self._type)
        # Half the time of so small a training; the pages that are about reports call `remax report`.
        monkeypatch.setattr("remax.report.command.report_after_training", lambda folder: f"No report of {folder}.")
        for module in (reward_server, vllm_server):
            monkeypatch.setattr(module, "ended_by_signals", self._until_told)
        for module, name in (
            (remax.stages.sft, "run_sft"),
            (remax.stages.reward, "run_reward"),
            (remax.stages.dpo, "run_dpo"),
        ):
            monkeypatch.setattr(module, name, self._shrinking(getattr(module, name)))
        monkeypatch.setattr(ReMaxTrainer, "__init__", self._shrinking(ReMaxTrainer.__init__))
        _remember_servers(monkeypatch, self._servers)
        FakeHub(monkeypatch).answer = {"name": "me", "auth": {"accessToken": {"role": "write"}}}
        self._typed: Iterator[str] = iter(())

    def run(self, words: Sequence[str], *, counts: bool = True) -> tuple[int, str]:
        """Runs `remax WORDS` and returns its exit code and what it printed."""
        self.count += counts
        words = [part for word in words for part in (["--config", "run.yaml"] if word == "..." else [word])]
        self._typed = iter(["Once upon a time"])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), self._in_command():
            code = self._serve(words) if words[0].startswith("serve-") else _main(words)
        return code, printed.getvalue()

    def close(self) -> None:
        """Ends the servers, which must not have ended by themselves, and must end well."""
        ended = [name for thread, _, name in self._threads if not thread.is_alive()]
        for stop in self._stops:
            stop()
        for thread, codes, name in self._threads:
            thread.join(SECONDS_TO_START)
            assert codes == [0], f"{name} ended with {codes}"
        self._stack.close()
        assert not ended, f"ended by themselves: {ended}"

    def reward_address(self, url: str) -> str:
        """Returns where rewards really are that a page has at an address; a server is made unless the page did."""

        def length(completions: list[Any], **columns: Any) -> list[float]:
            return [len(str(completion)) / 10 for completion in completions]

        if (known := self._known(url)) is not None:
            return known
        server = RewardServer(scorer([CallableReward(length)], [1.0]), "127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        return server.url

    def _known(self, url: str) -> str | None:
        port = url.rstrip("/").rsplit(":", 1)[-1].split("/")[0]
        return self.addresses.get(port)

    @contextlib.contextmanager
    def _in_command(self) -> Iterator[None]:
        self._running = True
        try:
            yield
        finally:
            self._running = False

    # What is put in the place of parts of remax ----------------------------------------------------------------------

    def _parse_and_shrink(self, prog: str, *args: Any, **kwargs: Any) -> list[Any] | None:
        settings = self._parse(prog, *args, **kwargs)
        if settings is None:
            return None
        if prog not in ("remax doctor", "remax plan"):  # These only look at the settings of a training.
            for group in settings:
                self._make_room(group)
        return [self._redirected(shrunk(group)) for group in settings]

    def _make_room(self, settings: Any) -> None:
        """Removes what a command would not overwrite: commands of a page that write to the same place are alternatives.

        A run that is to be resumed stays if the page made it; that of the world may have had other models.
        """
        resumes = getattr(settings, "resume", "none") != "none" or isinstance(settings, config.CompareConfig)
        for name in OUTPUTS:
            path = Path(getattr(settings, name, None) or "").absolute()
            if path == Path.cwd() or (resumes and path in self._made):
                continue
            # Neither what other pages share, beneath a link, nor anything of this machine is removed.
            assert path.parent.resolve().is_relative_to(self.home.resolve()), f"{path} is not in the page's folder"
            self._made.add(path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _redirected(self, settings: Any) -> Any:
        """Returns settings whose servers are the stand-ins, on free ports of this machine."""
        changes: dict[str, Any] = {}
        if isinstance(settings, config.ServeConfig | config.ServeVLLMConfig):
            changes = {"host": "127.0.0.1", "port": 0}
            self._asked = str(settings.port)
        elif getattr(settings, "reward_url", None):
            changes = {"reward_url": self.reward_address(settings.reward_url)}
        elif getattr(settings, "vllm_mode", None) == "server":
            url = settings.vllm_server_base_url or f"http://127.0.0.1:{settings.vllm_server_port}"
            if self._known(url) is None:
                assert self._serve(["serve-vllm", "sft/model", "--port", url.rsplit(":", 1)[-1]]) == 0
            changes = {"vllm_server_base_url": self._known(url)}
        if getattr(settings, "judge_url", None):
            changes["judge_url"] = self._stack.enter_context(fake_endpoint(longer))[0]
        return dataclasses.replace(settings, **changes)

    @staticmethod
    def _check_launch(options: config.LaunchOptions) -> bool:
        """There are no GPUs and no other processes here: the launcher's config is read, and one process trains."""
        if options.accelerate_config is not None:
            launch._read(launch._path(options.accelerate_config))
        return False

    def _type(self, prompt: str = "") -> str:
        print(prompt, end="")
        line = next(self._typed, None)
        if line is None:
            raise EOFError
        return line

    def _shrinking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that lowers the settings that Python gives it; those of a command are low by then."""
        names = list(inspect.signature(function).parameters)
        own = "args" if "args" in names else "config"

        def run(*args: Any, **named: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **named}
            if not self._running:
                given[own] = given.get(own) or config.ReMaxConfig()
                self._make_room(given[own])
                given[own] = shrunk(given[own])
            return function(**given)

        return run

    def _serve(self, words: Sequence[str]) -> int:
        """Starts a server in a thread and returns when it serves."""
        self._ready.clear()
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(_main(words)), daemon=True)
        thread.start()
        for _ in range(int(SECONDS_TO_START / 0.05)):
            if self._ready.wait(0.05):
                self._threads.append((thread, codes, " ".join(words)))
                self.addresses[self._asked] = self._servers[-1].url
                return 0
            if not thread.is_alive():
                return codes[0] if codes else 1
        return 1

    @contextlib.contextmanager
    def _until_told(self, stop: Callable[[], Any]) -> Iterator[None]:
        self._stops.append(stop)
        self._ready.set()
        yield


def _remember_servers(monkeypatch: pytest.MonkeyPatch, servers: list[GuardedServer]) -> None:
    own_init = GuardedServer.__init__

    def init(server: GuardedServer, *args: Any, **named: Any) -> None:
        own_init(server, *args, **named)
        servers.append(server)

    monkeypatch.setattr(GuardedServer, "__init__", init)


def _main(words: Sequence[str]) -> int:
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
