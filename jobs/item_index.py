"""The FAISS index of the published item embeddings, beside the tables: `<lake>/_index/<run_id>/`.

`items.faiss` answers inner products; row i of the table `ids` is the item of the index's number i. A small catalogue is
searched exactly; a larger one by inverted lists (IVF), with as many lists probed as the recall asked for needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import Lake
from jobs.run import Run
from jobs.staging import Staging, StagingError
from udfs.ids import sort
from udfs.vectors import from_column

if TYPE_CHECKING:
    import faiss

_FILE = "items.faiss"
EXACT_BELOW = 20_000  # items: an exact search of so many takes about a millisecond
RECALL_AT = 20
_RECALL = 0.95
_QUERIES = 500


@dataclass(frozen=True)
class ItemIndex:
    """An index that was read: `index` numbers items as `item_ids` does."""

    index: faiss.Index
    item_ids: list[str]
    facts: dict[str, Any]

    def search(self, user: np.ndarray, top: int) -> list[tuple[str, float]]:
        """The `top` items by inner product with `user` [dimension] float32, best first, with their scores."""
        scores, found = self.index.search(np.ascontiguousarray(user[None, :], dtype=np.float32), top)
        return [(self.item_ids[i], float(s)) for i, s in zip(found[0], scores[0], strict=True) if i >= 0]


def recall(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray, k: int) -> float:
    """Mean share of the exact top `k` that `index` finds for `queries` [n, d]. Items that tie with the k-th count as found."""
    import faiss

    exact, _ = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    found, _ = index.search(queries, k)
    last = exact[:, -1:]
    return float((found >= last - 1e-5 * np.abs(last)).mean())


def build(
    vectors: np.ndarray, queries: np.ndarray, *, seed: int, exact_below: int = EXACT_BELOW
) -> tuple[faiss.Index, dict[str, Any]]:
    """An inner-product index of `vectors` [items, d] float32 and its facts; the same input and seed give the same bytes.

    Args:
        queries: user vectors [n, d] on which the recall against exact search is measured (and the probes chosen).
        exact_below: with fewer items than this the index is exact.
    """
    import faiss

    n, dimension = vectors.shape
    k = min(RECALL_AT, n)
    facts: dict[str, Any] = {"metric": "inner_product", "items": n, "dimension": dimension}
    if n < exact_below:
        index: Any = faiss.IndexFlatIP(dimension)
        index.add(vectors)
        facts["type"] = "IndexFlatIP"
    else:
        lists = int(4 * np.sqrt(n))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        # Fewer points than faiss asks for by default: lists need not be optimal, and training dominates the time.
        index.cp.max_points_per_centroid, index.cp.min_points_per_centroid = 64, 1
        index.train(vectors)
        index.add(vectors)
        index.nprobe = 1
        while len(queries) and index.nprobe < lists and recall(index, vectors, queries, k) < _RECALL:
            index.nprobe = min(index.nprobe * 2, lists)
        facts |= {"type": "IndexIVFFlat", "lists": lists, "probes": int(index.nprobe)}
    measured = round(recall(index, vectors, queries, k), 4) if len(queries) else None
    return index, {**facts, f"recall@{RECALL_AT}": measured, "queries": len(queries)}


def _folder(lake: Lake, run_id: str) -> Staging:
    return Staging(lake.path(f"_index/{run_id}"))


def export(run: Run, items: pa.Table, users: pa.Table) -> dict[str, Any]:
    """Write the index of `items` (item_embeddings) for `run`; its facts, with `path` and the measured recall.

    The recall is measured on a sample of `users` (user_embeddings).
    """
    import faiss

    out = _folder(run.lake, run.run_id)
    if out.is_complete():
        return out.facts()
    out.clear()
    made = _built(run, items, users)
    out.write_bytes(_FILE, faiss.serialize_index(made.index).tobytes())
    out.write("ids", pa.table({"item_id": pa.array(made.item_ids, pa.string())}))
    out.complete(made.facts)
    return made.facts


def _built(run: Run, items: pa.Table, users: pa.Table) -> ItemIndex:
    items = sort(items, "item_id", vectors="embedding")
    queries = _sample(users, run.settings.seed)
    index, facts = build(from_column(items["embedding"]), queries, seed=run.settings.seed)
    where = {"path": _folder(run.lake, run.run_id).path(_FILE), "run_id": run.run_id}
    return ItemIndex(
        index, items["item_id"].to_pylist(), {**facts, **where, "space_version": items["space_version"][0].as_py()}
    )


def _sample(users: pa.Table, seed: int) -> np.ndarray:
    """Vectors [n, d] of a sample of `users` (user_embeddings), by id."""
    order = pc.sort_indices(users["user_id"]).to_numpy()
    picked = np.random.Generator(np.random.Philox(seed)).permutation(len(order))[:_QUERIES]
    rows = order[np.sort(picked)]
    mask = np.zeros(len(order), bool)
    mask[rows] = True
    # Table.take would first make one array of all the users' vectors, which may be more than 2^31 numbers.
    return from_column(users["embedding"].filter(pa.array(mask)))[np.argsort(np.argsort(rows))]


def ready(run: Run, items: pa.Table, users: pa.Table) -> ItemIndex:
    """The index of the published `items` and `users` of `run`: the one it exported, or, where that is gone, the same in memory."""
    return load(run.lake, run.run_id) if _folder(run.lake, run.run_id).is_complete() else _built(run, items, users)


def load(lake: Lake, run_id: str) -> ItemIndex:
    """The index that run `run_id` exported.

    Raises:
        jobs.staging.StagingError: there is none.
    """
    import faiss

    folder = _folder(lake, run_id)
    if not folder.is_complete():
        raise StagingError(f"{folder.uri} is gone: of older runs than the newest few (keep_runs) no index is kept")
    facts = folder.facts()
    index = faiss.deserialize_index(np.frombuffer(folder.read_bytes(_FILE), dtype=np.uint8))
    return ItemIndex(index, folder.read("ids")["item_id"].to_pylist(), facts)
