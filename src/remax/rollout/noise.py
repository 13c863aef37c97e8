"""Sampling noise that depends on what is sampled, never on what else is in the batch: a counter-based generator."""

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit number, as all constants here
_FIRST = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_SECOND = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def uniforms(seed: int, step: int, prompt_index: Tensor, sample_index: Tensor, position: int | Tensor) -> Tensor:
    """Returns one uniform of [0, 1) per key, float64 with 53 random bits, in the broadcast shape of the tensors.

    The keys are chained: the state starts at 0, and each key k replaces it by output number k + 1 of the SplitMix64
    generator (Steele, Lea, Flood 2014) seeded with it, so that neighbouring keys give unrelated numbers. Only integer
    arithmetic modulo 2^64 is involved: the bits are the same on every device and in every batch.
    """
    state = torch.zeros((), dtype=torch.int64, device=prompt_index.device)
    for key in (seed, step, prompt_index, sample_index, position):
        # A 0-dimensional state does not promote a narrower index, which would then overflow at its own width.
        number = key.long() if isinstance(key, Tensor) else _signed(key)
        state = _mix(state + (number + 1) * _GOLDEN)
    return _shift(state, 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """Returns the finaliser of SplitMix64, a bijection of 64-bit integers."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Returns z shifted right with zeros coming in: `>>` alone would repeat the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> Tensor:
    """Returns a Python integer modulo 2^64 as a 0-dimensional tensor, whose arithmetic wraps around."""
    return torch.tensor((number + 2**63) % 2**64 - 2**63)
