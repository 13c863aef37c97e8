"""Writes a policy and a reward model of one size with random weights: for time and memory, not for quality.

    python benchmarks/random_models.py --tokenizer FOLDER --output models --hidden_size 512 --layers 8

leaves models/policy and models/reward, which `remax compare --accounting` and `remax compare` take.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder or hub name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--positions", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=options.positions,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    for name, model_class in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        model = model_class(config)
        model.save_pretrained(options.output / name)
        tokenizer.save_pretrained(options.output / name)
        print(f"{options.output / name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
