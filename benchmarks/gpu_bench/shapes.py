"""Shapes of models, what decoding and training them take at least, and what devices can do by their datasheets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAD = 2
DATASHEET = (
    (r"GH200", 4.0, 989),
    (r"H200 NVL", 4.8, 835),
    (r"H200", 4.8, 989),
    (r"H100 PCIe", 2.0, 756),
    (r"H100 NVL", 3.9, 835),
    (r"H[18]00", 3.35, 989),
    (r"\bB200", 8.0, 2250),
    (r"A[18]00.*80GB PCIe", 1.935, 312),
    (r"A[18]00.*80GB", 2.039, 312),
    (r"A[18]00", 1.555, 312),
    (r"L40S", 0.864, 362),
    (r"RTX 4090", 1.008, 165),
    (r"RTX 3090", 0.936, 71),
    (r"\bA10G?\b", 0.6, 125),
    (r"\bL4\b", 0.3, 121),
)
"""Device name, memory bandwidth in TB/s, dense bf16 TFLOP/s with float32 sums; the first that matches counts."""


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs and rotary positions."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied: bool = False

    def config(self) -> Any:
        """Returns the config that transformers makes such a model from."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=PAD,
            num_labels=1,
        )

    @property
    def head_size(self) -> int:
        """Of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def layer_weights(self) -> int:
        """Weights of the layers' matrices: each is multiplied with every token."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        """Weights of the language-model head."""
        return self.vocab_size * self.hidden_size

    def decode_bytes(self, rows: int, context: float) -> float:
        """Returns the bytes that decoding one token of each row has to read: all weights in bf16, and the rows' keys
        and values of that many tokens."""
        cache = 2 * self.num_layers * self.num_kv_heads * self.head_size * 2
        return 2 * (self.layer_weights + self.head_weights) + rows * context * cache

    def training_flops(self, rows: Sequence[tuple[int, int]]) -> float:
        """Returns the operations of a forward and a backward pass over rows of (prompt, completion) tokens.

        6 per weight and token, where the head has completion tokens only; and for attention, of which causality needs
        half, 6 n^2 x heads x head size in each layer. Recomputation and padding count as nothing.
        """
        tokens, targets = sum(p + c for p, c in rows), sum(c for _, c in rows)
        attention = sum((p + c) ** 2 for p, c in rows) * self.num_heads * self.head_size * self.num_layers
        return 6.0 * (self.layer_weights * tokens + self.head_weights * targets + attention)


LLAMA_7B = Shape("llama-2-7b", "llama", 32000, 4096, 11008, 32, 32, 32)
LLAMA_1B = Shape("llama-1.1b", "llama", 32000, 2048, 5632, 22, 32, 4)
QWEN_1B = Shape("qwen-1.5b", "qwen2", 151936, 1536, 8960, 28, 12, 2, tied=True)
QWEN_HALF = Shape("qwen-0.5b", "qwen2", 151936, 896, 4864, 24, 14, 2, tied=True)
TOY = Shape("toy llama", "llama", 300, 32, 64, 2, 4, 2)
TOY_QWEN = Shape("toy qwen", "qwen2", 500, 32, 64, 2, 4, 2, tied=True)


def datasheet(name: str) -> tuple[float | None, float | None]:
    """Returns bytes/s and bf16 FLOP/s of a device by its name; None of one that is not in the table."""
    found = next(((b, f) for pattern, b, f in DATASHEET if re.search(pattern, name)), None)
    return (found[0] * 1e12, found[1] * 1e12) if found else (None, None)
