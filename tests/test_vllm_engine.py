"""vLLM's engine around a stand-in for vLLM: seeds, versions, sleep, the server and everything that goes wrong with it.

What every engine must do is in test_engines.py; the real vLLM is in tests/vllm.
"""

import json
import random
import socket
import threading
import time
import urllib.request
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import SAMPLING, assert_same, ids_of, make_prompts  # noqa: E402
from fake_vllm import fake_vllm  # noqa: E402, F401
from remax.config import ReMaxConfig, ServeVLLMConfig, VLLMOptions  # noqa: E402
from remax.errors import GuardStop, UserError  # noqa: E402
from remax.interfaces import Prompt, Sampling  # noqa: E402
from remax.rollout.choice import check_vllm, make_vllm_engine  # noqa: E402
from remax.rollout.vllm import client, server  # noqa: E402
from remax.rollout.vllm.client import RemoteVLLM  # noqa: E402
from remax.rollout.vllm.engine import VLLMEngine, request_seed  # noqa: E402
from remax.rollout.vllm.local import colocate, make_llm  # noqa: E402
from remax.rollout.vllm.server import VLLMServer  # noqa: E402
from remax.saving import merged_weights  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("fake_vllm")
ON_CPU = torch.device("cpu")
RUN = "0123456789abcdef"


def colocated(model: Any, **settings: Any) -> Any:
    args = VLLMOptions(**settings)
    return colocate(model, args, dtype="float32", max_length=64, device=torch.device("cpu"), num_processes=1)


def draw(engine: VLLMEngine, **settings: Any) -> Any:
    settings = {"num_samples": 2, "greedy": True, "seed": 0, "step": 0, **settings}
    return engine.generate(make_prompts(), SAMPLING, **settings)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


class Served:
    """A server in this process, which can be ended and started again at the same port."""

    def __init__(self, model: Any) -> None:
        self.model, self.port = model, 0
        self.start()

    def start(self) -> None:
        self.server = VLLMServer("127.0.0.1", self.port)
        self.port = self.server.server_address[1]
        self.llm = colocated(self.model).llm
        self.drawing = self.server.begin(self.llm)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        try:
            self.drawing.run()
        except RuntimeError as error:
            self.broke = str(error)

    def end(self) -> None:
        self.server.shutdown()
        self.drawing.stop()
        self.server.close()

    def engine(self, *, run: str = RUN, sends: bool = True, **settings: Any) -> VLLMEngine:
        return VLLMEngine(self.remote(**settings), vocab_size=97, run_id=run, sends=sends)

    def remote(self, **settings: Any) -> RemoteVLLM:
        self.waits: list[float] = []
        settings = {"timeout_seconds": 4.0, "sleep": self.waits.append, "jitter": lambda: 0.0, **settings}
        return RemoteVLLM(self.server.url, **settings)


@pytest.fixture
def served(llama, fake_vllm):  # noqa: F811
    served = Served(llama)
    yield served
    served.end()


# Seeds, generators and requests


def test_the_seed_of_a_row_depends_on_everything_that_names_it():
    names = [(s, t, p, k) for s in (0, 1) for t in (0, 11) for p in (0, 1, 10) for k in (0, 1)]
    seeds = {request_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(42, -1, 7, 3) == 2091813659785963592


def test_greedy_and_sampled_rows_are_one_list(llama, fake_vllm):  # noqa: F811
    engine = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True)
    engine.take(merged_weights(llama), 0)
    draw(engine, num_samples=3, greedy=[True, False, True, True, False])
    assert fake_vllm.made[0].calls == ["remax_load", "reset_prefix_cache", "generate"]
    assert fake_vllm.made[0].llm_engine.num_rows_at_once == 5 * 3 + 3


def test_vllm_is_made_for_token_ids_and_the_distribution_that_is_sampled(llama, fake_vllm):  # noqa: F811
    colocated(llama, vllm_gpu_memory_utilization=0.4)
    settings = fake_vllm.made[0].settings
    assert settings["logprobs_mode"] == "processed_logprobs"
    assert settings["generation_config"] == "vllm"
    assert settings["load_format"] == "dummy"
    assert (settings["dtype"], settings["max_model_len"], settings["gpu_memory_utilization"]) == ("float32", 64, 0.4)


def test_the_random_numbers_of_the_process_are_left_alone(llama):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    engine = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True)
    engine.take(merged_weights(llama), 0)
    draw(engine)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


# Weights and sleep


def test_weights_are_pushed_once_a_version(llama, fake_vllm):  # noqa: F811
    engine = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True)
    for version in (0, 0, 1, 1, 2):
        engine.take(merged_weights(llama), version)
        engine.release()
    assert fake_vllm.made[0].calls == ["remax_load", "reset_prefix_cache"] * 3


