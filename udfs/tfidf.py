"""Texts as rows of their words: no language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse


def vectorizer(**chosen: Any) -> Any:
    """An unfitted TfidfVectorizer: logarithmic counts, rows of length 1.

    Words of one letter and English stop words are left out, as are all but the 50,000 most frequent words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    known = {"stop_words": "english", "sublinear_tf": True, "dtype": np.float32}
    return TfidfVectorizer(**known, **(chosen or {"max_features": 50_000}))


def tfidf(texts: Sequence[str | None]) -> sparse.csr_array:
    """TF-IDF rows [n, terms] float32 of L2 norm 1; a missing or wordless text is a row of zeros."""
    try:
        return sparse.csr_array(vectorizer().fit_transform([text or "" for text in texts]))
    except ValueError:  # no text holds a word
        return sparse.csr_array((len(texts), 1), dtype=np.float32)
