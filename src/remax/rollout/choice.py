"""Which rollout engine a run uses: the one that was asked for, or the one that should be fastest here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoConfig

from remax.config import ReMaxConfig
from remax.errors import UserError
from remax.interfaces import RolloutEngine
from remax.rollout.embedded import EmbeddedEngine
from remax.rollout.vllm.client import RemoteVLLM
from remax.rollout.vllm.engine import Backend, VLLMEngine, describe_model
from remax.rollout.vllm.local import colocate, require_vllm


def make_engine(
    name: Literal["auto", "embedded", "paged"],
    policy: Any,
    *,
    pad_token_id: int,
    max_rows: int = 0,
    bf16: bool = False,
) -> tuple[RolloutEngine, str]:
    """Returns the engine and, for the user to read, which one it is and why.

    auto takes the paged engine only where a kernel reads its pages in place, with flash attention on CUDA: otherwise
    each new token is compared with the keys of all rows under a mask, and the embedded engine does less work.

    bf16: whether the run is under bfloat16 autocast. Raises UserError if the engine that was asked for cannot be used.
    """
    reason = "as --rollout_engine says"
    if name == "paged":
        slow = "" if _has_flash_attention(policy) else "; slow without --attn_implementation flash_attention_2"
        return _paged_engine(policy, max_rows, bf16), f"paged, {reason}{slow}"
    if name == "auto" and policy.device.type != "cuda":
        reason = f"for the model is on the {policy.device.type}"
    elif name == "auto" and not _has_flash_attention(policy):
        reason = "for the paged engine gains nothing without flash attention (a rule, not a measurement)"
    elif name == "auto":
        try:
            engine = _paged_engine(policy, max_rows, bf16)
        except UserError as error:
            reason = f"for another cannot be used: {error}"
        else:
            return engine, "paged, for flash attention reads its pages in place (a rule, not a measurement)"
    return EmbeddedEngine(policy, pad_token_id=pad_token_id, max_rows=max_rows), f"embedded, {reason}"


def _paged_engine(policy: Any, max_rows: int, bf16: bool) -> RolloutEngine:
    if policy.device.type != "cuda":
        raise UserError(
            f"--rollout_engine is paged: it is made for CUDA, and the model is on the {policy.device.type}; set "
            "--rollout_engine embedded."
        )
    try:
        from remax.rollout.paged import PagedEngine, float32_under_autocast
    except ImportError as error:
        raise UserError(
            f"--rollout_engine is paged: it does not know the continuous batching of transformers "
            f"{transformers.__version__} ({error}); set --rollout_engine embedded."
        ) from error
    if bf16 and policy.dtype == torch.float32:
        raise float32_under_autocast()
    return PagedEngine(policy, max_rows=max_rows)


def _has_flash_attention(policy: Any) -> bool:
    return "flash" in str(policy.config._attn_implementation)


# vLLM -----------------------------------------------------------------------------------------------------------------


def check_vllm(args: ReMaxConfig, model: Any) -> None:
    """Returns if vLLM is there, and if a server has the model; before weights are read.

    Raises:
        UserError: it is not installed, the server does not answer, or it has another model.
    """
    if args.vllm_mode == "colocate":
        require_vllm("--rollout_engine vllm")
        return
    config = getattr(model, "config", None)
    if isinstance(model, str) and not (Path(model) / "adapter_config.json").exists():
        config = AutoConfig.from_pretrained(model)
    # An adapter's model is known when it is loaded, and is compared then.
    if config is None:
        _server(args).check({}, longest=0)
    else:
        _server(args).check(describe_model(config), longest=_longest(args, config))


def make_vllm_engine(
    policy: Any,
    args: ReMaxConfig,
    device: torch.device,
    *,
    run_id: str,
    sends: bool,
    num_processes: int,
    together: Callable[[Callable[[], None]], None],
) -> VLLMEngine:
    """Returns the engine of --vllm_mode, having said which it is.

    device: of the training; a policy that will be sharded is not there yet. run_id, together: see VLLMEngine.
    sends: whether this process pushes weights to a server.

    Raises:
        UserError: the model or the server cannot be used.
    """
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    _require_names_of_files(base)
    dtype = "bfloat16" if args.bf16 else str(base.dtype).removeprefix("torch.")
    backend: Backend
    if args.vllm_mode == "server":
        backend = server = _server(args)
        theirs = server.check(describe_model(base.config), longest=_longest(args, base.config))
        if theirs != dtype:
            print(f"{server.name} computes in {theirs}, the training in {dtype}: their log-probabilities will differ.")
    else:
        sends = True
        backend = colocate(
            base,
            args,
            dtype=dtype,
            max_length=args.vllm_max_model_length or _longest(args, base.config),
            device=device,
            num_processes=num_processes,
        )
    print(f"Rollout engine: {backend.name}, as --rollout_engine says.")
    vocab_size = int(base.config.get_text_config().vocab_size)
    return VLLMEngine(backend, vocab_size=vocab_size, run_id=run_id, sends=sends, together=together)


def _server(args: ReMaxConfig) -> RemoteVLLM:
    return RemoteVLLM(args.vllm_url, timeout_seconds=args.vllm_server_timeout)


def _longest(args: ReMaxConfig, config: Any) -> int:
    """Returns how long a row may be; rows that do not fit in the model's context have been refused."""
    needed = args.max_prompt_length + args.max_completion_length
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(needed, context) if context else needed


def _require_names_of_files(base: Any) -> None:
    """Raises UserError for a model whose weights have other names in memory than in files, which vLLM knows."""
    from transformers.core_model_loading import revert_weight_conversion

    weights = {name: tensor.to("meta") for name, tensor in base.state_dict().items()}
    if revert_weight_conversion(base, weights).keys() != weights.keys():
        raise UserError(
            f"--rollout_engine is vllm: the weights of a {type(base).__name__} have other names and shapes in memory "
            "than in files, and handing them over is not supported; set --rollout_engine embedded."
        )
