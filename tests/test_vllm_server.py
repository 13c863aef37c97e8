"""vLLM behind a server: the same rows as beside the training, the right weights, restarts, and what it refuses."""

# ruff: noqa: F811

import json
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import SAMPLING, assert_same  # noqa: E402
from fake_vllm import fake_vllm  # noqa: E402, F401
from remax.config import ReMaxConfig, ServeVLLMConfig, VLLMOptions  # noqa: E402
from remax.errors import GuardStop, UserError  # noqa: E402
from remax.interfaces import Prompt, Sampling  # noqa: E402
from remax.rollout.choice import check_vllm  # noqa: E402
from remax.rollout.vllm import client, server  # noqa: E402
from remax.rollout.vllm.client import RemoteVLLM  # noqa: E402
from remax.rollout.vllm.engine import VLLMEngine  # noqa: E402
from remax.rollout.vllm.server import VLLMServer  # noqa: E402
from remax.saving import merged_weights  # noqa: E402
from served_vllm import RUN, Served, colocated, draw, llama  # noqa: E402, F401
from tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("fake_vllm")


@pytest.fixture
def served(llama, fake_vllm):
    served = Served(llama)
    yield served
    served.end()


def test_only_one_process_sends_and_all_fail_together(llama, served):
    done = []

    def together(work):
        work()
        done.append(True)

    engine = VLLMEngine(served.remote(), vocab_size=97, run_id=RUN, sends=False, together=together)
    names = []
    engine.take(((names.append(name), (name, t))[1] for name, t in merged_weights(llama)), 3)
    assert len(names) == len(list(merged_weights(llama)))
    assert done == [True]
    assert served.llm.calls == []
    served.engine().take(merged_weights(llama), 3)
    assert draw(engine).samples


# The server


def test_server_and_colocated_engine_draw_the_same(llama, served):
    here, there = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True), served.engine()
    with torch.no_grad():
        other = tiny_model("llama")
        for parameter in other.parameters():
            parameter.mul_(0.9)
    for version, model in enumerate((llama, other)):
        rollouts = []
        for engine in (here, there):
            engine.take(merged_weights(model), version)
            rollouts.append(draw(engine, step=version))
        assert rollouts[0] == rollouts[1]  # Tokens and, through JSON, log-probabilities to the last bit.


def test_weights_arrive_in_parts_and_in_the_servers_type(llama, served, monkeypatch):
    monkeypatch.setattr(client, "PART_BYTES", 20_000)
    sizes = []
    own = client.save
    monkeypatch.setattr(client, "save", lambda tensors: (sizes.append(len(tensors)), own(tensors))[1])
    served.server.health["dtype"] = "bfloat16"
    served.engine().take(merged_weights(llama), 0)
    assert len(sizes) > 2
    assert sum(sizes) == len(llama.state_dict())
    pushed = served.llm.llm_engine.model.state_dict()
    for name, tensor in llama.state_dict().items():
        assert torch.equal(pushed[name], tensor.bfloat16().float())
    assert list(served.server.folder.iterdir()) == []


def test_rows_of_several_processes_share_a_batch(llama, served):
    engine = served.engine()
    engine.take(merged_weights(llama), 0)
    others = [served.engine(sends=False) for _ in range(3)]
    for other in others:
        other.take(iter(()), 0)
    hold, own_step = threading.Event(), served.llm.llm_engine.step
    served.llm.llm_engine.step = lambda: (hold.wait(10), own_step())[1]
    results = {}
    threads = [
        threading.Thread(target=lambda n=n, e=e: results.update({n: draw(e, step=n)})) for n, e in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    while served.drawing._inbox.qsize() + len(served.drawing._jobs) < 3:
        time.sleep(0.01)
    hold.set()
    for thread in threads:
        thread.join(20)
    assert served.llm.llm_engine.num_rows_at_once == 3 * 15
    for n in range(3):
        assert_same(results[n], draw(engine, step=n))


def test_weights_wait_for_rows_that_are_being_drawn(llama, served):
    engine = served.engine()
    engine.take(merged_weights(llama), 0)
    before, results = draw(engine), []
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.8)
    hold, own_step = threading.Event(), served.llm.llm_engine.step
    served.llm.llm_engine.step = lambda: (hold.wait(10), own_step())[1]
    drawing = threading.Thread(target=lambda: results.append(draw(engine)))
    pushing = threading.Thread(target=lambda: served.engine().take(merged_weights(other), 1))
    drawing.start()
    while not served.drawing._jobs:
        time.sleep(0.01)
    pushing.start()
    while served.drawing._inbox.empty():
        time.sleep(0.01)
    hold.set()
    drawing.join(20)
    pushing.join(20)
    assert_same(results[0], before)
    assert served.remote().holds() == f"{RUN}-1"


