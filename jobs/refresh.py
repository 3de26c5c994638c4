"""Stage `refresh`: tonight's vectors of all items and users, cold ones among them, in one embedding space.

Method `fold_in` keeps the night's space: what was trained in it stays bit for bit, the rest is folded in (udfs/fold_in.py).
Method `retrain` trains CF again on the real pairs and FilterLLM's sampled ones together (the paper's way): every vector comes
from that new space. Where an item's vector comes from is its `source`:

- sampled: it has sampled users tonight (it is cold, or nobody with a vector has it); folded in from these, united with its few
  real pairs. Without any real pair that counts, what its words alone say stands beside it (udfs/blend.py)
- llminit: cold, and where its text alone places it in a space that began with cf.init=llminit: what is left for an item
  without sampled users, or the way for all cold items (refresh.cold)
- allmrec: cold, and where A-LLMRec's alignment decodes its text to (refresh.cold; jobs/allmrec_alignment.py)
- cf: trained in the space; or folded in from its real pairs, for an item that the space does not have
- carried_over: warm, not in the space, and published before in this space: the vector of then
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs import allmrec_alignment, cf, cf_start, published, sampled_users
from jobs.cf import Space
from jobs.filterllm_train import load_words
from jobs.run import Run, log
from jobs.sampled_users import SampledUsers
from jobs.staging import Staging
from schemas.errors import ColdRefreshError
from schemas.table import table as schema
from udfs.blend import Blend
from udfs.cf_inputs import Pairs
from udfs.fold_in import gram, to_csr
from udfs.ids import large, place, plain
from udfs.vectors import Matrix, from_column, to_column
from udfs.word_map import WordMap

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class RefreshError(ColdRefreshError):
    """What the stage would leave is no embedding of the space."""


@dataclass(frozen=True)
class _Night:
    """Tonight's users and items in the order of their ids (their index), and what FilterLLM sampled for cold items."""

    run: Run
    user_ids: pa.Array
    item_ids: pa.Array
    texts: pa.Array  # text_sha256 of the items, null for none
    warm: Mask
    sampled: SampledUsers


