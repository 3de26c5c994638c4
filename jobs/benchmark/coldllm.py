"""ColdLLM's way (arXiv 2402.09176) with a language model of this project: a filter keeps users of a cold item, a judge reads each.

For the quality benchmark; what it costs is measured by jobs/benchmark/judgment.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.benchmark.kept import Kept
from jobs.run import log
from udfs import two_tower
from udfs.fingerprint import fingerprint
from udfs.judged_pairs import Pairs, recent, training_pairs
from udfs.judgment import Judge
from udfs.judgment_training import Options, fine_tune, fit_answer
from udfs.model_files import find_model
from udfs.progress import Progress
from udfs.vectors import Matrix

Ints = NDArray[np.int64]
_PART = 256  # users whose pairs are judged and kept at a time


def candidates(
    states: Matrix,
    indptr: Ints,
    indices: Ints,
    cold: Ints,
    k: int = 20,
    options: two_tower.Options | None = None,
    device: str = "cpu",
) -> Ints:
    """ColdLLM's filter: the users [len(cold), k] that the two towers keep of each cold item, best first.

    Args:
        states: [I, width] float32, mean-pooled text embeddings of all items.
        indptr, indices: user u's training items are indices[indptr[u]:indptr[u + 1]], numbers of items.
        cold: numbers of the cold items.
    """
    # The towers see warm items only: their mean and deviation too.
    warm, at = np.unique(indices, return_inverse=True)
    model = two_tower.train(states[warm], indptr, at, options or two_tower.Options(), log, device=device)
    profiles = two_tower.user_inputs(states[warm], indptr, at)
    return two_tower.candidates(model, states[cold], profiles, k, np.diff(indptr) > 0).users.cpu().numpy()


@dataclass(frozen=True)
class JudgeOptions:
    """history: titles of a user; fit_users: users to fit the answer to, of whom each gives fit_items true pairs; 0 asks
    the model as it comes. tune_steps: steps of LoRA on these pairs behind that, as ColdLLM tunes its model."""

    model: str = "smollm2"
    history: int = 10
    fit_users: int = 300
    fit_items: int = 4
    tune_steps: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    seed: int = 7


def judge(
    titles: Sequence[str],
    indptr: Ints,
    indices: Ints,
    cold: Ints,
    users: Ints,
    options: JudgeOptions,
    folder: Path | None = None,
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """ColdLLM's refining: p(Yes) [len(cold), k] float32 of each cold item's users, and facts of the judge.

    Args:
        titles: of all items; the other arguments are those of `candidates`, and `users` [len(cold), k] what it gives. A
        user's last items are its most recent ones.
        folder: where what is done is kept: a judging of hours that was stopped goes on from there (but tunes anew).
    """
    model = Judge(find_model(options.model).directory, dtype=options.dtype, device=options.device)
    name = fingerprint([asdict(options), list(titles)], indptr, indices, cold, users)[:16]

    def kept(part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return Kept(folder, f"judged-{name}-{part}").once(make) if folder else make()

    facts: dict[str, Any] = {"pairs": int(users.size), "seconds": 0.0}
    if options.fit_users:
        warm = np.unique(indices)
        known = training_pairs(
            indptr, np.searchsorted(warm, indices), len(warm),
            users=options.fit_users, per_user=options.fit_items, length=options.history, seed=options.seed,
        )  # fmt: skip
        of_users = [[titles[warm[item]] for item in history] for history in known.histories]
        of_items = [titles[item] for item in warm]
        fitted = kept("fit", lambda: _fit(model, of_users, of_items, known))
        model.direction = torch.tensor(fitted.pop("direction"), device=model.direction.device)
        model.bias = fitted.pop("bias")
        facts |= fitted
        log(
            f"judge: fitted to {fitted['fitted_pairs']} pairs, area under the ROC curve of held-out users {fitted['auc']:.3f}"
        )
        if options.tune_steps:
            how = Options(steps=options.tune_steps, seed=options.seed)
            fine_tune(model, of_users, of_items, known.users, known.items, known.labels, how, log)
    histories = [[titles[item] for item in history] for history in recent(indptr, indices, options.history)]
    names = [titles[item] for item in cold]
    pairs, rows = users.ravel(), np.repeat(np.arange(len(cold)), users.shape[1])
    scores = np.empty(len(pairs), np.float32)
    # A user's pairs share a prefix, and so stay together.
    asked = np.unique(pairs)
    with Progress("judge", len(pairs), "pairs") as progress:
        for start in range(0, len(asked), _PART):
            own = np.flatnonzero(np.isin(pairs, asked[start : start + _PART]))

            def score(own: Ints = own) -> dict[str, Any]:
                begun = time.perf_counter()
                found = model.score(histories, names, pairs[own], rows[own])
                return {"scores": found.tolist(), "seconds": time.perf_counter() - begun}

            part = kept(str(start), score)
            scores[own] = part["scores"]
            facts["seconds"] += part["seconds"]
            progress.advance(len(own))
    return (1 / (1 + np.exp(-scores.reshape(users.shape)))).astype(np.float32), facts


def _fit(model: Judge, histories: list[list[str]], titles: list[str], known: Pairs) -> dict[str, Any]:
    """Fit the answer to true pairs of warm items against others."""
    states = model.states(histories, titles, known.users, known.items)
    auc = fit_answer(model, states, known.labels, known.users)
    return {"fitted_pairs": len(known.labels), "auc": auc, "direction": model.direction.tolist(), "bias": model.bias}
