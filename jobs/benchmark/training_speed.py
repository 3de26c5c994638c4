"""A training step of the distribution loss: in tiles of the vocabulary, and dense by autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from jobs.benchmark.measure import SHARES, device, fresh, interleaved, peak_memory, shares
from jobs.benchmark.table import best_and_spread, table
from jobs.run import log
from udfs.distribution_loss import loss

D, POSITIVES = 64, 20
TILED, DENSE = "in tiles (ours)", "dense autograd"
# Logits, their log-softmax and its gradient: dense is left out where they would need more.
DENSE_BYTES = 3e9


def run(users: list[int], items: int, seed: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Times, peak memory, ratios and the largest difference of gradients for each number of users.

    Returns:
        tables (one), cases: the figures behind it.
    """
    cases, rows = [], []
    for count in users:
        fits = 12 * items * count <= DENSE_BYTES
        names = [TILED, DENSE] if fits else [TILED]
        memory = {n: fresh("training_speed", "memory", name=n, users=count, items=items, seed=seed) for n in names}
        repeats = 11 if count <= 10_000 else 5 if count <= 100_000 else 3
        found = fresh("training_speed", "times", names=names, users=count, items=items, seed=seed, repeats=repeats)
        cases.append({"users": count, "items": items, "peak_bytes": memory, **found})
        ours = min(found["seconds"][TILED])
        for name in names:
            best = min(found["seconds"][name])
            # Vocabulary and hidden states are read twice, since a gradient needs the normaliser; gradients are written.
            moved = 4 * 3 * (count + items) * D
            reached = shares(ceilings, best, 6 * items * count * D, moved, "float32")
            spread, mib = best_and_spread(found["seconds"][name]), round(memory[name] / 2**20)
            rows.append(
                [count, name, spread, best / ours, *reached, mib, found["difference"] if name == TILED else None]
            )
        if not fits:
            rows.append(
                [count, DENSE, f"left out: needs {12 * items * count / 1e9:.0f} GB", None, None, None, None, None]
            )
        log(f"training step, {count} users: {rows[-2:]}")
    columns = ["users", "method", "time", "times ours", *SHARES, "peak MiB", "gradients differ by"]
    note = (
        f"Forward and backward pass of {items} items with {POSITIVES} users each, d = {D}, float32, "
        f"{torch.get_num_threads()} threads on {device()}, seed {seed}. The matmul share counts the three products that a dense "
        "step has, the memory's what is given twice and the gradients once. The difference is the largest one, relative to the "
        "largest gradient; peak memory includes the gradients."
    )
    return {"tables": [table("Training step: softmax over all users", columns, rows, note)], "cases": cases}


def times(names: list[str], users: int, items: int, seed: int, repeats: int) -> dict[str, Any]:
    """seconds of each method; difference: of gradients from the dense ones (None where dense is left out)."""
    step = _step(users, items, seed)
    difference = None
    if DENSE in names:
        pairs = zip(step(TILED), step(DENSE), strict=True)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    methods = {name: partial(step, name) for name in names}
    return {"seconds": interleaved(methods, repeats), "difference": difference}


def memory(name: str, users: int, items: int, seed: int) -> int:
    """Peak bytes of one step."""
    _step(1000, items, seed)(name)  # libraries' own buffers and threads
    step = _step(users, items, seed)
    return peak_memory(lambda: step(name))


def _step(users: int, items: int, seed: int) -> Callable[[str], list[torch.Tensor]]:
    """A step by either method: the gradients of hidden states and vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(items, D, generator=generator) * (2 / D**0.5)
    vocabulary = torch.randn(users, D, generator=generator)
    positives = torch.randint(users // POSITIVES, (items, POSITIVES), generator=generator)
    positives = positives + torch.arange(POSITIVES) * (users // POSITIVES)  # each user of an item once
    hidden, vocabulary, positives = (t.to(device()) for t in (hidden, vocabulary, positives))
    indptr = torch.arange(0, items * POSITIVES + 1, POSITIVES, device=hidden.device)
    leaves = [hidden.requires_grad_(), vocabulary.requires_grad_()]

    def step(name: str) -> list[torch.Tensor]:
        if name == TILED:
            value = loss(hidden, vocabulary, indptr, positives.flatten())
        else:
            value = -torch.log_softmax(hidden @ vocabulary.T, dim=1).gather(1, positives).mean(dim=1)
        return list(torch.autograd.grad(value.mean(), leaves))

    return step
