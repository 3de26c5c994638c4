"""Matrices of embeddings as Arrow columns and back, without Python lists."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Matrix = npt.NDArray[np.float32]

# The offsets of a list column are 32 bits wide: a chunk of it may hold 2^31 numbers at most.
_NUMBERS_A_CHUNK = 1 << 28


def to_column(vectors: npt.NDArray[np.floating]) -> pa.ChunkedArray:
    """`vectors` [n, d] as a column of list<float32>, one list a row."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    n, width = vectors.shape
    step = max(1, _NUMBERS_A_CHUNK // max(width, 1))
    chunks = [
        pa.ListArray.from_arrays(
            pa.array(np.arange(0, (len(part) + 1) * width, width, dtype=np.int32)[: len(part) + 1]),
            pa.array(part.reshape(-1)),
        )
        for part in (vectors[start : start + step] for start in range(0, n, step))
    ]
    return pa.chunked_array(chunks, type=pa.list_(pa.float32()))


def from_column(column: pa.ChunkedArray | pa.Array) -> Matrix:
    """The rows [n, d] of a column of lists that all have the same length; [0, 0] for no rows.

    Raises:
        ValueError: a list is null, or they differ in length.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    chunks = [chunk for chunk in chunks if len(chunk)]
    if not chunks:
        return np.zeros((0, 0), np.float32)
    parts = []
    for chunk in chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        lengths = np.diff(np.asarray(chunk.offsets)) if hasattr(chunk, "offsets") else np.full(1, chunk.type.list_size)
        if chunk.null_count or len(np.unique(lengths)) != 1 or len(values) != len(chunk) * lengths[0]:
            raise ValueError(f"embeddings of different lengths, or null ones, in a column of {len(column)} rows")
        parts.append(values.reshape(len(chunk), -1))
    if len({part.shape[1] for part in parts}) != 1:
        raise ValueError(f"embeddings of different lengths in a column of {len(column)} rows")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