def test_a_restarted_server_gets_the_weights_again(llama, served):
    engine = served.engine()
    engine.take(merged_weights(llama), 4)
    before = draw(engine)
    served.end()
    served.start()
    engine.take(merged_weights(llama), 4)  # The same version, as before an evaluation.
    assert draw(engine) == before
    assert served.llm.calls == ["remax_load_files", "reset_prefix_cache"]


def test_a_restart_in_the_middle_of_a_rollout_stops_the_run(llama, served):
    engine = served.engine()
    engine.take(merged_weights(llama), 4)
    served.end()
    served.start()
    with pytest.raises(GuardStop, match=r"holds other weights than the policy.*--resume auto"):
        draw(engine)
    assert served.waits == []  # Waiting would not help.


def test_two_trainings_at_one_server_never_get_each_others_weights(llama, served):
    one, other = served.engine(), served.engine(run="fedcba9876543210")
    one.take(merged_weights(llama), 0)
    other.take(merged_weights(llama), 0)
    with pytest.raises(GuardStop, match="holds other weights"):
        draw(one)
    one.take(merged_weights(llama), 0)
    assert draw(one).samples


def test_a_dead_server_is_waited_for_and_then_named(llama, served, capsys):
    engine = served.engine(timeout_seconds=10.0)
    engine.take(merged_weights(llama), 0)
    served.end()
    for action in (lambda: draw(engine), lambda: engine.take(merged_weights(llama), 1)):
        served.waits.clear()
        with pytest.raises(GuardStop, match=rf"{served.server.url} does not answer .*for 10 s.*--resume auto") as stop:
            action()
        assert served.waits == [1.0, 2.0, 4.0, 3.0]
        assert "\n" not in str(stop.value)
    assert capsys.readouterr().out.count("Waiting for the vLLM server") == 2


def test_waits_are_shortened_at_random(served):
    remote = served.remote(timeout_seconds=2.0, jitter=lambda: 0.5)
    served.end()
    with pytest.raises(GuardStop):
        remote.holds()
    assert served.waits == [0.75, 1.25]


def test_a_server_that_comes_back_is_used(llama, served):
    engine = served.engine(sleep=lambda seconds: served.start() if served.gone else None)
    served.gone = True
    served.end()

    def back(seconds: float) -> None:
        if served.gone:
            served.gone = False
            served.start()

    engine._backend._sleep = back
    engine.take(merged_weights(llama), 0)
    assert draw(engine).samples


def test_a_broken_vllm_ends_the_server_and_tells_who_waits(llama, served):
    engine = served.engine()
    engine.take(merged_weights(llama), 0)

    def broken() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    served.llm.llm_engine.step = broken
    with pytest.raises(GuardStop, match=r"answered 500 .*vLLM broke: CUDA error"):
        draw(engine)
    assert served.broke == "CUDA error: an illegal memory access"


def test_what_vllm_cannot_draw_is_said(llama, served):
    engine = served.engine()
    engine.take(merged_weights(llama), 0)
    bad = [Prompt(0, "", [1]), Prompt(1, "", [1] * 64)]
    with pytest.raises(GuardStop, match=r"answered 400 \(The prompt \(length 64\) is longer"):
        engine.generate(bad, SAMPLING, num_samples=1, greedy=False, seed=0, step=0)
    assert not served.llm.llm_engine.has_unfinished_requests()
    assert draw(engine).samples


# Keys and addresses


def test_the_key_guards_everything(llama, served, monkeypatch):
    served.end()
    monkeypatch.setenv("VLLM_API_KEY", "right")
    served.start()
    served.engine().take(merged_weights(llama), 0)
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    for action in (
        lambda: served.remote().holds(),
        lambda: draw(served.engine()),
        lambda: served.remote()._ask(lambda: served.remote()._exchange("PUT", f"/weights/{RUN}-1/1", b"x")),
        lambda: served.remote()._ask(lambda: served.remote()._exchange("POST", "/load", b"{}")),
    ):
        with pytest.raises(GuardStop, match="does not take the key of the environment variable VLLM_API_KEY") as stop:
            action()
        assert "wrong" not in str(stop.value)
        assert "right" not in str(stop.value)
    monkeypatch.setenv("VLLM_API_KEY", "two words")
    with pytest.raises(UserError, match="characters that no key can have"):
        served.remote()


