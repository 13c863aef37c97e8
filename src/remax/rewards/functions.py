"""Programmed rewards: Python functions with TRL's signature, given as objects or as `file.py:function`."""

import asyncio
import concurrent.futures
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from remax.errors import UserError
from remax.interfaces import Completion
from remax.rewards.programmed import ProgrammedReward
from remax.untrusted import shown

EXTRAS = {"math_verify": 'pip install "remax-rlhf[math]"', "reasoning_gym": 'pip install "remax-rlhf[reasoning]"'}
"""Packages that recipes use in their reward functions, and how to install them."""
SECONDS_TO_CANCEL = 1.0
"""How long an async function may take to end after it was cancelled."""


class Result(NamedTuple):
    """What one call of a function gave."""

    rewards: list[float | None]
    metrics: dict[str, list[float]]
    """What it logged with log_metric, by name."""
    extra: dict[str, list[Any]]
    """What it logged with log_extra, by column."""


class CallableReward(ProgrammedReward):
    """Calls f(prompts, completions, completion_ids, **columns) -> list[float | None], sync or async, as TRL does.

    All arguments are keywords and lists with one item per completion; every dataset column is one of them. Besides,
    there are trainer_state, log_extra(column, values) and log_metric(name, value). A function without **kwargs gets
    those that it names.

    If the function raises, all of its completions get NaN, which leaves them out of the loss; num_failures counts
    them, and each distinct error (by type and place) is warned of once. A UserError passes.

    The function runs in this process. An async one is cancelled after timeout_seconds; one that is not async cannot be
    stopped from here and has no limit: IsolatedReward gives it one.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, timeout_seconds: float = 0.0) -> None:
        """Takes the function; name is by default its own. timeout_seconds: 0 for no limit."""
        self.function = function
        inner = function.func if isinstance(function, functools.partial) else function
        super().__init__(str(name or getattr(inner, "__name__", type(inner).__name__)), timeout_seconds)

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; None where the function does not apply, NaN where it raised.

        Raises:
            UserError: the function cannot be called with these columns, or returned anything but numbers and None.
        """
        try:
            result = self.call(completions)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            return self._missing(len(completions), *describe_error(error))
        self._log(result.metrics, result.extra)
        return result.rewards

    def call(self, completions: Sequence[Completion]) -> Result:
        """Returns what the function gives and logs for these completions; its exceptions pass.

        Raises:
            UserError: the function cannot be called with these columns, or returned anything but numbers and None.
        """
        metrics: dict[str, list[float]] = defaultdict(list)
        extra: dict[str, list[Any]] = defaultdict(list)
        arguments = self._arguments(completions)
        logging = {
            "log_extra": lambda column, values: extra[column].extend(values),
            "log_metric": lambda name, value: metrics[name].append(float(value)),
        }
        returned = self.function(**arguments | {name: log for name, log in logging.items() if name in arguments})
        if inspect.isawaitable(returned):
            returned = _wait_for(returned, self.timeout_seconds)
        return Result(self._checked(returned, len(completions)), metrics, extra)

    def _arguments(self, completions: Sequence[Completion]) -> dict[str, Any]:
        columns = completions[0].prompt.columns if completions else {}
        arguments: dict[str, Any] = {
            name: [c.prompt.columns[name] for c in completions]
            for name in columns
            if name not in ("prompt", "completion", "completion_ids")
        }
        arguments |= {
            "prompts": [c.prompt.content for c in completions],
            "completions": [c.content for c in completions],
            "completion_ids": [c.token_ids for c in completions],
            "trainer_state": self.trainer_state,
            "log_extra": None,
            "log_metric": None,
        }
        try:
            signature = inspect.signature(self.function)
        except (ValueError, TypeError):  # some builtins have none
            return arguments
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            arguments = {name: value for name, value in arguments.items() if name in signature.parameters}
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise UserError(
                f"--reward_funcs has {self.name}{signature}: it cannot be called ({error}); name only prompts, "
                "completions, completion_ids, trainer_state, log_extra, log_metric and columns of the dataset "
                f"({', '.join(columns) or 'there are none beside the prompt'})."
            ) from error
        return arguments

    def _checked(self, returned: Any, number: int) -> list[float | None]:
        expected = f"return a list of {number} numbers or None, one per completion"
        if hasattr(returned, "tolist"):
            returned = returned.tolist()
        if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
            raise UserError(f"--reward_funcs has {self.name}: it returned {_described(returned)}; {expected}.")
        if len(returned) != number:
            raise UserError(f"--reward_funcs has {self.name}: it returned {len(returned)} rewards; {expected}.")
        return [self._number(value, expected) for value in returned]

    def _number(self, value: Any, expected: str) -> float | None:
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if value is None:
            return None
        if not isinstance(value, bool | int | float):
            raise UserError(f"--reward_funcs has {self.name}: one reward is {_described(value)}; {expected}.")
        try:
            return float(value)
        except OverflowError:  # a whole number beyond the largest float
            return math.inf


def describe_error(error: BaseException) -> tuple[str, tuple[Any, ...]]:
    """Returns what a function's error is, in words, and what tells it from others: its type and place."""
    if isinstance(error, TookTooLong):
        return str(error), (TookTooLong.__name__,)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"raised {type(error).__name__}: {shown(error)} ({where})", (type(error).__name__, where)


