"""Texts -> vectors with a frozen language model: an encoder pooled as its configuration says, or a causal LM's last token.

Batching changes only how sums are rounded: one text's float32 vector differs by less than 1e-5 (relative to its length)
between batches, sides of padding and orders of input; bfloat16 vectors by about 1e-2. The same call on the same machine
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from udfs.encoder_recipe import Recipe, read_recipe
from udfs.model_files import ModelError

# More characters than any sensible text has per token: what is cut here would be truncated as tokens anyway.
CHARACTERS_A_TOKEN = 64
# From so many tokens on a larger batch is no faster a token, and rows shorter than this share of the longest begin a new one.
_WORTH_A_BATCH, _ALIKE = {"cpu": 512, "cuda": 8192}, 0.85


def readable(text: str, max_tokens: int) -> str:
    """What the encoder reads of `text`: at most 64 characters a token, so that a text of 10 MB costs no more than a page.

    Lone surrogates, which no tokenizer takes, become U+FFFD.
    """
    cut = text[: max_tokens * CHARACTERS_A_TOKEN]
    return cut.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextEncoder:
    """A model in memory. `width` is the length of its vectors."""

    def __init__(
        self,
        directory: Path | str,
        *,
        pooling: Literal["auto", "mean", "last_token", "cls"] = "auto",
        max_tokens: int = 128,
        batch_tokens: int = 8192,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        """Load the model of `directory` (config.json, safetensors, tokenizer; see `udfs.model_files.find_model`).

        Args:
            batch_tokens: tokens of a batch, padding included.
            device: where torch runs: cpu, cuda, cuda:1.
            padding_side: the result does not depend on it (beyond rounding).

        Raises:
            ModelError: the files cannot be loaded, or name a pooling that is not known here.
        """
        self.recipe: Recipe = read_recipe(Path(directory), pooling=pooling, max_tokens=max_tokens, dtype=dtype)
        self.batch_tokens, self.device, self.padding_side = batch_tokens, device, padding_side
        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, **safe)
            self.model = AutoModel.from_pretrained(directory, dtype=getattr(torch, dtype), use_safetensors=True, **safe)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            raise ModelError(f"the model in {directory} cannot be loaded: {error}") from error
        self.model.eval().to(device)
        self._tokenizer.truncation_side = "right"
        special = [self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, self._tokenizer.bos_token_id]
        # Padding is masked, so which token pads does not matter; one that exists is needed.
        self._pad = next((token for token in special if token is not None), 0)
        self._empty = next((token for token in reversed(special) if token is not None), 0)

    @property
    def width(self) -> int:
        return self.recipe.width

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of `texts`, [n, width] float32, in their order. An empty text has a vector too.

        Raises:
            ModelError: a vector is not finite (weights that overflow in this dtype).
        """
        vectors = np.empty((len(texts), self.width), np.float32)
        tokens = self.tokens(texts)
        for rows in batches([len(ids) for ids in tokens], self.batch_tokens, self.device):
            with torch.inference_mode():
                vectors[rows] = self.forward([tokens[row] for row in rows]).cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if broken.size:
            raise ModelError(
                f"{broken.size} of {len(texts)} vectors are not finite in {self.recipe.dtype}; set text.dtype: float32"
            )
        return vectors

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token numbers of each text, at least one, at most recipe.max_tokens."""
        if not len(texts):
            return []
        clean = [readable(text, self.recipe.max_tokens) for text in texts]
        if self.recipe.lowercase:
            clean = [text.lower() for text in clean]
        ids = self._tokenizer(
            clean, truncation=True, max_length=self.recipe.max_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]
        return [list(row) or [self._empty] for row in ids]

    def forward(self, tokens: list[list[int]]) -> torch.Tensor:
        """Vectors of one batch, [n, width] float32, on the device; differentiable, for what trains `model`."""
        ids, mask = padded(tokens, self.device, self.padding_side, self._pad)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.padding_side == "left":
            # Positions count from the text's first token, not from the padding.
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if getattr(self.model.config, "use_cache", None):
            inputs["use_cache"] = False
        hidden = self.model(**inputs).last_hidden_state
        pooled = pool(hidden.float(), mask, self.recipe.pooling)
        return torch.nn.functional.normalize(pooled, dim=1) if self.recipe.normalize else pooled


def padded(
    rows: Sequence[Sequence[int]], device: str | torch.device, side: Literal["left", "right"] = "right", pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask, [n, longest] int64 each, padded on one side; what pads is masked, so any token does."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side).to(device), mask.to(device)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Literal["mean", "last_token", "cls"]) -> torch.Tensor:
    """One vector a row, [n, width], from hidden states [n, tokens, width] and the mask [n, tokens] of real tokens.

    The tokens of a row are contiguous; padding may be on either side, and what stands there is never read.
    """
    rows = torch.arange(len(mask), device=mask.device)
    first = mask.argmax(dim=1)  # of equal values, the first
    if pooling == "cls":
        return hidden[rows, first]
    if pooling == "last_token":
        return hidden[rows, first + mask.sum(dim=1) - 1]
    kept = hidden.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def batches(lengths: Sequence[int], batch_tokens: int, device: str = "cpu") -> Iterator[list[int]]:
    """Row numbers of each batch: of similar length, longest first, at most `batch_tokens` with padding (or one row).

    A batch that is large enough to keep the device busy ends early where the next row would be mostly padding.
    """
    worth = _WORTH_A_BATCH[torch.device(device).type]
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        longest = lengths[batch[0]] if batch else 0
        full = (len(batch) + 1) * longest > batch_tokens
        if batch and (full or (len(batch) * longest >= worth and lengths[row] < _ALIKE * longest)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
