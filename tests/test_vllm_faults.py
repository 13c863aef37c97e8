"""A vLLM server that hangs, is slow, is asked twice or keeps what is left of a push: how long it is waited for."""

# ruff: noqa: F811

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import SAMPLING, assert_same  # noqa: E402
from fake_vllm import fake_vllm  # noqa: E402, F401
from remax.errors import GuardStop  # noqa: E402
from remax.rollout.vllm import client  # noqa: E402
from remax.rollout.vllm.client import RemoteVLLM  # noqa: E402
from remax.rollout.vllm.engine import Request  # noqa: E402
from remax.saving import merged_weights  # noqa: E402
from served_vllm import RUN, Served, draw, llama  # noqa: E402, F401
from tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("fake_vllm")
REAL_TIME = {"sleep": time.sleep, "clock": time.monotonic}
OTHER_RUN = "f" * 16
REQUEST = Request([[1, 2]], [(0, None)], SAMPLING, f"{RUN}-0")


@pytest.fixture
def served(llama: Any, fake_vllm: Any) -> Iterator[Served]:
    served = Served(llama)
    yield served
    served.end()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is looked after often, and has to say quickly how it is."""
    monkeypatch.setattr(client, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(client, "SECONDS_FOR_HEALTH", 0.1)


def start(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Returns a thread that works, and a list that gets what comes of it."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def hold(place: Any, name: str) -> threading.Event:
    """Lets a method wait for the event that is returned."""
    event, own = threading.Event(), getattr(place, name)
    setattr(place, name, lambda *arguments, **named: (event.wait(10), own(*arguments, **named))[1])
    return event


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


# How long it is waited for


@pytest.mark.parametrize(("first", "waits"), [(10.0, [1.0, 2.0, 4.0, 8.0, 5.0]), (3600.0, [1.0, 2.0, 4.0, 8.0, 5.0])])
def test_the_time_that_failing_attempts_take_counts(first: float, waits: list[float]) -> None:
    """60 seconds from the first failure on, however long a draw had lasted until it failed."""
    now, waited, lasts = [0.0], [], [first]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        pass_time(seconds)

    def attempt() -> None:
        pass_time(lasts.pop() if lasts else 10.0)
        raise client._NoAnswer("does not answer in time", True)

    url = "http://127.0.0.1:1"
    remote = RemoteVLLM(url, timeout_seconds=60.0, sleep=sleep, clock=lambda: now[0], jitter=lambda: 0.0)
    with pytest.raises(GuardStop, match="does not answer in time, for 60 s"):
        remote._ask(attempt)
    assert waited == waits
    assert now[0] == first + 60 + 10, "what has begun by then is ended"


@pytest.mark.parametrize("what", ["draw", "weights"])
def test_a_server_that_hangs_is_given_up(what: str, looks: None) -> None:
    """Its machine takes connections, and nobody answers them."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as nobody:
        remote = RemoteVLLM(f"http://127.0.0.1:{nobody.getsockname()[1]}", timeout_seconds=0.5)
        body = bytes(2**26)  # More than fits into buffers on the way.
        asks = {
            "draw": lambda: remote.draw(REQUEST),
            "weights": lambda: remote._ask(lambda: remote._exchange("PUT", f"/weights/{RUN}-0/1", body)),
        }
        thread, results = start(asks[what])
        thread.join(20)
        assert not thread.is_alive()
    assert isinstance(results[0], GuardStop)
    assert "does not answer in time, for 0.5 s; see to that" in str(results[0])


@pytest.mark.parametrize("what", ["draw", "load"])
def test_a_vllm_that_hangs_behind_a_server_that_answers_is_given_up(llama, served, looks, what) -> None:
    engine = served.engine(timeout_seconds=0.5, **REAL_TIME)
    engine.take(merged_weights(llama), 0)
    go_on = hold(served.llm.llm_engine, "step") if what == "draw" else hold(served.llm, "collective_rpc")
    thread, results = start(lambda: draw(engine) if what == "draw" else engine.take(merged_weights(llama), 1))
    thread.join(5)
    assert not thread.is_alive()
    go_on.set()
    assert isinstance(results[0], GuardStop)
    assert "has been at one step, or at taking weights, for 0.5 s (--vllm_server_timeout)" in str(results[0])