def _described(value: Any) -> str:
    return f"a {type(value).__name__} ({shown(repr(value), 60)})"


# Async functions ------------------------------------------------------------------------------------------------------


class TookTooLong(Exception):
    """A call exceeded its limit."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"took longer than the {seconds:g} s of --reward_timeout_seconds")


def _wait_for(awaitable: Any, seconds: float) -> Any:
    """Returns what an awaitable gives; cancels it after so many seconds, unless they are 0.

    Raises:
        TookTooLong: it took longer.
    """
    future = asyncio.run_coroutine_threadsafe(_limited(awaitable, seconds), _event_loop())
    try:
        return future.result(seconds + SECONDS_TO_CANCEL if seconds else None)
    except concurrent.futures.TimeoutError:
        if future.done():  # It is the function's own.
            raise
        # The function blocks the loop instead of waiting in it: it cannot be cancelled, only left behind.
        _event_loop.cache_clear()
        raise TookTooLong(seconds) from None


async def _limited(awaitable: Any, seconds: float) -> Any:
    task = asyncio.ensure_future(_without_exit(awaitable))
    done, _ = await asyncio.wait({task}, timeout=seconds or None)
    if not done:
        task.cancel()
        raise TookTooLong(seconds)
    return task.result()


async def _without_exit(awaitable: Any) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # It would end the loop, and later calls would wait for ever.
        raise RuntimeError(f"it asked to exit ({error})") from error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns a loop that runs in a thread of its own: the caller's thread may run one already, as notebooks do."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="remax-rewards", daemon=True).start()
    return loop


# Loading by name ------------------------------------------------------------------------------------------------------


def load_reward_function(spec: str) -> CallableReward:
    """Returns the function that `path/to/file.py:function` or `package.module:function` names.

    Raises:
        UserError: there is no such file or module, it cannot be imported, or has no such function.
    """
    source, name = split_spec(spec)
    module = _module_from_file(source, spec) if source.endswith(".py") else _module_by_name(source, spec)
    function = vars(module).get(name)
    if function is None:
        raise UserError(f"--reward_funcs has {spec}: {source} has no function {name}; {_advice(module, name)}.")
    if inspect.isclass(function) or not callable(function):
        kind = "a class" if inspect.isclass(function) else _described(function)
        raise UserError(f"--reward_funcs has {spec}: {name} is {kind}, not a function; {_advice(module, name)}.")
    reward = CallableReward(function, name=name)
    reward.source_digest = digest_of_source(source)
    return reward


def digest_of_source(source: str) -> str:
    """Returns a digest of a file of functions; empty for a module, which is more than a file."""
    if not source.endswith(".py"):
        return ""
    try:
        return hashlib.sha256(Path(source).expanduser().read_bytes()).hexdigest()[:16]
    except OSError:  # The import will tell.
        return ""


def split_spec(spec: str) -> tuple[str, str]:
    """Returns the file or module and the function that a text names, having checked what needs no import.

    Raises:
        UserError: it names no function, or there is no such file.
    """
    source, separator, name = spec.rpartition(":")
    if not (source and separator and name):
        raise UserError(f"--reward_funcs has {spec}: that names no function; set path/to/file.py:function.")
    if source.endswith(".py") and not Path(source).expanduser().is_file():
        raise UserError(f"--reward_funcs has {spec}: there is no file {source}; set path/to/file.py:function.")
    return source, name


def _module_from_file(source: str, spec: str) -> ModuleType:
    path = Path(source).expanduser()
    _make_importable(path.resolve().parent)
    # A name that cannot clash with the user's other modules; in sys.modules, or its classes could not be pickled.
    module_name = f"remax_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _import_error(error, spec, str(path)) from error
    return module


def _module_by_name(source: str, spec: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise _import_error(error, spec, source) from error


def _make_importable(folder: Path) -> None:
    """Lets reward files import their neighbours; at the end of the path, so that they cannot hide a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_error(error: BaseException, spec: str, source: str) -> UserError:
    if isinstance(error, ModuleNotFoundError) and (missing := _package_that_is_missing(error, source)):
        # A name is not the name of its package: who guesses may install somebody else's.
        advice = f"run {EXTRAS[missing]}" if missing in EXTRAS else "install what has it, or correct the import"
        return UserError(f"--reward_funcs has {spec}: {source} imports {missing}, which is not installed; {advice}.")
    if isinstance(error, SyntaxError):
        reason = f"{error.msg}, line {error.lineno}"
    else:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == Path(source)]
        reason = f"{type(error).__name__}: {error}" + (f", line {lines[-1]}" if lines else "")
    return UserError(f"--reward_funcs has {spec}: {source} cannot be imported ({reason}); correct it.")


def _package_that_is_missing(error: ModuleNotFoundError, source: str) -> str | None:
    """Returns what an import did not find, if it is all of a package and not the user's own module."""
    name = error.name or ""
    return None if "." in name or name == source.partition(".")[0] else name


def _advice(module: ModuleType, name: str) -> str:
    functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
    close = difflib.get_close_matches(name, functions, n=1)
    if close:
        return f"did you mean {close[0]}"
    return f"it has {', '.join(functions)}" if functions else "it has no functions"
