"""Where ids stand in a list of ids."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from udfs.vectors import Matrix

Ids: TypeAlias = pa.Array | pa.ChunkedArray | list[str]


def place(ids: Ids, among: Ids) -> npt.NDArray[np.int64]:
    """Where each of `ids` is first in `among` (strings), -1 for nowhere: int64, one an id. A null is nowhere."""
    found = pc.index_in(_array(ids), value_set=_array(among), skip_nulls=True)
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def take(ids: Ids, among: Ids, vectors: Matrix) -> tuple[Matrix, npt.NDArray[np.bool_]]:
    """The vectors [n, d] of `ids`, zeros where there is none, and where there is one [n]; `vectors`: [m, d], of `among`."""
    at = place(ids, among)
    known = at >= 0
    found = np.zeros((len(at), vectors.shape[1]), np.float32)
    found[known] = vectors[at[known]]
    return found, known


def _array(ids: Ids) -> pa.Array | pa.ChunkedArray:
    return pa.array(ids, pa.string()) if isinstance(ids, list) else ids
