"""A text as counts of its words, hashed to a fixed width: no language model, nothing fitted, no file.

A language model's vector says what a text is about and blurs brands, sizes and model names; where those decide who buys,
words beside it (text.also) tell more. As an encoder alone it is what FilterLLM does without a language model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

#: Width of `words`; `words-4096` names another one.
WIDTH = 1024
_NAME = re.compile(r"words(?:-([1-9][0-9]{2,5}))?")
_RECIPE = 1  # raise it when the vectors change


def width_of(name: str) -> int | None:
    """The width that a model's name asks for; None: it names a language model."""
    found = _NAME.fullmatch(name)
    return int(found[1] or WIDTH) if found else None


def version(width: int, max_tokens: int) -> str:
    """The name of these embeddings."""
    return f"words-{width}-{max_tokens}-{_RECIPE}"


class HashedWords:
    """Signed hashing of words (Weinberger et al. 2009) of two letters or more, lowercased, English stop words left out."""

    def __init__(self, width: int, max_tokens: int) -> None:
        """max_tokens: of a text as much is read as a language model with so many would be given at most (`readable`)."""
        from sklearn.feature_extraction.text import HashingVectorizer

        self.width, self._max_tokens = width, max_tokens
        self._hash = HashingVectorizer(n_features=width, stop_words="english", norm=None, dtype=np.float32)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[n, width] float32, in the order of `texts`: log(1 + c) of each word's count c, to length 1; zeros for no words."""
        from sklearn.preprocessing import normalize

        from udfs.text_encoder import readable

        if not len(texts):
            return np.zeros((0, self.width), np.float32)
        counts = self._hash.transform(readable(text, self._max_tokens) for text in texts)
        counts.data = np.sign(counts.data) * np.log1p(np.abs(counts.data))
        return np.asarray(normalize(counts, copy=False).todense(), np.float32)
