"""vLLM's engine around a stand-in for vLLM: seeds, versions, sleep and what is found at the start.

The server is in test_vllm_server.py, what every engine must do in test_engines.py, the real vLLM in tests/with_vllm.
"""

# ruff: noqa: F811

import random

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("engine_conformance")

from engine_conformance import ids_of  # noqa: E402
from fake_vllm import fake_vllm  # noqa: E402, F401
from remax.config import ReMaxConfig, ServeVLLMConfig, VLLMOptions  # noqa: E402
from remax.errors import GuardStop, UserError  # noqa: E402
from remax.rollout.choice import check_vllm, make_vllm_engine  # noqa: E402
from remax.rollout.vllm.engine import VLLMEngine, request_seed  # noqa: E402
from remax.rollout.vllm.local import make_llm  # noqa: E402
from remax.saving import merged_weights  # noqa: E402
from served_vllm import RUN, colocated, draw, llama  # noqa: E402, F401
from tiny_models import tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("fake_vllm")
ON_CPU = torch.device("cpu")


# Seeds, generators and requests


def test_the_seed_of_a_row_depends_on_everything_that_names_it():
    names = [(s, t, p, k) for s in (0, 1) for t in (0, 11) for p in (0, 1, 10) for k in (0, 1)]
    seeds = {request_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(42, -1, 7, 3) == 2091813659785963592


def test_greedy_and_sampled_rows_are_one_list(llama, fake_vllm):
    engine = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True)
    engine.take(merged_weights(llama), 0)
    draw(engine, num_samples=3, greedy=[True, False, True, True, False])
    assert fake_vllm.made[0].calls == ["remax_load", "reset_prefix_cache", "generate"]
    assert fake_vllm.made[0].llm_engine.num_rows_at_once == 5 * 3 + 3


def test_vllm_is_made_for_token_ids_and_the_distribution_that_is_sampled(llama, fake_vllm):
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


def test_weights_are_pushed_once_a_version(llama, fake_vllm):
    engine = VLLMEngine(colocated(llama), vocab_size=97, run_id=RUN, sends=True)
    for version in (0, 0, 1, 1, 2):
        engine.take(merged_weights(llama), version)
        engine.release()
    assert fake_vllm.made[0].calls == ["remax_load", "reset_prefix_cache"] * 3


def test_asleep_it_has_no_weights(llama, fake_vllm):
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


# Checks at the start


def test_no_more_is_asked_for_than_the_models_context(llama, fake_vllm):
    arguments = {"run_id": RUN, "sends": True, "num_processes": 1, "together": lambda work: work()}
    for settings, length in (({}, 256), ({"max_prompt_length": 9, "max_completion_length": 5}, 14)):
        make_vllm_engine(llama, ReMaxConfig(rollout_engine="vllm", **settings), ON_CPU, **arguments)
        assert fake_vllm.made[-1].settings["max_model_len"] == length
    make_vllm_engine(llama, ReMaxConfig(rollout_engine="vllm", vllm_max_model_length=99), ON_CPU, **arguments)
    assert fake_vllm.made[-1].settings["max_model_len"] == 99


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
