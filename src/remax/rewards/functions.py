"""Programmed rewards: Python functions with TRL's signature, given as objects or as `file.py:function`."""

import asyncio
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from remax.errors import UserError
from remax.interfaces import Completion

FAILED = float("nan")
"""What a sample gets if its function raised: None would mean "does not apply" and leave the other rewards to stand."""


class CallableReward:
    """Calls f(prompts, completions, completion_ids, **columns) -> list[float | None], sync or async, as TRL does.

    All arguments are keywords and lists with one item per completion; every dataset column is one of them. Besides,
    there are trainer_state, log_extra(column, values) and log_metric(name, value). A function without **kwargs gets
    those that it names.

    If the function raises, all of its completions get NaN, which leaves them out of the loss; num_failures counts
    them, and each distinct error (by type and place) is warned of once. A UserError passes.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None) -> None:
        """Takes the function; name is by default its own."""
        self.function = function
        inner = function.func if isinstance(function, functools.partial) else function
        self.name = str(name or getattr(inner, "__name__", type(inner).__name__))
        self.trainer_state: Any = None
        """What the function gets as trainer_state; the trainer sets it."""
        self.num_failures = 0
        self._errors: set[tuple[Any, ...]] = set()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._extra: dict[str, list[Any]] = defaultdict(list)

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Returns one reward per completion, in order; None where the function does not apply, NaN where it raised.

        Raises:
            UserError: the function cannot be called with these columns, or returned anything but numbers and None.
        """
        arguments = self._arguments(completions)
        try:
            returned = self.function(**arguments)
            if inspect.isawaitable(returned):
                returned = asyncio.run_coroutine_threadsafe(_awaited(returned), _event_loop()).result()
        except UserError:
            raise
        except Exception as error:
            self.num_failures += len(completions)
            self._warn_once(error)
            return [FAILED] * len(completions)
        return self._checked(returned, len(completions))

    def pop_metrics(self) -> dict[str, float]:
        """Returns the mean of every metric that the function logged since the last call."""
        metrics = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        self._metrics.clear()
        return metrics

    def pop_extra(self) -> dict[str, list[Any]]:
        """Returns the columns that the function logged since the last call, in the order of the completions."""
        extra = dict(self._extra)
        self._extra.clear()
        return extra

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
            "log_extra": lambda column, values: self._extra[column].extend(values),
            "log_metric": lambda name, value: self._metrics[name].append(float(value)),
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
        return float(value)

    def _warn_once(self, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        key = (type(error), place.filename, place.lineno)
        if key not in self._errors:
            self._errors.add(key)
            warnings.warn(
                f"{self.name} raised {type(error).__name__}: {error} ({Path(place.filename).name}, line "
                f"{place.lineno}); its completions have no reward and are left out.",
                stacklevel=3,
            )


def _described(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


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
    source, separator, name = spec.rpartition(":")
    if not (source and separator and name):
        raise UserError(f"--reward_funcs has {spec}: that names no function; set path/to/file.py:function.")
    module = _module_from_file(source, spec) if source.endswith(".py") else _module_by_name(source, spec)
    function = vars(module).get(name)
    if function is None:
        raise UserError(f"--reward_funcs has {spec}: {source} has no function {name}; {_advice(module, name)}.")
    if inspect.isclass(function) or not callable(function):
        kind = "a class" if inspect.isclass(function) else _described(function)
        raise UserError(f"--reward_funcs has {spec}: {name} is {kind}, not a function; {_advice(module, name)}.")
    return CallableReward(function, name=name)


def _module_from_file(source: str, spec: str) -> ModuleType:
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"--reward_funcs has {spec}: there is no file {source}; set path/to/file.py:function.")
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
    except Exception as error:
        del sys.modules[module_name]
        raise _import_error(error, spec, str(path)) from error
    return module


def _module_by_name(source: str, spec: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise _import_error(error, spec, source) from error


def _make_importable(folder: Path) -> None:
    """Lets reward files import their neighbours; at the end of the path, so that they cannot hide a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_error(error: Exception, spec: str, source: str) -> UserError:
    if isinstance(error, SyntaxError):
        reason = f"{error.msg}, line {error.lineno}"
    else:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == Path(source)]
        reason = f"{type(error).__name__}: {error}" + (f", line {lines[-1]}" if lines else "")
    return UserError(f"--reward_funcs has {spec}: {source} cannot be imported ({reason}); correct it.")


def _advice(module: ModuleType, name: str) -> str:
    functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
    close = difflib.get_close_matches(name, functions, n=1)
    if close:
        return f"did you mean {close[0]}"
    return f"it has {', '.join(functions)}" if functions else "it has no functions"
