"""Which rollout engine a run uses: the one that was asked for, or the one that should be fastest here."""

from typing import Any, Literal

import torch
import transformers

from remax.errors import UserError
from remax.interfaces import RolloutEngine
from remax.rollout.embedded import EmbeddedEngine


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
