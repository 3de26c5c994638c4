"""What A-LLMRec sees of a snapshot: users' histories in the order of their events, and the items' titles and texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.staging import Staging
from udfs.ids import large
from udfs.sequences import Ints, Sequences

Mask = npt.NDArray[np.bool_]
# Before every event that has a time or a place.
_NEVER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Night:
    """Users 0 .. U - 1 and items 0 .. I - 1 of a snapshot, by their idx.

    titles: [I], the first line of the text where there is no title. texts: [I] text_sha256, null for none. cold, with_text: [I].
    histories: of the users, each item once, at its last event; weights: of each of `histories.items`. order: what they are in
    the order of: event_time (ties by seq), seq, or item_id where the source keeps no order. snapshot: where it is from.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    titles: list[str]
    texts: pa.Array
    cold: Mask
    histories: Sequences
    weights: npt.NDArray[np.float64]
    order: str
    snapshot: Staging

    @property
    def with_text(self) -> Mask:
        return np.asarray(self.texts.is_valid().to_numpy(zero_copy_only=False), np.bool_)


def read(snapshot: Staging) -> Night:
    """The night of a complete stage `snapshot`; raises jobs.staging.StagingError if it is not complete."""
    snapshot.facts()
    users = large(snapshot.read("users", ["user_id", "user_idx"])).sort_by("user_idx").combine_chunks()
    columns = ["item_id", "item_idx", "label", "title", "content", "text_sha256"]
    items = large(snapshot.read("items_labelled", columns)).sort_by("item_idx").combine_chunks()
    columns = ["user_idx", "item_idx", "weight", "last_time", "last_seq"]
    pairs = snapshot.read("training_interactions", columns)
    user, item = (pairs[name].to_numpy().astype(np.int64) for name in ("user_idx", "item_idx"))
    time = pairs["last_time"].cast(pa.timestamp("us", tz="UTC"))
    known = [
        name for name, column in (("event_time", time), ("seq", pairs["last_seq"])) if pc.any(column.is_valid()).as_py()
    ]
    keys = [pc.fill_null(column.cast(pa.int64()), _NEVER).to_numpy() for column in (pairs["last_seq"], time)]
    sort = np.lexsort((item, *keys, user))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users.num_rows))]).astype(np.int64)
    titles = [
        (title or "").strip() or (content or "").strip().split("\n")[0]
        for title, content in zip(items["title"].to_pylist(), items["content"].to_pylist(), strict=True)
    ]
    return Night(
        users["user_id"].combine_chunks(),
        items["item_id"].combine_chunks(),
        titles,
        items["text_sha256"].combine_chunks(),
        np.asarray(pc.equal(items["label"], "cold").to_numpy(), np.bool_),
        Sequences(indptr, item[sort]),
        pairs["weight"].to_numpy()[sort],
        known[0] if known else "item_id",
        snapshot,
    )


def renumbered(histories: Sequences, number: Ints) -> tuple[Sequences, Mask]:
    """The histories with item i as number[i], without those that are -1; and which of `histories.items` are left."""
    kept = number[histories.items] >= 0
    counts = np.bincount(histories.rows[kept], minlength=len(histories))
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Sequences(indptr, number[histories.items[kept]]), kept