def test_it_listens_on_loopback_or_with_a_key(monkeypatch):
    assert ServeVLLMConfig().host == VLLMOptions().vllm_server_host == "127.0.0.1"
    with pytest.raises(UserError, match=r"--host is 0.0.0.0: everybody .* VLLM_API_KEY"):
        VLLMServer("0.0.0.0", 0)
    with pytest.raises(UserError, match="cannot listen there"), socket.create_server(("127.0.0.1", 0)) as taken:
        VLLMServer("127.0.0.1", taken.getsockname()[1])


def test_another_sites_page_is_refused(served):
    for headers, status in (({"Host": "evil.example"}, 403), ({}, 200)):
        request = urllib.request.Request(f"{served.server.url}/health", headers=headers)
        try:
            got = urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            got = error.code
        assert got == status


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status"),
    [
        ("GET", "/nothing", None, "", 404),
        ("PUT", f"/weights/{RUN}-1/../../x", b"x", client.TENSORS, 404),
        ("PUT", "/weights/../1", b"x", client.TENSORS, 404),
        ("PUT", f"/weights/{RUN}-1/1", b"x", client.JSON, 415),
        ("POST", "/draw", b"{}", "text/plain", 415),
        ("POST", "/draw", b"[", client.JSON, 400),
        ("POST", "/draw", b"[]", client.JSON, 400),
        ("POST", "/draw", b'{"version": 99}', client.JSON, 400),
        ("POST", "/draw", b'{"version": 1, "prompts": [[-1]], "rows": []}', client.JSON, 400),
        ("POST", "/load", b'{"stamp": "../x", "parts": 1}', client.JSON, 400),
        ("POST", "/load", json.dumps({"stamp": f"{RUN}-1", "parts": 2}).encode(), client.JSON, 409),
    ],
)
def test_bad_requests_are_refused_and_the_server_lives(llama, served, method, path, body, kind, status):
    with pytest.raises(client._NoAnswer) as error:
        served.remote()._exchange(method, path, body, kind)
    assert str(status) in str(error.value) or (status == 409 and "restarted while" in str(error.value))
    assert served.remote().holds() == ""


@pytest.mark.parametrize("change", [{"prompts": [[]]}, {"rows": [[5, 1]]}, {"rows": [[0, -1]]}, {"top_p": "x"}])
def test_requests_are_checked(change):
    right = {"version": 1, "stamp": "", "prompts": [[1]], "rows": [[0, None], [0, 3]], "eos_token_ids": [2]}
    right |= {"max_completion_length": 2, "temperature": 1, "top_p": 1, "top_k": 0}
    assert server.parse_request(right).sampling == Sampling(2, (2,))
    with pytest.raises(server.Refusal):
        server.parse_request({**right, **change})


# Checks at the start


def test_the_servers_model_must_be_the_policys(llama, served):
    settings = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": served.server.url}
    short = {"max_prompt_length": 30, "max_completion_length": 20, "vllm_server_timeout": 1e-3}
    check_vllm(ReMaxConfig(**settings, **short), llama)
    with pytest.raises(UserError, match=r"--model has vocab_size 64: .* has 97, .* start the server with the same"):
        check_vllm(ReMaxConfig(**settings, **short), tiny_model("llama", vocab_size=64))
    with pytest.raises(UserError, match="model_type qwen2"):
        check_vllm(ReMaxConfig(**settings, **short), tiny_model("qwen2"))
    with pytest.raises(UserError, match="tie_word_embeddings True"):
        check_vllm(ReMaxConfig(**settings, **short), tiny_model("llama", tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"add up to 80 tokens: .* takes 64; .*--vllm_max_model_length 80"):
        check_vllm(ReMaxConfig(**settings, **short | {"max_prompt_length": 60}), llama)


def test_a_server_that_is_not_there_or_is_another_is_said(monkeypatch):
    settings = {"rollout_engine": "vllm", "vllm_mode": "server", "vllm_server_timeout": 1e-3}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        UserError, match=rf"the vLLM server at http://127.0.0.1:{port} does not answer.*serve-vllm MODEL"
    ):
        check_vllm(ReMaxConfig(**settings, vllm_server_port=port), SimpleNamespace())
    monkeypatch.setattr(RemoteVLLM, "_exchange", lambda *_, **__: {"status": "ok", "version": 1})
    with pytest.raises(UserError, match="is no `remax serve-vllm` of protocol version 1"):
        check_vllm(ReMaxConfig(**settings), SimpleNamespace())
