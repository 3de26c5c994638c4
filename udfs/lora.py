"""LoRA (Hu et al. 2021, arXiv 2106.09685) in the language model, trained jointly with FilterLLM's mapper and vocabulary, or
with A-LLMRec's first stage.

Adapters sit on the query and value projections of attention, as in FilterLLM (arXiv 2502.16924, settings), or on every
linear layer. After training they are saved as safetensors and, to encode, merged into the weights. On a GPU the language
model, and nothing else of the training, computes in bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

from schemas.errors import ColdRefreshError
from udfs.devices import forked
from udfs.encoder_actor import EncoderSpec
from udfs.text_encoder import TextEncoder, batches

# How model families call the two projections: LLaMA and its kin, BERT and its kin, MPNet.
_PROJECTIONS = (("q_proj", "v_proj"), ("query", "value"), ("q", "v"))
_WEIGHTS, _CONFIG = "adapter.safetensors", "adapter.json"


class LoraError(ColdRefreshError):
    """Adapters cannot be put into this model, or saved ones do not fit it: the message says which."""


Targets = Literal["attention", "all_linear"]


def attach(
    encoder: TextEncoder, *, rank: int, alpha: int, dropout: float, seed: int, targets: Targets = "attention"
) -> None:
    """Put adapters into `encoder.model`, in place; they alone are trainable, and change nothing until trained.

    Args:
        targets: attention: the query and value projections; all_linear: every linear layer that the vectors go through.

    Raises:
        LoraError: the model has no such layers that are known here.
    """
    _attach(encoder, _layers(encoder, targets), rank=rank, alpha=alpha, dropout=dropout, seed=seed)


def _attach(encoder: TextEncoder, layers: list[str], *, rank: int, alpha: int, dropout: float, seed: int) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers)
    with forked(encoder.device):
        torch.manual_seed(seed)
        encoder.model = get_peft_model(encoder.model, config).to(encoder.device)


def _layers(encoder: TextEncoder, targets: Targets) -> list[str]:
    """Names of the layers that get adapters, as peft takes them."""
    kind = encoder.recipe.model_type
    if targets == "all_linear":
        # The pooler, where there is one, comes behind the hidden states that are read here.
        linear = [n for n, m in encoder.model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
        if not linear:
            raise LoraError(f"a {kind} model has no linear layers that LoRA can adapt. Set lora: false")
        return linear
    names = {name.rsplit(".", 1)[-1] for name, _ in encoder.model.named_modules()}
    found = next((pair for pair in _PROJECTIONS if names >= set(pair)), None)
    if found is None:
        raise LoraError(
            f"LoRA needs attention projections called one of {_PROJECTIONS}; a {kind} model has none of them. "
            "Set lora_targets: all_linear beside it, or lora: false"
        )
    return list(found)


class LoraTexts(nn.Module):
    """Hidden states of texts under an encoder with adapters (`attach`), for the trainings of FilterLLM and of A-LLMRec's alignment.

    lengths: [n] int64, tokens of each text.
    """

    def __init__(self, encoder: TextEncoder, texts: Sequence[str]) -> None:
        super().__init__()
        self.model = encoder.model
        self._encoder, self._texts = encoder, encoder.tokens(texts)
        self.lengths = np.array([len(tokens) for tokens in self._texts], np.int64)

    def forward(self, index: np.ndarray) -> torch.Tensor:
        """[B, width] float32 of the texts numbered `index`; texts of similar length go through the model together."""
        order, found = [], []
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(self._encoder.device).type == "cuda"):
            for rows in batches(self.lengths[index].tolist(), self._encoder.batch_tokens, self._encoder.device):
                order += rows
                found.append(self._encoder.forward([self._texts[index[row]] for row in rows]))
        # Each row's place among what was computed.
        return torch.cat(found)[torch.from_numpy(np.argsort(order)).to(found[0].device)]


def dump(encoder: TextEncoder) -> dict[str, bytes]:
    """The adapters as files: adapter.safetensors and adapter.json."""
    from peft import get_peft_model_state_dict

    tensors = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(encoder.model).items()}
    config = encoder.model.peft_config["default"]
    facts = {"rank": config.r, "alpha": config.lora_alpha, "layers": sorted(config.target_modules)}
    body = json.dumps(facts, indent=1)
    return {_WEIGHTS: safetensors.torch.save(tensors), _CONFIG: body.encode()}


def merge(encoder: TextEncoder, files: dict[str, bytes]) -> None:
    """Put the saved adapters into `encoder.model`, in place: it encodes as the trained model did.

    Raises:
        LoraError: the files are unreadable, or were made for another model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        config: dict[str, Any] = json.loads(files[_CONFIG])
        tensors = safetensors.torch.load(files[_WEIGHTS])
        _attach(encoder, config["layers"], rank=config["rank"], alpha=config["alpha"], dropout=0.0, seed=0)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise LoraError(f"saved adapters cannot be read: {error}; remove the model's folder and train again") from error
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(encoder.model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise LoraError(
            f"saved adapters do not fit this language model: {len(different)} tensors differ, the first {different[0]}"
        )
    set_peft_model_state_dict(encoder.model, tensors)
    settle(encoder)


def settle(encoder: TextEncoder) -> None:
    """Ready to encode: adapters are added to weights of float32, and stay beside those of bfloat16, which would round them away."""
    if all(parameter.dtype == torch.float32 for parameter in encoder.model.parameters()):
        encoder.model = encoder.model.merge_and_unload()
    encoder.model.eval()


class AdaptedEncoderActor:
    """A worker for `udfs.actor_pool.map_ordered`: a shard is a list of texts, its result [n, width] float32."""

    def __init__(self, spec: EncoderSpec, expected_version: str, files: dict[str, bytes], device: str) -> None:
        """`files` are those of `dump`; raises ModelError as `EncoderSpec.load`, and LoraError as `merge` does."""
        self._encoder = spec.load(expected_version, device)
        merge(self._encoder, files)

    def work(self, shard: list[str]) -> np.ndarray:
        return self._encoder.encode(shard)
