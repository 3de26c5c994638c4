"""What FilterLLM is compared with on a night: other vectors for the cold items, in the space of the night's users.

Each takes the night and returns [cold items, d] float32 in the catalog's order, or None where cold items get no vector. What
must be tuned is tuned on the validation part; where there is none (a split by time), TF-IDF ridge is on the warm items that the
night itself holds out, and interactions are folded in as the first of the options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from jobs import allmrec_night
from jobs.benchmark import coldllm
from jobs.benchmark.datasets import data_folder
from jobs.benchmark.measured import Measured
from jobs.run import log
from jobs.sampled_users import ENOUGH
from udfs import two_tower
from udfs.fold_in import fold_in, gram, norm_scale, to_csr

_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_INTERACTIONS = (1.0, 2.0, 5.0, 15.0)
_LENGTHS = (0.5, 1.0, 1.6, 3.0, 6.0, 10.0)


def cf_on_warm_only(night: Measured) -> None:
    """Cold items have no vector: what CF alone does."""


def tfidf_ridge(night: Measured) -> np.ndarray:
    """TF-IDF of the text -> CF vector, by ridge regression on the warm items: no language model."""
    from sklearn.linear_model import Ridge

    catalog, systems = night.catalog, night.systems
    warm = ~catalog.cold & systems.items_known

    def mapped(ridge: float, learn: np.ndarray, asked: np.ndarray) -> np.ndarray:
        # The normal equations of as many items as words are solved by conjugate gradients.
        model = Ridge(alpha=ridge, solver="sparse_cg", tol=1e-3, fit_intercept=False)
        model.fit(systems.texts[learn], systems.items[learn])
        return np.asarray(model.predict(systems.texts[asked]), np.float32)

    if "val" not in night.parts:
        ridge, length = _best_for_held_out(night, warm, mapped)
        return mapped(ridge, warm, catalog.cold) * np.float32(length)
    return _tuned(night, {ridge: mapped(ridge, warm, catalog.cold) for ridge in _RIDGES}, "tfidf_ridge")


def _best_for_held_out(
    night: Measured, warm: np.ndarray, mapped: Callable[[float, np.ndarray, np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """The ridge and the length of vectors that suit the night's held-out items, which refresh.scale=auto goes by too.

    Each ridge gives vectors of the median length of CF's own; the best are nearest to these by the scores that users give
    them (udfs/blend.py). With fewer than ten items: the ridge of the night's map of words, vectors as they come.
    """
    catalog, systems = night.catalog, night.systems
    staged = night.run.staging("filterllm_score").read("held_out", ["item_id"])
    held = warm & np.isin(catalog.item_ids, staged["item_id"].to_pylist())
    if held.sum() < ENOUGH:
        return night.run.settings.filterllm.word_ridge, 1.0
    metric, trained = gram(systems.users[systems.users_known]), systems.items[held]
    found = {}
    for ridge in _RIDGES:
        vectors = mapped(ridge, warm & ~held, held)
        length = norm_scale(trained, vectors)
        off = length * vectors - trained
        found[ridge] = (float(((off @ metric) * off).sum(axis=1) @ catalog.interactions[held]), length)
    best = min(found, key=lambda ridge: found[ridge][0])
    log(f"[benchmark] tfidf_ridge: {best:g} is best for {held.sum()} held-out items of {found}")
    return best, found[best][1]


def released(night: Measured) -> np.ndarray:
    """ColdLLM's released simulated interactions of CiteULike (the pairs its language model said Yes to), folded in."""
    pairs = pd.read_parquet(data_folder("citeulike-a") / "coldllm_refine.parquet")
    pairs = pairs[pairs["answer"] == "Yes"] if "answer" in pairs else pairs
    users = pd.Index(night.catalog.user_ids).get_indexer(pd.Index(pairs["user_id"].astype(str)))
    cold = np.flatnonzero(night.catalog.cold)
    items = pd.Index([night.catalog.item_ids[i] for i in cold]).get_indexer(pd.Index(pairs["item_id"].astype(str)))
    there = (users >= 0) & (items >= 0)
    return _folded(night, users[there], items[there], np.ones(int(there.sum())), len(cold), "coldllm")


