"""How much the language model counts beside retrieval when candidates are ranked: measured on users whom it did not learn from.

A small language model, or one that was trained for minutes, may rank worse than the vectors that found the candidates; a good
one knows what they do not. So users that the reader left out are asked as tonight's are, their last item being among their
candidates, and a conditional logit (udfs/conditional_logit.py) weighs likelihood and retrieval score. The weights are an
artifact (`_artifacts/reader_weights/<version>`) of a reader and a space. Items' vectors were trained with these users' last
items too, which favours retrieval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs import allmrec_artifacts, allmrec_reader, recommend_reading
from jobs.allmrec_artifacts import Training
from jobs.allmrec_backbone import Side, SpaceSide
from jobs.allmrec_night import Night
from jobs.allmrec_reader import Spoken
from jobs.recommend_users import Nearest
from jobs.run import Run, log
from jobs.sampled_users import ENOUGH
from udfs import conditional_logit
from udfs.allmrec_actor import Shard
from udfs.sampled_ranking import ndcg, ranks
from udfs.sequences import PADDING, Ints
from udfs.vectors import Matrix

KIND = "reader_weights"
_AT_ONCE = 1024


@dataclass(frozen=True)
class Weights:
    """What a candidate is ranked by: likelihood x log-likelihood of its title + retrieval x retrieval score."""

    likelihood: float = 1.0
    retrieval: float = 0.0

    def __call__(self, likelihoods: Matrix, retrieval: Matrix) -> Matrix:
        """[n, C] float32 of both."""
        # A retrieval score that counts nothing may be anything.
        second = self.retrieval * retrieval if self.retrieval else 0.0
        return (self.likelihood * likelihoods + second).astype(np.float32)


def find(
    run: Run, night: Night, side: Side, space: SpaceSide, items: Spoken, reader: str, nearest: Nearest, most: int
) -> tuple[Weights, str | None]:
    """The weights of this reader in this space and their version, measured now if there are none; without users to measure
    them on, or with allmrec.reader.weigh_users 0, the likelihood alone, as the paper has it, and None.

    Args:
        side: whose users the reader is told of; space: whose users and items retrieval compares.
        most: candidates of a user.
    """
    conf = run.settings.allmrec.reader
    if not conf.weigh_users:
        return Weights(), None
    identity = {
        "reader": reader,
        "space_version": space.version,
        "candidates": str(most),
        "users": str(conf.weigh_users),
        "normalise": str(conf.normalise),
    }
    version = allmrec_artifacts.newest(run, KIND, identity)
    if version is None:
        asked, retrieval, of = _asked(run, night, side, space, items, nearest, most)
        if len(retrieval) < ENOUGH:
            log(
                f"[recommend] {len(retrieval)} of {of} held-out users have their last item among their {most} candidates, too "
                "few to weigh retrieval by: candidates are ranked by likelihood alone"
            )
            return Weights(), None

        def fit(training: Training) -> dict[str, Any]:
            return {"of": of, **_measured(run, night, items, reader, asked, retrieval)}

        arrays: list[np.ndarray] = [asked.users, asked.candidates, retrieval]
        version = allmrec_artifacts.train(run, KIND, identity, None, arrays, fit, here=True)
    facts = run.artifact(KIND, version).facts()
    return Weights(facts["likelihood"], facts["retrieval"]), version


def _asked(
    run: Run, night: Night, side: Side, space: SpaceSide, items: Spoken, nearest: Nearest, most: int
) -> tuple[Shard, Matrix, int]:
    """Held-out users with their candidates, the last item of the history first; the retrieval scores [n, most], NaN for
    PADDING; and how many users were looked at: whose last item was not found cannot say in which order candidates belong."""
    conf, seed = run.settings.allmrec.reader, run.settings.seed
    _, held = allmrec_reader.learnable(night, side, items, conf, seed)
    held = held[space.users_known[held]]
    held = np.random.Generator(np.random.Philox(seed)).permutation(held)
    histories, looked = night.histories, 0
    chosen: list[int] = []
    candidates, scores = [], []
    for user, x in _vectors(space, held, histories.lengths[held] - 1):
        if len(chosen) == conf.weigh_users:
            break
        looked += 1
        own = histories.items[histories.indptr[user] : histories.indptr[user + 1]]
        found = nearest(x, own[:-1], items.known, most)
        if own[-1] in [item for item, _ in found]:
            found = sorted(found, key=lambda pair: pair[0] != own[-1])  # stable: the others stay in their order
            chosen.append(user)
            candidates.append([item for item, _ in found] + [PADDING] * (most - len(found)))
            scores.append([score for _, score in found] + [np.nan] * (most - len(found)))
    rows: Ints = np.array(chosen, np.int64)
    before, _ = allmrec_reader.without_last(night, items, rows)
    users = side.before(rows, histories.lengths[rows] - 1)
    asked = Shard(users, before, np.array(candidates, np.int64).reshape(-1, most))
    return asked, np.array(scores, np.float32).reshape(-1, most), looked


def _vectors(space: SpaceSide, users: Ints, lengths: Ints) -> Iterator[tuple[int, Matrix]]:
    """Users, and their vectors without what follows the first `lengths` items; as many at once as folding in is worth: each
    time it begins with the Gram matrix of all items."""
    for start in range(0, len(users), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        yield from zip(users[some].tolist(), space.before(users[some], lengths[some]), strict=True)


def _measured(run: Run, night: Night, items: Spoken, reader: str, asked: Shard, retrieval: Matrix) -> dict[str, Any]:
    size, n = run.settings.allmrec.reader.shard_users, len(retrieval)
    log(f"[recommend] weighing the reader by {n} held-out users")
    rows = [np.arange(at, min(at + size, n)) for at in range(0, n, size)]
    shards = [Shard(asked.users[own], asked.histories.take(own), asked.candidates[own]) for own in rows]
    read = recommend_reading.likelihoods(run, night, items, reader, shards, n)
    likelihoods = np.concatenate([scores for scores, _ in read])
    weights = Weights(*conditional_logit.fit([likelihoods, retrieval]).tolist())
    # Each user's by the weights of the others.
    both, fold = np.empty_like(retrieval), np.arange(n) % min(5, n)
    for own in (fold == number for number in range(min(5, n))):
        others = ~own if n > 1 else own
        of_others = conditional_logit.fit([likelihoods[others], retrieval[others]])
        both[own] = Weights(*of_others.tolist())(likelihoods[own], retrieval[own])
    orders = {"retrieval": retrieval, "likelihood": likelihoods, "both": both}
    quality = {
        name: round(float(ndcg(ranks(np.where(np.isnan(scores), -np.inf, scores)), 10).mean()), 4)
        for name, scores in orders.items()
    }
    told = ", ".join(f"{value:.3f} by {name}" for name, value in quality.items())
    log(f"[recommend] NDCG@10 of their last item among their candidates: {told}")
    return {"likelihood": weights.likelihood, "retrieval": weights.retrieval, "users": n, "ndcg@10": quality}
