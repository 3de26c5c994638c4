"""Scoring items against all users: streaming top-K and draws, the dense softmax, and FAISS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jobs.benchmark.measure import SHARES, device, fresh, interleaved, peak_memory, shares
from jobs.benchmark.table import best_and_spread, table
from jobs.run import log
from udfs import streaming_topk, user_sampling

D, K = 64, 20
STREAMING, DRAWN, DENSE, FAISS = (
    "streaming top-K + normaliser",
    "drawn without replacement",
    "dense softmax + top-K",
    "FAISS",
)
# Dense is left out where its two [items, users] matrices would need more.
DENSE_BYTES = 3e9


def run(users: list[int], items: int, seed: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Times, peak memory and ratios for each number of users.

    Returns:
        tables (one), cases: the figures behind it.
    """
    cases, rows = [], []
    for count in users:
        names = [STREAMING, DRAWN, FAISS] if device() == "cpu" else [STREAMING, DRAWN]
        if 8 * items * count <= DENSE_BYTES:
            names.insert(2, DENSE)
        memory = {}
        for name in names:
            memory[name] = fresh("scoring_speed", "memory", name=name, users=count, items=items, seed=seed)
        repeats = 11 if count <= 10_000 else 5 if count <= 100_000 else 3 if count <= 1_000_000 else 2
        found = fresh("scoring_speed", "times", names=names, users=count, items=items, seed=seed, repeats=repeats)
        cases.append({"users": count, "items": items, "peak_bytes": memory, **found})
        ours = min(found["seconds"][STREAMING])
        for name in (STREAMING, DRAWN, DENSE, FAISS):
            if name not in names:
                why = "FAISS here is its CPU build" if name == FAISS else f"needs {8 * items * count / 1e9:.0f} GB"
                rows.append([count, name, f"left out: {why}", None, None, None, None, None])
                continue
            best = min(found["seconds"][name])
            # Vocabulary and queries are read, the numbers and the scores of K users are written.
            moved = 4 * (count + items) * D + 16 * items * K
            reached = shares(ceilings, best, 2 * items * count * D, moved, "float32")
            spread, mib = best_and_spread(found["seconds"][name]), round(memory[name] / 2**20)
            rows.append([count, name, spread, best / ours, items / best, *reached, mib])
        log(f"scoring {count} users: {rows[-4:]}")
    columns = ["users", "method", "time", "times streaming's", "items/s", *SHARES, "peak MiB"]
    note = (
        f"{items} items, d = {D}, K = {K}, float32, {torch.get_num_threads()} threads on {device()}, seed {seed}; the shortest "
        "of repeated, interleaved runs, and how far above it the median lies. Peak memory is beyond vocabulary and queries, in a "
        "process of its own; FAISS's index, which is a copy of the vocabulary, is not counted. FAISS gives no normaliser. "
        "The memory's share counts vocabulary and queries once, and K numbers and scores an item. "
        f"Largest error of log Z against float64: {max(case['lse_error'] for case in cases):.1e}; top-K users that FAISS or the "
        f"dense way shares: {min(case['shared'] for case in cases):.4%}."
    )
    return {"tables": [table("Scoring: top-K of all users", columns, rows, note)], "cases": cases}


def times(names: list[str], users: int, items: int, seed: int, repeats: int) -> dict[str, Any]:
    """seconds of each method; lse_error: of streaming's log-sum-exp; shared: of its users with another method's."""
    queries, keys = _inputs(users, items, seed)
    methods = {name: _method(name, queries, keys, seed) for name in names}
    selection = methods[STREAMING]()
    other = methods[FAISS if FAISS in methods else DENSE]()[1] if len(names) > 2 else selection.users
    both = [
        len(set(a) & set(b)) for a, b in zip(selection.users.tolist(), torch.as_tensor(other).tolist(), strict=True)
    ]
    few = queries[:4].double()
    exact = torch.stack([torch.logsumexp(few @ part.double().T, dim=1) for part in keys.split(2**18)]).logsumexp(dim=0)
    error = float((selection.lse[:4] - exact).abs().max())
    return {
        "seconds": interleaved(methods, repeats),
        "lse_error": error,
        "shared": sum(both) / selection.users.numel(),
    }


def memory(name: str, users: int, items: int, seed: int) -> int:
    """Peak bytes of one call."""
    _method(name, *_inputs(1000, 64, seed), seed)()  # libraries' own buffers and threads
    return peak_memory(_method(name, *_inputs(users, items, seed), seed))


def _inputs(users: int, items: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [items, D] and keys [users, D]; logits have a standard deviation of 2, in no order of users."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(items, D, generator=generator) * (2 / D**0.5)
    return queries.to(device()), torch.randn(users, D, generator=generator).to(device())


def _method(name: str, queries: torch.Tensor, keys: torch.Tensor, seed: int) -> Callable[[], Any]:
    """One method, ready to be called; what it needs once is done."""
    if name == STREAMING:
        return lambda: streaming_topk.top_k(queries, keys, K)
    if name == DRAWN:
        ids = [str(number) for number in range(len(queries))]
        return lambda: user_sampling.draw(queries, keys, K, item_ids=ids, seed=seed)
    if name == DENSE:
        return lambda: torch.topk(torch.softmax(queries @ keys.T, dim=1), K, dim=1)
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(D)
    index.add(keys.cpu().numpy())
    return lambda: index.search(queries.cpu().numpy(), K)
