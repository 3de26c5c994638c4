"""Where ids stand in a list of ids, and columns of ids, texts and vectors that are too large for Arrow's 32-bit offsets."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from udfs.vectors import Matrix, from_column, to_column

Ids: TypeAlias = pa.Array | pa.ChunkedArray | list[str]

# Ids and hashes of up to 2 KB each fit into a chunk of so many rows.
_ROWS_A_CHUNK = 1 << 20


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


class Places:
    """`place` among the same ids for piece after piece: what it looks up in is made once.

    No id is null or ends in a zero byte, and those of `among` are distinct. Each takes as much memory as the longest.
    """

    def __init__(self, among: pa.Array | pa.ChunkedArray) -> None:
        names = _bytes(among)
        self._order = np.argsort(names, kind="stable")
        self._sorted = names[self._order]

    def __call__(self, ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
        """Where each of `ids` is, -1 for nowhere: [n] int64."""
        if not len(self._sorted):
            return np.full(len(ids), -1, np.int64)
        names = _bytes(ids)
        at = np.minimum(np.searchsorted(self._sorted, names), len(self._sorted) - 1)
        return np.where(self._sorted[at] == names, self._order[at], -1)


def _bytes(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    return ids.cast(pa.large_binary()).to_numpy(zero_copy_only=False).astype(np.bytes_)


def large(table: pa.Table) -> pa.Table:
    """`table` with 64-bit offsets in its columns of strings: of 32-bit ones a sort, a take or combine_chunks fails beyond 2 GiB."""
    fields = [f.with_type(pa.large_string()) if pa.types.is_string(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields))


def plain(table: pa.Table) -> pa.Table:
    """`large` undone, for what others read: 32-bit offsets, in chunks that these suffice for."""
    fields = [f.with_type(pa.string()) if pa.types.is_large_string(f.type) else f for f in table.schema]
    return pa.table([_plain(column) for column in table.columns], schema=pa.schema(fields))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_large_string(column.type):
        return column
    pieces = (chunk.slice(at, _ROWS_A_CHUNK) for chunk in column.chunks for at in range(0, len(chunk), _ROWS_A_CHUNK))
    # A slice keeps the offsets of the whole, which a cast refuses; a copy begins at 0.
    return pa.chunked_array([pa.concat_arrays([piece]).cast(pa.string()) for piece in pieces], pa.string())


def sort(table: pa.Table, *keys: str, vectors: str | None = None) -> pa.Table:
    """`table.sort_by` of these columns, ascending, for tables of any size.

    Args:
        vectors: the column of list<float32>, if there is one: it may hold 2^31 numbers and more.

    Raises:
        ValueError: a vector is null, or they differ in length.
    """
    order = pc.sort_indices(table, sort_keys=[(key, "ascending") for key in keys])
    columns = large(table.drop_columns([vectors] if vectors else [])).take(order)
    columns = dict(zip(columns.column_names, plain(columns).columns, strict=True))
    if vectors:
        columns[vectors] = to_column(from_column(table[vectors])[order.to_numpy()])
    return pa.table(columns).select(table.column_names).cast(table.schema)


def _array(ids: Ids) -> pa.Array | pa.ChunkedArray:
    return pa.array(ids, pa.string()) if isinstance(ids, list) else ids
