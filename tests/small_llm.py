"""A LLaMA of random weights with a head of its own and SmolLM2's tokenizer: as fast as a language model can be in a test."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from udfs.model_files import find_model


def build(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # so that attention attends to something
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(find_model("smollm2").directory).save_pretrained(folder)
    return folder
