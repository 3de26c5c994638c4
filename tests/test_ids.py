"""Ids among ids, and tables that are too large for Arrow's 32-bit offsets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from udfs import ids, vectors
from udfs.ids import Places, large, place, plain, sort


def test_a_look_up_that_is_made_once_says_what_place_says() -> None:
    names = pa.chunked_array([["b", "aa", "c"], ["é", "a"]])
    asked = pa.array(["a", "aaa", "é", "zz", "", "b", "a"])
    np.testing.assert_array_equal(Places(names)(asked), place(asked, names))
    assert Places(names)(asked).tolist() == [4, -1, 3, -1, -1, 0, 4]
    assert Places(names.slice(0, 0))(asked).tolist() == [-1] * 7
    assert Places(names)(asked.slice(0, 0)).tolist() == []


def test_large_columns_become_plain_again_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_ROWS_A_CHUNK", 2)
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), ("text", pa.string()), ("rank", pa.int32())])
    table = pa.table({"id": ["a", "b", "c", "d", "e"], "text": ["x", None, "", "y", "z"], "rank": range(5)}, schema)
    assert [f.type for f in large(table).schema] == [pa.large_string(), pa.large_string(), pa.int32()]
    again = plain(large(table).slice(1))
    assert again.equals(table.slice(1))
    assert again.schema == schema
    assert max(len(chunk) for chunk in again["text"].chunks) == 2
    assert plain(large(table.slice(0, 0))).equals(table.slice(0, 0))


def test_a_text_behind_2_gib_of_others_is_plain_again() -> None:
    # Memory that nobody writes to takes none.
    size = 3 << 29
    zeros = pa.py_buffer(np.zeros(2 * size + 2, np.uint8))
    offsets = pa.py_buffer(np.array([0, size, 2 * size, 2 * size + 1, 2 * size + 2], np.int64))
    column = pa.LargeStringArray.from_buffers(4, offsets, zeros)
    with pytest.raises(pa.ArrowInvalid, match="too large"):
        column.slice(2).cast(pa.string())
    assert plain(pa.table({"text": column.slice(2)}))["text"].to_pylist() == ["\0", "\0"]


@pytest.mark.parametrize("rows", [0, 1, 11])
def test_sort_is_the_one_of_arrow(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_ROWS_A_CHUNK", 3)
    monkeypatch.setattr(vectors, "_NUMBERS_A_CHUNK", 4)
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "id": pa.array([f"i{n % 4}" for n in rng.permutation(rows)], pa.string()),
            "embedding": vectors.to_column(rng.normal(size=(rows, 2))),
            "rank": pa.array(rng.permutation(rows), pa.int32()),
            "source": pa.array([None if n % 3 else f"s{n}" for n in range(rows)], pa.string()),
        }
    )
    for keys in (("id",), ("id", "rank")):
        expected = table.sort_by([(key, "ascending") for key in keys])
        found = sort(table, *keys, vectors="embedding")
        assert found.equals(expected)
        assert found.schema == table.schema
        assert sort(table.drop_columns("embedding"), *keys).equals(expected.drop_columns("embedding"))