@dataclass
class _Items:
    """A vector for each of tonight's items, with where it comes from; `source` is None while there is none."""

    vectors: Matrix
    source: npt.NDArray[np.object_]
    interactions: Rows
    updated_at: npt.NDArray[np.object_]

    @classmethod
    def none_yet(cls, n: int, dimension: int) -> _Items:
        vectors = np.zeros((n, dimension), np.float32)
        return cls(vectors, np.full(n, None, object), np.zeros(n, np.int64), np.full(n, None, object))

    def put(self, rows: Rows, vectors: Matrix, source: Any, interactions: Rows, updated_at: Any) -> None:
        """Vectors [n, d] of the items `rows` [n]; one that is zero is none."""
        there = np.asarray(vectors.any(1))
        for column, values in (
            (self.vectors, vectors),
            (self.source, source),
            (self.interactions, interactions),
            (self.updated_at, updated_at),
        ):
            column[rows[there]] = values[there] if isinstance(values, np.ndarray) else values


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Leaves sampled_interactions, item_embeddings and user_embeddings, sorted by their ids, and rejected_rows: who has no vector.

    Returns:
        rows: table -> rows; sources: source -> items; users_folded_in; users_left_out: no item of theirs is in the space;
        items_left_out: nothing to make a vector from; sampled_dropped: rows of users or items that are gone; method;
        model_version; alignment_version: that placed cold items, if one did; scale and words: of vectors that come from sampled
        users alone (udfs.blend.Blend); space_version, dimension, aligned_to and residual of the space that the vectors are in.

    Raises:
        RefreshError: a vector is not finite.
        udfs.fold_in.FoldInError: the space's regularization is too small to fold in.
        udfs.cf_inputs.CfError: method retrain, and training failed.
        udfs.allmrec_examples.AllmrecError: refresh.cold=allmrec, and there is nothing to align.
    """
    night = _night(run)
    if not night.sampled.rows.num_rows:
        log("[refresh] no cold item was scored tonight: what there is are warm items")
    space = cf.load_space(run, run.staging("cf").facts()["space_version"])
    retrain = run.settings.refresh.method == "retrain"
    if retrain:
        real = _real_pairs(night, space.facts["binary"], np.zeros(len(night.user_ids), bool), _sampled_items(night))
        extra = _without(night.sampled.pairs, real, len(night.user_ids))
        space = cf.load_space(run, cf.train(run, out, align_to=space.version, sampled=extra))
    in_space = place(night.user_ids, space.user_ids)
    items_in_space = place(night.item_ids, space.item_ids)
    needs = items_in_space < 0
    real = _real_pairs(night, space.facts["binary"], in_space < 0, needs if retrain else needs | _sampled_items(night))
    users = _users(space, in_space, items_in_space, real)
    alignment = allmrec_alignment.for_space(run, space) if run.settings.refresh.cold == "allmrec" else None
    blend, words = Blend(), None
    if night.sampled.rows.num_rows and not retrain:
        unseen = None
        if run.settings.refresh.words != 0:
            model = run.staging("filterllm_train").facts()["model_version"]
            words, unseen = load_words(run, model), load_words(run, model, held_out=False)
        blend = sampled_users.blend(run, space, users, night.user_ids, night.item_ids, items_in_space, unseen)
    items = _items(night, space, users, items_in_space, real, alignment, blend, words, fold_sampled=not retrain)
    facts = _write(night, out, space, users, items)
    return {
        **facts,
        "users_folded_in": int((users.any(1) & (in_space < 0)).sum()),
        "users_left_out": int((~users.any(1)).sum()),
        "items_left_out": int(sum(source is None for source in items.source)),
        "sampled_dropped": run.staging("filterllm_score").read("sampled", ["item_id"]).num_rows
        - night.sampled.rows.num_rows,
        "method": run.settings.refresh.method,
        "model_version": run.staging("filterllm_train").facts()["model_version"],
        "alignment_version": alignment,
        "scale": blend.scale,
        "words": blend.words,
        "space_version": space.version,
        **{name: space.facts[name] for name in ("dimension", "aligned_to", "residual")},
    }


def _night(run: Run) -> _Night:
    snapshot = run.staging("snapshot")
    users = large(snapshot.read("users", ["user_id", "user_idx"])).sort_by("user_idx")
    items = large(snapshot.read("items_labelled", ["item_id", "item_idx", "label", "text_sha256"])).sort_by("item_idx")
    user_ids, item_ids = (table.column(0).combine_chunks() for table in (users, items))
    sampled = sampled_users.read(run, "sampled", user_ids, item_ids)
    texts = items["text_sha256"].combine_chunks()
    return _Night(run, user_ids, item_ids, texts, pc.equal(items["label"], "warm").to_numpy(), sampled)


def _sampled_items(night: _Night) -> Mask:
    mask = np.zeros(len(night.item_ids), bool)
    mask[night.sampled.pairs.items] = True
    return mask


def _real_pairs(night: _Night, binary: bool, of_users: Mask, of_items: Mask) -> Pairs:
    """The snapshot's pairs of these users or items, weighed as the space weighs them; the rest is never in memory."""
    parts: list[tuple[npt.NDArray[Any], ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    if of_users.any() or of_items.any():
        columns = ["user_idx", "item_idx", "weight"]
        for batch in night.run.staging("snapshot").batches("training_interactions", columns):
            user, item, weight = (batch.column(name).to_numpy() for name in columns)
            kept = of_users[user] | of_items[item]
            parts.append((user[kept], item[kept], weight[kept]))
    user, item, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Pairs(user, item, cf.pair_weights(weight, binary)).sorted()


def _without(sampled: Pairs, real: Pairs, n_users: int) -> Pairs:
    """The sampled pairs that are not real ones."""
    keys = [pairs.items.astype(np.int64) * n_users + pairs.users for pairs in (sampled, real)]
    kept = ~np.isin(keys[0], keys[1])
    return Pairs(sampled.users[kept], sampled.items[kept], sampled.weights[kept])


def _users(space: Space, in_space: Rows, items_in_space: Rows, real: Pairs) -> Matrix:
    """Tonight's users [n, d]: the space's own vectors, the others folded in from the space's items; zero for none."""
    vectors = np.zeros((len(in_space), space.users.shape[1]), np.float32)
    vectors[in_space >= 0] = space.users[in_space[in_space >= 0]]
    mine = (in_space[real.users] < 0) & (items_in_space[real.items] >= 0)
    rows, row = np.unique(real.users[mine], return_inverse=True)
    csr = to_csr(row, items_in_space[real.items[mine]], real.weights[mine], len(rows))
    vectors[rows] = space.fold_in(space.items, csr, "user_scale")
    return vectors


def _items(
    night: _Night,
    space: Space,
    users: Matrix,
    in_space: Rows,
    real: Pairs,
    alignment: str | None,
    blend: Blend,
    words: WordMap | None,
    *,
    fold_sampled: bool,
) -> _Items:
    """Tonight's items as the top of this file says; blend: of what is folded in from sampled users alone, and its words."""
    found = _Items.none_yet(len(in_space), users.shape[1])
    midnight = night.run.midnight
    known = np.flatnonzero(in_space >= 0)
    trained_on = datetime.fromisoformat(space.facts["trained_on"]).replace(tzinfo=UTC)
    at = in_space[known]
    found.put(known, space.items[at], "cf", space.interactions[at], trained_on)
    sampled_items = _sampled_items(night)
    if not fold_sampled:
        found.source[known] = np.where(sampled_items[known], "sampled", found.source[known])
    else:
        found.source[sampled_items] = None
    if night.run.settings.refresh.cold != "sampled":
        # One without a text keeps what the space knows of it.
        found.source[~night.warm & pc.is_valid(night.texts).to_numpy(zero_copy_only=False)] = None
        _place_by_text(night, space, found, alignment)
    _carry_over(night, space, found)

    left = np.array([source is None for source in found.source], bool)
    with_vector = np.asarray(users.any(1))
    real_mine = left[real.items] & with_vector[real.users]
    real = Pairs(real.users[real_mine], real.items[real_mine], real.weights[real_mine])
    # A sampled item's few real pairs are interactions like any other; what is only probable counts by its share.
    weights = np.where(sampled_items[real.items], 1.0, real.weights)
    sampled = _without(night.sampled.shares, real, len(users))
    sampled_mine = left[sampled.items] & with_vector[sampled.users]
    user = np.concatenate([real.users, sampled.users[sampled_mine]])
    item = np.concatenate([real.items, sampled.items[sampled_mine]])
    weights = np.concatenate([weights, np.ones(sampled_mine.sum())])
    shares = np.concatenate([np.ones(len(real.items)), sampled.weights[sampled_mine]])
    rows, row = np.unique(item, return_inverse=True)
    # The Gram matrix is of the space's own users: a vector must not depend on who else is new tonight.
    csr = to_csr(row, user, weights, len(rows))
    shares = to_csr(row, user, shares, len(rows))[2]
    vectors = space.fold_in(users, csr, "item_scale", gram(space.users), shares)
    alone = np.isin(rows, real.items, invert=True)
    worded = np.zeros_like(vectors[alone])
    if words is not None and blend.words and alone.any():
        worded = words(sampled_users.texts(night.run, night.item_ids.take(pa.array(rows[alone]))))
    vectors[alone] = blend(vectors[alone], worded)
    source = np.where(sampled_items[rows], "sampled", "cf").astype(object)
    found.put(rows, vectors, source, np.bincount(real.items, minlength=len(in_space))[rows], midnight)
    _place_by_text(night, space, found)
    return found


def _place_by_text(night: _Night, space: Space, found: _Items, alignment: str | None = None) -> None:
    """Give cold items with a text that have no vector the one that their text alone has in the space, if it has any."""
    if alignment is None and space.facts["encoder_version"] is None:
        return
    left = np.array([source is None for source in found.source], bool)
    rows = np.flatnonzero(left & ~night.warm & night.texts.is_valid().to_numpy(zero_copy_only=False))
    if len(rows):
        shas = night.texts.take(pa.array(rows)).to_pylist()
        if alignment is not None:
            vectors, source = allmrec_alignment.vectors(night.run, alignment, shas), "allmrec"
        else:
            vectors, source = cf_start.vectors(night.run, space.version, space.facts, shas), "llminit"
        found.put(rows, vectors, source, np.zeros(len(rows), np.int64), night.run.midnight)


def _carry_over(night: _Night, space: Space, found: _Items) -> None:
    """Give warm items without a vector the one that was published last, if that was in this space."""
    wanted = night.warm & np.array([source is None for source in found.source], bool)
    before = published.previous(night.run.lake, night.run.run_date) if wanted.any() else None
    if before is None or before.space_version != space.version:
        return
    table = before.item_embeddings()
    at = place(night.item_ids, table["item_id"])
    rows = np.flatnonzero(wanted & (at >= 0))
    if not len(rows):
        return
    updated_at = np.array(table["updated_at"].take(pa.array(at[rows])).to_pylist(), object)
    vectors, interactions = from_column(table["embedding"])[at[rows]], table["interactions"].to_numpy()[at[rows]]
    found.put(rows, vectors, "carried_over", interactions, updated_at)


def _write(night: _Night, out: Staging, space: Space, users: Matrix, items: _Items) -> dict[str, Any]:
    """Stage the three tables; their rows and the items' sources."""
    if not (np.isfinite(users).all() and np.isfinite(items.vectors).all()):
        raise RefreshError(
            f"vectors of space {space.version} are not finite: raise cf.regularization (als, als_cg) or cf.weight_decay"
        )
    model_version = night.run.staging("filterllm_train").facts()["model_version"]

    def with_lineage(columns: dict[str, Any], rows: int) -> dict[str, Any]:
        lineage = {"run_id": night.run.run_id, "model_version": model_version, "space_version": space.version}
        date = pa.array([night.run.run_date], pa.date32()).take(pa.array(np.zeros(rows, np.int64)))
        return {"refresh_date": date, **columns, **{name: pa.repeat(value, rows) for name, value in lineage.items()}}

    there = np.array([source is not None for source in items.source], bool)
    with_vector = np.asarray(users.any(1))
    sampled = {name: night.sampled.rows[name] for name in ("item_id", "user_id", "rank", "probability", "propensity")}
    embedded = {
        "item_id": night.item_ids.filter(pa.array(there)),
        "embedding": to_column(items.vectors[there]),
        "source": pa.array(items.source[there], pa.string()),
        "interactions": items.interactions[there],
        "updated_at": pa.array(items.updated_at[there], pa.timestamp("us", tz="UTC")),
    }
    placed = {"user_id": night.user_ids.filter(pa.array(with_vector)), "embedding": to_column(users[with_vector])}
    rows = {}
    for name, columns in (
        ("sampled_interactions", sampled),
        ("item_embeddings", embedded),
        ("user_embeddings", placed),
    ):
        rows[name] = len(columns["user_id" if name == "user_embeddings" else "item_id"])
        out.write(name, schema(name).conform(plain(pa.table(with_lineage(columns, rows[name])))))
    out.write("rejected_rows", _left_out(night, with_vector, there))
    names, counts = np.unique(items.source[there].astype(str), return_counts=True)
    return {"rows": rows, "sources": dict(zip(names.tolist(), counts.tolist(), strict=True))}


def _left_out(night: _Night, users: Mask, items: Mask) -> pa.Table:
    """Who is not among `users` and `items`, those with a vector: columns of schemas/rejected_rows.yaml."""
    parts = []
    for table, ids, detail in (
        ("user_embeddings", night.user_ids.filter(pa.array(~users)), "no item of the user's has a vector in the space"),
        ("item_embeddings", night.item_ids.filter(pa.array(~items & night.warm)), "no user of the item's has a vector"),
        (
            "item_embeddings",
            night.item_ids.filter(pa.array(~items & ~night.warm)),
            "cold, and no user could be sampled",
        ),
    ):
        same = {"table": table, "reason": "no_vector", "detail": detail}
        columns = {name: pa.repeat(value, len(ids)) for name, value in same.items()}
        parts.append(pa.table({**columns, "key": ids, "rows": pa.repeat(1, len(ids))}))
    return plain(pa.concat_tables(parts))
