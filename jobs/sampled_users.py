"""FilterLLM's sampled users of items, as the refresh counts them, and how vectors are made of them and of the items' words.

A few interactions give the best direction of a cold item's vector, and a short vector, which ranks too low among warm items.
How much too short, and how much a linear map of the text's words adds to it, is measured (refresh.scale, refresh.words: auto):
warm items that FilterLLM's training did not see are given users as cold items are, folded in from these, and compared with the
vectors that CF trained for them (udfs/blend.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.cf import Space
from jobs.run import Run, log
from udfs.blend import Blend, measured
from udfs.cf_inputs import Pairs
from udfs.fold_in import gram, to_csr
from udfs.ids import large, place
from udfs.vectors import Matrix
from udfs.word_map import WordMap

#: Fewer held-out items than this say too little.
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
    rows = large(run.staging("filterllm_score").read(name))
    rows = rows.filter(pc.and_(pc.is_in(rows["user_id"], user_ids), pc.is_in(rows["item_id"], item_ids)))
    rows = rows.sort_by([("item_id", "ascending"), ("rank", "ascending")])
    user, item = place(rows["user_id"], user_ids), place(rows["item_id"], item_ids)
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


def blend(
    run: Run,
    space: Space,
    users: Matrix,
    user_ids: pa.Array,
    item_ids: pa.Array,
    in_space: npt.NDArray[np.int64],
    words: WordMap | None,
) -> Blend:
    """How the vectors of items without a real interaction are made: refresh.scale and refresh.words, or measured.

    Args:
        users: [U, d] tonight's, in the order of `user_ids`; zeros for none.
        in_space: [I] where each of `item_ids` is in the space, -1 for nowhere.
        words: the map of the night's model that has not learnt from the items that were held out; None for none.

    Returns:
        As udfs.blend.measured says of the held-out items; a scale of 1 and no words if they are fewer than ten.
    """
    conf = run.settings.refresh
    if conf.scale != "auto" and words is None:
        return Blend(conf.scale, folded=conf.scale)
    shares = read(run, "held_out", user_ids, item_ids).shares
    there = np.asarray(users.any(1))[shares.users] & (in_space[shares.items] >= 0)
    rows, row = np.unique(shares.items[there], return_inverse=True)
    if len(rows) < ENOUGH:
        log(
            f"[refresh] {len(rows)} held-out items do not tell how cold items' vectors should be made: left as they are"
        )
        return Blend() if conf.scale == "auto" else Blend(conf.scale, folded=conf.scale)
    csr = to_csr(row, shares.users[there], np.ones(len(row)), len(rows))
    weights = to_csr(row, shares.users[there], shares.weights[there], len(rows))[2]
    gram_of_all = gram(space.users)
    worded = None if words is None else words(texts(run, item_ids.take(pa.array(rows))))
    if worded is not None and worded.any(axis=1).sum() < ENOUGH:
        log("[refresh] too few held-out items have a word that the model knows: words are left out")
        worded = None
    return measured(
        space.items[in_space[rows]],
        space.fold_in(users, csr, "item_scale", gram_of_all, weights),
        worded,
        gram_of_all,
        space.interactions[in_space[rows]],
        None if conf.scale == "auto" else conf.scale,
        None if conf.words == "auto" else conf.words,
    )


def texts(run: Run, item_ids: pa.Array) -> list[str]:
    """Tonight's texts of these items, in their order; empty for none."""
    items = run.staging("snapshot").read("items_labelled", ["item_id", "content"])
    # A take makes one array of all texts it is given.
    items = large(items.filter(pc.is_in(items["item_id"], value_set=item_ids)))
    found = items["content"].take(pc.index_in(item_ids, value_set=items["item_id"]))
    return [text or "" for text in found.to_pylist()]