def test_asleep_it_has_no_weights(llama, fake_vllm):  # noqa: F811
    with pytest.raises(UserError, match="vLLM can sleep on CUDA only"):
        colocated(llama, vllm_enable_sleep_mode=True)
    local = colocated(llama)
    local._sleeps = local.llm.settings["enable_sleep_mode"] = True
    engine = VLLMEngine(local, vocab_size=97, run_id=RUN, sends=True)
    engine.take(merged_weights(llama), 0)
    first = draw(engine)
    engine.release()
    engine.release()
    with pytest.raises(GuardStop, match="other weights"):
        draw(engine)
    engine.take(merged_weights(llama), 0)  # The version that it had before it slept.
    assert ids_of(draw(engine).samples) == ids_of(first.samples)
    awake = ["remax_load", "reset_prefix_cache", "generate"]
    woken = ["wake_up weights", "remax_load", "wake_up kv_cache", "reset_prefix_cache", "generate"]
    assert local.llm.calls == [*awake, "sleep 2", *woken]


def test_unknown_weights_are_a_users_mistake(llama):
    engine = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True)
    asked = []

    def weights():
        for name in ("no.such.weight", "another"):
            asked.append(name)
            yield name, torch.zeros(1)

    with pytest.raises(UserError, match="cannot take the policy's weights"):
        engine.take(weights(), 0)
    assert asked == ["no.such.weight", "another"]  # Other processes wait for every one of them.
    engine.take(merged_weights(llama), 0)
    assert draw(engine).samples


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


def test_no_more_is_asked_for_than_the_models_context(llama, fake_vllm):  # noqa: F811
    arguments = {"run_id": RUN, "sends": True, "num_processes": 1, "together": lambda work: work()}
    for settings, length in (({}, 256), ({"max_prompt_length": 9, "max_completion_length": 5}, 14)):
        make_vllm_engine(llama, ReMaxConfig(rollout_engine="vllm", **settings), ON_CPU, **arguments)
        assert fake_vllm.made[-1].settings["max_model_len"] == length
    make_vllm_engine(llama, ReMaxConfig(rollout_engine="vllm", vllm_max_model_length=99), ON_CPU, **arguments)
    assert fake_vllm.made[-1].settings["max_model_len"] == 99


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


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'remax-rlhf\[vllm\]'"):
        check_vllm(ReMaxConfig(rollout_engine="vllm"), "some/model")


def test_a_model_that_vllm_does_not_know_is_said():
    with pytest.raises(UserError, match=r"vLLM cannot run the model here \(ValueError: Model architectures"):
        colocated(tiny_model("bloom"))
    with pytest.raises(UserError, match="--model is some/folder"):
        make_llm("some/folder", ServeVLLMConfig(), dtype="float32", flag="--model is some/folder")


def test_weights_with_other_names_in_files_are_refused(llama, monkeypatch):
    arguments = {"run_id": RUN, "sends": True, "num_processes": 1, "together": lambda work: work()}
    assert (
        make_vllm_engine(llama, ReMaxConfig(rollout_engine="vllm"), ON_CPU, **arguments).program
        == "vLLM in this process"
    )
    from transformers import AutoModelForCausalLM, MixtralConfig

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    mixture = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, num_local_experts=2)
    )
    with pytest.raises(UserError, match="weights of a MixtralForCausalLM have other names"):
        make_vllm_engine(mixture, ReMaxConfig(rollout_engine="vllm"), ON_CPU, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_tensor_parallel_size": 2}, "--vllm_tensor_parallel_size is 2: .*--vllm_mode server"),
        ({"vllm_server_port": 0}, "--vllm_server_port is 0"),
        ({"vllm_server_base_url": "localhost"}, "--vllm_server_base_url leads to localhost: that is no address"),
        ({"vllm_server_base_url": "http://a:b@c"}, "--vllm_server_base_url has a user"),
        ({"vllm_server_host": "a b"}, "--vllm_server_host leads to http://a b:8000"),
        ({"vllm_importance_sampling_clip_max": 0.5}, "--vllm_importance_sampling_clip_max is 0.5"),
        ({"max_logprob_gap": 0.0}, "--max_logprob_gap is 0.0"),
        ({"vllm_gpu_memory_utilization": 1.5}, "--vllm_gpu_memory_utilization is 1.5"),
        ({"vllm_server_timeout": 0.0}, "--vllm_server_timeout is 0.0"),
    ],
)
def test_bad_settings_are_said(settings, message):
    with pytest.raises(UserError, match=message) as error:
        VLLMOptions(**settings)
    assert "a:b" not in str(error.value)


def test_addresses():
    assert VLLMOptions().vllm_url == "http://127.0.0.1:8000"
    assert VLLMOptions(vllm_server_host="::1", vllm_server_port=1).vllm_url == "http://[::1]:1"
    assert VLLMOptions(vllm_server_base_url="https://h/x/").vllm_url == "https://h/x"


def test_other_commands_refuse_vllm():
    from remax.config import EvaluateConfig

    with pytest.raises(UserError, match="--rollout_engine is vllm: only a training draws with vLLM"):
        EvaluateConfig(rollout_engine="vllm")
