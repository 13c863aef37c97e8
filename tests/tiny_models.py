"""Random causal language models of many architectures, small enough for tests and lively enough to be told apart."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 97
SLIDING_WINDOW = 8

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_OWN_NAMES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32}

_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, _SIZES),
    "qwen2": (Qwen2Config, _SIZES),
    "qwen3": (Qwen3Config, _SIZES),
    "mistral": (MistralConfig, {**_SIZES, "sliding_window": SLIDING_WINDOW}),
    "gemma": (GemmaConfig, _SIZES),
    "gemma2": (
        Gemma2Config,
        {
            **_SIZES,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (Phi3Config, _SIZES),
    "gpt_neox": (GPTNeoXConfig, {**_SIZES, "rotary_pct": 0.5}),
    "gpt2": (GPT2Config, {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": (
        OPTConfig,
        {
            **_OWN_NAMES,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
        },
    ),
    # No position_ids in forward: positions come from the attention mask (ALiBi).
    "bloom": (BloomConfig, {**_OWN_NAMES, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}),
}
ARCHITECTURES = list(_CONFIGS)


def tiny_model(name: str, **config_overrides: Any) -> PreTrainedModel:
    """Returns a model of the architecture on the CPU, float32, evaluation mode, with the same weights at every call.

    Its matrices are larger than an initialisation's, so that logits have a spread of a few nats and greedy decoding
    wanders through the vocabulary; biases are not zero. There are no special tokens unless overridden.
    """
    config_class, settings = _CONFIGS[name]
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = config_class(**{**special, **settings, **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    gain = 2.0 if VOCAB_SIZE in parameter.shape else 4.0
                    parameter.normal_(0.0, gain / parameter.shape[1] ** 0.5)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
