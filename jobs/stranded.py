"""Warm items that no interaction can place tonight: new ones that only new users have had. FilterLLM reads them as cold ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.run import Run
from udfs.ids import large


def items(run: Run) -> pa.Array:
    """Ids of the warm items with a text that are not in the night's space (stage cf), and of whose users none has a vector:
    neither one of the space, nor one folded in from an item of the space.
    """
    snapshot = run.staging("snapshot")
    space = run.artifact("spaces", run.staging("cf").facts()["space_version"])
    users = large(snapshot.read("users", ["user_id", "user_idx"])).sort_by("user_idx")
    items = large(snapshot.read("items_labelled", ["item_id", "item_idx", "label", "text_sha256"])).sort_by("item_idx")
    with_vector, in_space = (
        np.array(pc.is_in(table[column], value_set=space.read(name, [column])[column]))
        for table, name, column in ((users, "users", "user_id"), (items, "items", "item_id"))
    )
    found = np.array(pc.and_(pc.equal(items["label"], "warm"), pc.is_valid(items["text_sha256"]))) & ~in_space
    if found.any():
        for user, item in pairs(run):
            with_vector[user[in_space[item]]] = True
        for user, item in pairs(run):
            found[item[with_vector[user]]] = False
    return items["item_id"].filter(pa.array(found)).combine_chunks()


def pairs(run: Run) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """user_idx and item_idx of the snapshot's pairs, piece by piece."""
    for batch in run.staging("snapshot").batches("training_interactions", ["user_idx", "item_idx"]):
        yield batch.column("user_idx").to_numpy(), batch.column("item_idx").to_numpy()
