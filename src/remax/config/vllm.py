"""Settings of the vLLM rollout engine, in a training and of its server, `remax serve-vllm`."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from remax.config.groups import LONGEST_TIMEOUT_SECONDS, DType
from remax.errors import UserError
from remax.options import Options
from remax.untrusted import shown

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that holds the API key of `remax serve-vllm`."""


@dataclass(frozen=True)
class VLLMModelOptions(Options):
    """vLLM's memory and lengths"""

    vllm_gpu_memory_utilization: float = 0.3
    """Fraction of the GPU's memory for vLLM: its weights and its cache of keys and values."""
    vllm_max_model_length: int | None = None
    """Longest prompt and completion together, in tokens; by default --max_prompt_length plus --max_completion_length,
    and of a server the context of its model."""
    vllm_tensor_parallel_size: int = 1
    """GPUs that share one copy of the model; more than 1 takes a server."""

    def _check(self) -> None:
        self._require(
            0 < self.vllm_gpu_memory_utilization <= 1,
            "vllm_gpu_memory_utilization",
            "there is no such fraction",
            "a number in (0, 1]",
        )
        self._require(
            self.vllm_max_model_length is None or self.vllm_max_model_length > 1,
            "vllm_max_model_length",
            "no prompt could be continued",
            "2 or more",
        )
        self._require(
            self.vllm_tensor_parallel_size > 0, "vllm_tensor_parallel_size", "there is no GPU", "a number of GPUs"
        )


@dataclass(frozen=True)
class VLLMOptions(VLLMModelOptions):
    """vLLM (with --rollout_engine vllm)"""

    vllm_mode: Literal["colocate", "server"] = "colocate"
    """colocate: every process has an engine of its own, on its own GPU; server: all ask one `remax serve-vllm`. The
    server's API key, if it has one, is in the environment variable VLLM_API_KEY."""
    vllm_server_base_url: str | None = None
    """Address of the server, as http://127.0.0.1:8000; instead of --vllm_server_host and --vllm_server_port."""
    vllm_server_host: str = "127.0.0.1"
    """Host of the server."""
    vllm_server_port: int = 8000
    """Port of the server."""
    vllm_server_timeout: float = 240.0
    """Seconds that a server is waited for which does not answer, or whose vLLM is at one step or one load so long."""
    vllm_enable_sleep_mode: bool | None = None
    """Whether a colocated engine gives its memory back between rollouts; by default where vLLM can (on CUDA)."""
    vllm_importance_sampling_correction: bool = True
    """Weigh every completion by the ratio of its probabilities in training and in vLLM: exact up to the clipping of
    --vllm_importance_sampling_clip_max. With --method ppo there is such a ratio anyway."""
    vllm_importance_sampling_clip_max: float = 3.0
    """Largest such ratio."""
    max_logprob_gap: float = 0.1
    """Largest mean difference between the log-probabilities of a step's sampled tokens in training and in vLLM, in nats
    per token; the step that exceeds it is not taken, and the run saves its state and stops."""

    @property
    def vllm_url(self) -> str:
        """Where the server is."""
        if self.vllm_server_base_url is not None:
            return self.vllm_server_base_url.rstrip("/")
        host = f"[{self.vllm_server_host}]" if ":" in self.vllm_server_host else self.vllm_server_host
        return f"http://{host}:{self.vllm_server_port}"

    def _check(self) -> None:
        self._require(
            0 < self.vllm_server_port < 65536, "vllm_server_port", "there is no such port", "a number from 1 to 65535"
        )
        self._require(
            0 < self.vllm_server_timeout <= LONGEST_TIMEOUT_SECONDS,
            "vllm_server_timeout",
            "no server can be waited for so long",
            f"seconds up to {LONGEST_TIMEOUT_SECONDS}",
        )
        self._require(
            self.vllm_importance_sampling_clip_max >= 1,
            "vllm_importance_sampling_clip_max",
            "completions that vLLM draws as often as the policy does would count for less",
            "1 or more",
        )
        self._require(self.max_logprob_gap > 0, "max_logprob_gap", "every step would exceed it", "a number such as 0.1")
        self._require(
            self.vllm_tensor_parallel_size == 1 or self.vllm_mode == "server",
            "vllm_tensor_parallel_size",
            "with --vllm_mode colocate every process has an engine of its own, on one GPU",
            "1, or --vllm_mode server and start the server with it",
        )
        _check_url(self.vllm_url, "vllm_server_host" if self.vllm_server_base_url is None else "vllm_server_base_url")


def _check_url(url: str, flag: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if "@" in url or "?" in url or "#" in url:
        raise UserError(
            f"--{flag} has a user, a password or a query in it (an @, ? or #), which would be written to config.yaml; "
            f"leave it out, and set the environment variable {KEY_VARIABLE}."
        )
    if not usable or not (url.isascii() and url.isprintable() and " " not in url):
        raise UserError(
            f"--{flag} leads to {shown(url)}: that is no address of a server; set one such as http://127.0.0.1:8000."
        )


@dataclass(frozen=True)
class ServeVLLMInputs(Options):
    """Model"""

    model: str
    """The model that the trainings start from: a folder or a hub name. It may stand without the flag:
    `remax serve-vllm MODEL`."""


@dataclass(frozen=True)
class ServeVLLMConfig(VLLMModelOptions):
    """Server"""

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a key in the environment variable VLLM_API_KEY, here
    and where the training runs."""
    port: int = 8000
    """Port to listen on; 0 for a free one, which is printed."""
    dtype: DType = "float32"
    """Type of the weights and of the arithmetic: what the training computes in, so bfloat16 with its --bf16."""
    vllm_gpu_memory_utilization: float = 0.9
    """Fraction of the GPU's memory for vLLM: its weights and its cache of keys and values."""

    def _check(self) -> None:
        self._require(0 <= self.port < 65536, "port", "there is no such port", "a number below 65536, or 0")
