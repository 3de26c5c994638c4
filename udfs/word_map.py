"""A linear map from a text's words to a CF space: ridge regression of the items' vectors on the TF-IDF rows of their texts.

An item lies at the sum of its words' vectors, each by its weight in the text. A language model's vector is of a few hundred
numbers and blurs names and rare terms; this map knows nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from udfs.tfidf import vectorizer
from udfs.vectors import Matrix, from_column, to_column


@dataclass(frozen=True)
class WordMap:
    """words: W of them. idf: [W] float64, their inverse document frequencies. vectors: [W, d] float32."""

    words: list[str]
    idf: npt.NDArray[np.float64]
    vectors: Matrix

    def __call__(self, texts: Sequence[str]) -> Matrix:
        """Where texts lie, [n, d] float32; zeros for a text without any of the words."""
        tfidf = vectorizer(vocabulary=self.words)
        tfidf.idf_ = self.idf
        return np.asarray(tfidf.transform(texts) @ self.vectors, np.float32)


def fit(texts: Sequence[str], vectors: Matrix, ridge: float) -> WordMap | None:
    """The map of least |X - T W|^2 + ridge |W|^2, without an intercept; None where no text holds a word.

    Args:
        texts: of n items, one at least.
        vectors: X [n, d], of the same items.
    """
    from sklearn.linear_model import Ridge

    tfidf = vectorizer()
    try:
        rows = tfidf.fit_transform(texts)
    except ValueError:
        return None
    # There may be as many words as items: the normal equations are solved by conjugate gradients, never formed.
    model = Ridge(alpha=ridge, solver="sparse_cg", tol=1e-3, fit_intercept=False)
    model.fit(rows, vectors)
    return WordMap(tfidf.get_feature_names_out().tolist(), tfidf.idf_, np.asarray(model.coef_.T, np.float32))


def to_table(found: WordMap) -> pa.Table:
    """Columns word, idf, embedding."""
    return pa.table({"word": found.words, "idf": found.idf, "embedding": to_column(found.vectors)})


def from_table(table: pa.Table) -> WordMap:
    """The map of `to_table`'s table."""
    return WordMap(table["word"].to_pylist(), table["idf"].to_numpy(), from_column(table["embedding"]))
