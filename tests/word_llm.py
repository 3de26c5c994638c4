"""A LLaMA of random weights that knows the words of A-LLMRec's prompts only: small enough to be trained around in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_PROMPT = "is a user representation . : This has bought nothing these items so far Recommend one item for this to buy next from The"
_WIDTH = 64


def build(folder: Path, titles: list[str]) -> Path:
    words = sorted(set(" ".join([_PROMPT, *titles]).split()))
    tokenizer = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(["[BOS]", "[UNK]", "\n", *words])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", unk_token="[UNK]")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=_WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            # Decided logits, as a trained model's are, and layers that neither drown nor are drowned by what they read.
            gain = 4.0 if name.startswith("lm_head") else 1.0
            weight.data.normal_(std=gain * _WIDTH**-0.5, generator=generator)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
