"""vLLM in this process: beside the training (colocated), or inside the server. Nothing else imports vllm."""

import copy
import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from remax.config.vllm import VLLMModelOptions, VLLMOptions
from remax.errors import GuardStop, UserError
from remax.rollout.vllm.engine import Drawn, Request, Weights
from remax.untrusted import shown

WORKER = "remax.rollout.vllm.worker.TakesWeights"


class LocalVLLM:
    """A vllm.LLM that takes weights and draws rows."""

    name = "vLLM in this process"

    def __init__(self, llm: Any, *, sleeps: bool = False) -> None:
        """sleeps: whether it gives its memory back between rollouts."""
        self.llm, self._sleeps = llm, sleeps
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._asleep, self._stamp = False, ""

    def holds(self) -> str:
        """Returns the stamp of the weights that were loaded last; asleep it has none."""
        return self._stamp

    def load(self, weights: Weights, stamp: str) -> None:
        """Takes weights from this process.

        Raises:
            UserError: vLLM does not know such weights.
        """
        self._load("remax_load", weights, stamp)

    def load_files(self, folder: str, stamp: str) -> None:
        """Likewise from a folder of safetensors files."""
        self._load("remax_load_files", folder, stamp)

    def _load(self, method: str, weights: Any, stamp: str) -> None:
        self._stamp = ""
        if self._asleep:
            self.llm.wake_up(tags=["weights"])
        try:
            self.llm.collective_rpc(method, args=(weights,))
        except (KeyError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"--rollout_engine is vllm: it cannot take the policy's weights ({type(error).__name__}: "
                f"{shown(error, 200)}); set --rollout_engine embedded."
            ) from error
        if self._asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        # What it computed for prompts with the former weights would be used again.
        if not self.llm.reset_prefix_cache():
            raise GuardStop("vLLM could not forget what it computed with the former weights; go on with --resume auto.")
        self._stamp = stamp

    def draw(self, request: Request) -> list[Drawn]:
        """Returns one result per row, in order.

        Raises:
            GuardStop: it holds other weights than the request wants, or broke.
        """
        if request.stamp != self._stamp:
            raise GuardStop(f"{self.name} holds other weights than the policy's; go on with --resume auto.")
        prompts, params = requests(request)
        # Autocast is for the policy: vLLM has the precision that it was made with.
        with _same_generators(), torch.autocast(self._device, enabled=False):
            try:
                outputs = self.llm.generate(prompts, params, use_tqdm=False)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what its kernels do not take shows only now
                raise GuardStop(
                    f"{self.name} cannot draw ({shown(error, 250)}); see to that and go on with --resume auto, or set "
                    "--rollout_engine embedded."
                ) from error
        return [drawn(output) for output in outputs]

    def rest(self) -> None:
        """Goes to sleep, if that is wanted: weights and cache are gone until the next load."""
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=2)
            self._asleep, self._stamp = True, ""

    def close(self) -> None:
        """Ends it; while its process ends it could miss what it needs for that, such as groups of processes."""
        self._stamp = ""
        self.llm.llm_engine.engine_core.shutdown()


def requests(request: Request) -> tuple[list[Any], list[Any]]:
    """Returns prompts and sampling parameters as vLLM takes them, one of each per row."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    common = {
        "max_tokens": sampling.max_completion_length,
        "stop_token_ids": list(sampling.eos_token_ids),
        "ignore_eos": True,  # The checkpoint's own EOS is ours if it is in eos_token_ids, and none otherwise.
        "detokenize": False,
        "logprobs": 0,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    greedy = SamplingParams(temperature=0.0, **common)

    def params(seed: int | None) -> Any:
        if seed is None:
            return greedy
        warped = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return SamplingParams(seed=seed, **warped, **common)

    prompts = [{"prompt_token_ids": request.prompts[number]} for number, _ in request.rows]
    return prompts, [params(seed) for _, seed in request.rows]


def drawn(output: Any) -> Drawn:
    """Returns what vLLM drew for one row; of the log-probabilities it gives, those of the tokens themselves."""
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    return Drawn(token_ids, [float(d[t].logprob) for t, d in zip(token_ids, completion.logprobs, strict=True)])


def require_vllm(flag: str) -> None:
    """Raises UserError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{flag} needs vLLM, which is not installed, so nothing can be drawn; install it with "
            "`pip install 'remax-rlhf[vllm]'`."
        )


def colocate(
    policy: Any, args: VLLMOptions, *, dtype: str, max_length: int, device: torch.device, num_processes: int
) -> LocalVLLM:
    """Returns an engine beside the policy, with its architecture and weights that are still to come.

    Raises:
        UserError: vLLM cannot run the model, or cannot sleep here.
    """
    sleeps = device.type == "cuda" if args.vllm_enable_sleep_mode is None else args.vllm_enable_sleep_mode
    if sleeps and device.type != "cuda":
        raise UserError(
            f"--vllm_enable_sleep_mode is true: vLLM can sleep on CUDA only, and the model is on the {device.type}; "
            "leave it out."
        )
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    settings: dict[str, Any] = {"load_format": "dummy", "enable_sleep_mode": sleeps, "max_model_len": max_length}
    if num_processes > 1:  # Processes exist already: vLLM shall not start its own.
        settings["distributed_executor_backend"] = "external_launcher"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return LocalVLLM(
            make_llm(folder, args, dtype=dtype, flag="--rollout_engine is vllm", **settings), sleeps=sleeps
        )


def make_llm(model: str, args: VLLMModelOptions, *, dtype: str, flag: str, **settings: Any) -> Any:
    """Returns a vllm.LLM that knows token ids only and gives the log-probabilities of the distribution it draws from.

    Raises:
        UserError: vLLM cannot run the model here. flag: what the user set, for the message.
    """
    on_cpu = not torch.cuda.is_available()
    # In this process, where weights can be handed over; its progress reports are not about the training.
    defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    if on_cpu:
        # A GiB of cache, and no binding of threads, which would be the training's as well.
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with _same_generators():
        from vllm import LLM

        try:
            return LLM(
                model=model,
                dtype=dtype,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                skip_tokenizer_init=True,
                enforce_eager=on_cpu,
                use_tqdm_on_load=False,
                generation_config="vllm",  # none: our sampling settings are the only ones
                logprobs_mode="processed_logprobs",
                worker_extension_cls=WORKER,
                **settings,
            )
        except Exception as error:
            raise UserError(
                f"{flag}: vLLM cannot run the model here ({type(error).__name__}: {shown(error, 250)}); set another "
                "model or --vllm_gpu_memory_utilization, or --rollout_engine embedded in the training."
            ) from error


@contextmanager
def _same_generators() -> Iterator[None]:
    """Leaves the process' random numbers as they were: vLLM seeds them, and draws from them for rows with own seeds."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