def text_to_judgment(night: Measured, tune_steps: int = 0) -> np.ndarray:
    """ColdLLM's way with the project's own language model: two towers keep 20 users, SmolLM2 says Yes or No to each."""
    from jobs import text_embeddings

    catalog, settings = night.catalog, night.run.settings
    cold = np.flatnonzero(catalog.cold)
    trained = night.run.staging("filterllm_train").facts()
    there = [i for i, sha in enumerate(catalog.text_sha256) if sha is not None]
    found = text_embeddings.load(night.run, [str(catalog.text_sha256[i]) for i in there], trained["encoder_version"])
    states = np.zeros((len(catalog.item_ids), found.shape[1]), np.float32)
    states[there] = found
    histories = allmrec_night.read(night.run.staging("snapshot")).histories
    indptr, indices = histories.indptr, histories.items
    device = "cuda" if settings.ray.gpus_per_actor and torch.cuda.is_available() else "cpu"
    towers = two_tower.Options(seed=settings.seed)
    users = coldllm.candidates(states, indptr, indices, cold, options=towers, device=device)
    options = coldllm.JudgeOptions(seed=settings.seed, dtype="bfloat16", device=device, tune_steps=tune_steps)
    titles = [text or "" for text in catalog.texts]
    folder = Path(night.run.staging("text_to_judgment").uri)
    yes, facts = coldllm.judge(titles, indptr, indices, cold, users, options, folder)
    log(f"[benchmark] judgment: {facts}")
    rows = np.repeat(np.arange(len(cold)), users.shape[1])
    return _folded(night, users.ravel(), rows, yes.ravel().astype(np.float64), len(cold), "text_to_judgment")


BASELINES: dict[str, Callable[[Any], np.ndarray | None]] = {
    "CF on warm items only": cf_on_warm_only,
    "TF-IDF ridge to the CF space": tfidf_ridge,
    "ColdLLM 7B's released interactions": released,
    "text to judgment (SmolLM2)": text_to_judgment,
    "text to judgment (SmolLM2, fine-tuned)": partial(text_to_judgment, tune_steps=300),
}

#: Baselines that are there for one data set only.
ONLY = {"ColdLLM 7B's released interactions": "citeulike-a"}


def _folded(night: Measured, users: np.ndarray, rows: np.ndarray, weights: np.ndarray, n: int, name: str) -> np.ndarray:
    """Pairs (user, row of a cold item) folded in as a night folds in its own, counting together as tuned."""
    total = np.bincount(rows, weights, minlength=n)[rows]
    facts = night.run.artifact("spaces", night.run.staging("cf").facts()["space_version"]).facts()

    def at(interactions: float) -> np.ndarray:
        indptr, columns, shares = to_csr(rows, users, interactions * weights / total, n)
        known = {"alpha": facts["alpha"], "regularization": facts["regularization"], "scale": facts["item_scale"]}
        return fold_in(night.systems.users, indptr, columns, np.ones(len(columns)), shares=shares, **known)

    return _tuned(night, {interactions: at(interactions) for interactions in _INTERACTIONS}, name)


def _tuned(night: Measured, options: dict[float, np.ndarray], name: str) -> np.ndarray:
    """The vectors, and the length of them, that rank best among all items on the validation part, as refresh.scale may for a
    night's own; those of the first option where there is no validation part.
    """
    if "val" not in night.parts:
        return next(iter(options.values()))
    metric = f"overall ndcg@{night.run.settings.evaluate.k[0]}"
    scores = {
        (key, length): night.vectors("val", vectors * np.float32(length))[metric]
        for key, vectors in options.items()
        for length in _LENGTHS
    }
    key, length = max(scores, key=lambda choice: scores[choice])
    log(f"[benchmark] {name}: {key:g} with {length:g} times the length is best on the validation part of {scores}")
    return options[key] * np.float32(length)
