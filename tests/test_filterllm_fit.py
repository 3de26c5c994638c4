"""What FilterLLM trains on, from the tables of a night: pairs are streamed, and texts may be more than 2 GiB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import cf, filterllm_fit, stranded
from jobs.run import Run
from jobs.staging import Staging
from tests.gated_night import run_of
from udfs.filterllm import FilterLLMError
from udfs.filterllm_items import Items

USERS, ITEMS, PAIRS = 40, 30, 400


def _night(lake: Path) -> tuple[Run, cf.Space, np.ndarray, np.ndarray]:
    """A run with a snapshot, its space (of other users and items too, in another order), and the pairs in the order of files."""
    run, rng = run_of(lake), np.random.default_rng(0)
    codes = rng.permutation(USERS * ITEMS)[:PAIRS]
    user, item = codes % USERS, codes // USERS
    snapshot, mixed = run.staging("snapshot"), rng.permutation(ITEMS)
    labelled = {
        "item_id": [f"i{n}" for n in mixed],
        "item_idx": pa.array(mixed, pa.int32()),
        "label": ["cold" if n % 7 == 0 else "warm" for n in mixed],
        "content": [None if n % 5 == 0 else f"text {n}" for n in mixed],
        "text_sha256": [None if n % 5 == 0 else f"sha {n}" for n in mixed],
    }
    snapshot.write("items_labelled", pa.table(labelled))
    snapshot.write(
        "users", pa.table({"user_id": [f"u{n}" for n in range(USERS)], "user_idx": pa.array(range(USERS), pa.int32())})
    )
    pairs = {"user_idx": pa.array(user, pa.int32()), "item_idx": pa.array(item, pa.int32())}
    snapshot.write("training_interactions", pa.table(pairs))
    snapshot.complete({})
    user_ids = [f"u{n}" for n in rng.permutation(USERS + 5) if n % 9]
    item_ids = [f"i{n}" for n in rng.permutation(ITEMS + 5) if n % 11]
    vectors = [rng.normal(size=(len(ids), 3)).astype(np.float32) for ids in (user_ids, item_ids)]
    return run, cf.Space("s1", user_ids, vectors[0], item_ids, vectors[1], {}), user, item


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_users_of_items_are_those_of_their_pairs_in_order(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, space, user, item = _night(tmp_path)
    asked = []

    def pairs(_: Run) -> Any:
        asked.append(rows)
        for start in range(0, PAIRS, rows):
            part = slice(start, start + rows)
            yield user[part].astype(np.int32), item[part].astype(np.int32)
        yield np.zeros(0, np.int32), np.zeros(0, np.int32)

    monkeypatch.setattr(stranded, "pairs", pairs)
    monkeypatch.setattr(filterllm_fit, "_PIECE", 7)
    of_items = {
        n: [space.user_ids.index(f"u{u}") for u in sorted(user[item == n]) if f"u{u}" in space.user_ids]
        for n in range(ITEMS)
        if n % 7 and n % 5 and f"i{n}" in space.item_ids
    }
    of_items = {n: users for n, users in of_items.items() if users}
    listed = filterllm_fit.listed(run, space)
    assert len(asked) == 1
    items, shas, texts = filterllm_fit.trainable(run, space)
    assert items.item_ids == [f"i{n}" for n in of_items]
    assert listed == (items.item_ids, shas)
    assert (shas, texts) == ([f"sha {n}" for n in of_items], [f"text {n}" for n in of_items])
    assert [items.users[a:b].tolist() for a, b in zip(items.indptr, items.indptr[1:], strict=False)] == list(
        of_items.values()
    )
    assert (items.users.dtype, items.indptr.dtype) == (np.int32, np.int64)
    np.testing.assert_array_equal(items.embeddings, space.items[[space.item_ids.index(i) for i in items.item_ids]])
    assert items.targets(np.array([1]), "cpu")[1].numpy().dtype == np.int64
    np.testing.assert_array_equal(
        items.popularity(50), np.bincount(np.concatenate(list(of_items.values())), minlength=50)
    )


def test_texts_of_other_items_may_be_more_than_an_array_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, space, _, _ = _night(tmp_path)
    _, _, texts = filterllm_fit.trainable(run, space)
    read = Staging.read
    # Memory that nobody writes to takes none.
    text = pa.StringArray.from_buffers(
        1, pa.py_buffer(np.array([0, 3 << 28], np.int32)), pa.py_buffer(np.zeros(3 << 28, np.uint8))
    )

    def with_long_texts(self: Staging, name: str, columns: list[str] | None = None) -> pa.Table:
        table = read(self, name, columns)
        if "content" not in table.column_names:
            return table
        content = table["content"].chunks + [text] * 4
        more = {"item_id": "new", "item_idx": ITEMS, "label": "cold", "text_sha256": "sha"}
        columns = {
            name: pa.chunked_array([*table[name].chunks, pa.array([more[name]] * 4, table[name].type)])
            for name in table.column_names
            if name != "content"
        }
        return pa.table({**columns, "content": pa.chunked_array(content)}).select(table.column_names)

    monkeypatch.setattr(Staging, "read", with_long_texts)
    assert filterllm_fit.trainable(run, space)[2] == texts


def test_a_night_without_a_usable_item_says_so(tmp_path: Path) -> None:
    run, space, _, _ = _night(tmp_path)
    empty = cf.Space("s1", space.user_ids, space.users, [], space.items[:0], {})
    with pytest.raises(FilterLLMError, match="nothing to learn from: of 30 items 25 are warm, 20 of them have a text"):
        filterllm_fit.listed(run, empty)


def test_popularity_is_counted_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udfs.filterllm_items._PIECE", 2)
    items = Items(["a", "b"], np.zeros((2, 1)), np.array([0, 3, 5]), np.array([0, 1, 3, 1, 3], np.int32))
    assert items.popularity(5).tolist() == [1, 2, 0, 2, 0]