def test_a_long_draw_is_not_cut_off(llama, served, looks) -> None:
    """It takes several times the limit; its steps do not, nor does the server stay silent for so long."""
    engine = served.engine(timeout_seconds=0.5, **REAL_TIME)
    engine.take(merged_weights(llama), 0)
    expected = draw(engine)
    own_step, own_health, looked = served.llm.llm_engine.step, engine._backend._health, []
    served.llm.llm_engine.step = lambda: (time.sleep(0.1), own_step())[1]

    def health() -> Any:
        looked.append(len(looked))
        if len(looked) % 2:
            raise client._NoAnswer("does not answer in time", True)
        return own_health()

    engine._backend._health = health
    started = time.monotonic()
    assert_same(draw(engine), expected)
    assert time.monotonic() - started > 2 * 0.5
    assert len(looked) > 4


def test_a_server_says_how_long_it_has_been_at_it(llama, served) -> None:
    served.engine().take(merged_weights(llama), 0)
    assert served.remote()._health()["busy_seconds"] == 0
    go_on = hold(served.llm.llm_engine, "step")
    thread, _ = start(lambda: served.remote().draw(REQUEST))
    wait_until(lambda: served.remote()._health()["busy_seconds"] > 0.2)
    go_on.set()
    thread.join(10)
    wait_until(lambda: served.remote()._health()["busy_seconds"] == 0)


# What is left of a push


def files(served: Served) -> list[str]:
    folder = served.server.folder
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def put(served: Served, stamp: str, part: int, tensors: Any = None) -> None:
    body = save(tensors or {"x": torch.ones(3)})
    served.remote()._exchange("PUT", f"/weights/{stamp}/{part}", body, client.TENSORS)


def test_what_is_left_of_a_push_makes_room_for_the_next(llama, served, monkeypatch) -> None:
    put(served, f"{OTHER_RUN}-7", 1)
    put(served, f"{OTHER_RUN}-7", 2)
    assert files(served) == [f"{OTHER_RUN}-7/00000{part}.safetensors" for part in (1, 2)]
    put(served, f"{RUN}-0", 1)
    assert files(served) == [f"{RUN}-0/000001.safetensors"]
    monkeypatch.setattr(client, "PART_BYTES", 20_000)
    engine = served.engine()
    engine.take(merged_weights(llama), 1)
    assert draw(engine).samples
    assert list(served.server.folder.iterdir()) == []


def test_of_a_part_that_does_not_arrive_nothing_is_left(served) -> None:
    with socket.create_connection(served.server.server_address[:2]) as connection:
        lines = [f"PUT /weights/{RUN}-0/1 HTTP/1.1", "Host: localhost", f"Content-Type: {client.TENSORS}"]
        connection.sendall("\r\n".join([*lines, "Content-Length: 3000000", "", ""]).encode() + bytes(2_000_000))
        wait_until(lambda: files(served) != [])
        assert not any(name.startswith(f"{RUN}-0/0") for name in files(served)), "it is no part before it is whole"
    wait_until(lambda: files(served) == [])


def test_a_load_that_is_asked_for_twice_is_one(llama, served) -> None:
    """As when a proxy has lost patience: the client asks again while the weights are being taken."""
    stamp = f"{RUN}-0"
    put(served, stamp, 1, {name: tensor.clone() for name, tensor in merged_weights(llama)})
    go_on = hold(served.llm, "collective_rpc")
    body = json.dumps({"stamp": stamp, "parts": 1}).encode()
    asked = [start(lambda: served.remote()._exchange("POST", "/load", body)) for _ in range(3)]
    wait_until(lambda: served.drawing.busy_seconds > 0.3)
    go_on.set()
    for thread, results in asked:
        thread.join(10)
        assert results == [{"holds": stamp}]
    assert served.llm.calls == ["remax_load_files", "reset_prefix_cache"]
    assert len(served.remote().draw(REQUEST)) == 1
    assert files(served) == []


def test_weights_that_are_being_taken_stay_until_they_are(llama, served) -> None:
    """Another training's push begins meanwhile."""
    other = tiny_model("llama")
    go_on = hold(served.llm, "collective_rpc")
    first, of_first = start(lambda: served.engine().take(merged_weights(llama), 0))
    wait_until(lambda: served.drawing.busy_seconds > 0)
    second, of_second = start(lambda: served.engine(run=OTHER_RUN).take(merged_weights(other), 0))
    time.sleep(0.3)
    assert files(served) == [f"{RUN}-0/000001.safetensors"]
    go_on.set()
    first.join(10)
    second.join(10)
    assert of_first == of_second == [None]
    assert served.remote().holds() == f"{OTHER_RUN}-0"
    assert files(served) == []
