"""FilterLLM's sampled users of items, as the refresh counts them, and how long the vectors folded in from them are made.

A few interactions give the best direction of a cold item's vector, and a short vector, which ranks too low among warm items.
How much too short is measured (refresh.scale auto): warm items that FilterLLM's training did not see are given users as cold
items are, folded in from these, and compared with the vectors that CF trained for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.cf import Space
from jobs.run import Run, log
from udfs.cf_model import Pairs
from udfs.fold_in import gram, norm_scale, to_csr
from udfs.vectors import Matrix

#: Fewer held-out items than this say too little of a length.
ENOUGH = 10


@dataclass(frozen=True)
class SampledUsers:
    """rows: of users and items that still exist, sorted by item and rank. pairs: the part of them that the refresh uses, by
    index, weighed relative to the item's first. shares: these pairs, with as how many interactions each counts.
    """

    rows: pa.Table
    pairs: Pairs
    shares: Pairs


def read(run: Run, name: str, user_ids: pa.Array, item_ids: pa.Array) -> SampledUsers:
    """The table `name` of stage filterllm_score: `sampled` or `held_out`; indices are places in these ids."""
    settings = run.settings.refresh
    rows = run.staging("filterllm_score").read(name)
    rows = rows.filter(pc.and_(pc.is_in(rows["user_id"], user_ids), pc.is_in(rows["item_id"], item_ids)))
    rows = rows.sort_by([("item_id", "ascending"), ("rank", "ascending")])
    user, item = (
        pc.index_in(rows[column], value_set=ids).to_numpy().astype(np.int64)
        for column, ids in (("user_id", user_ids), ("item_id", item_ids))
    )
    weights = np.ones(len(user))
    if settings.by_probability and len(user):
        # Relative to the item's first row, which is its most probable one.
        first = np.flatnonzero(np.diff(item, prepend=-1))
        probability = rows["probability"].to_numpy()
        weights = probability / np.repeat(probability[first], np.diff(first, append=len(item)))
    used = rows["rank"].to_numpy() <= (settings.users or np.inf)
    pairs = Pairs(user[used], item[used], weights[used].astype(np.float32))
    shares = np.ones(len(pairs.items))
    if settings.by_probability and len(shares):
        total = np.bincount(pairs.items, pairs.weights, minlength=len(item_ids))[pairs.items]
        shares = settings.interactions * pairs.weights / total
    return SampledUsers(rows, pairs, Pairs(pairs.users, pairs.items, shares.astype(np.float32)))


def scale(
    run: Run, space: Space, users: Matrix, user_ids: pa.Array, item_ids: pa.Array, in_space: npt.NDArray[np.int64]
) -> float:
    """What the vectors of items without a real interaction are multiplied by: refresh.scale, or measured.

    Args:
        users: [U, d] tonight's, in the order of `user_ids`; zeros for none. in_space: [I] where each of `item_ids` is in the
            space, -1 for nowhere.

    Returns:
        Measured: the median length of the held-out items' trained vectors over that of their folded ones; 1 if they are
        fewer than ten.
    """
    chosen = run.settings.refresh.scale
    if chosen != "auto":
        return float(chosen)
    shares = read(run, "held_out", user_ids, item_ids).shares
    there = np.asarray(users.any(1))[shares.users] & (in_space[shares.items] >= 0)
    rows, row = np.unique(shares.items[there], return_inverse=True)
    if len(rows) < ENOUGH:
        log(
            f"[refresh] {len(rows)} held-out items do not tell how long cold items' vectors should be: left as they are"
        )
        return 1.0
    csr = to_csr(row, shares.users[there], np.ones(len(row)), len(rows))
    weights = to_csr(row, shares.users[there], shares.weights[there], len(rows))[2]
    folded = space.fold_in(users, csr, "item_scale", gram(space.users), weights)
    return norm_scale(space.items[in_space[rows]], folded)
