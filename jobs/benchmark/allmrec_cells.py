"""A cell of the A-LLMRec benchmark: a row in one scenario (all users, few of them, another domain) with one seed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmark import allmrec_data
from jobs.benchmark.allmrec_data import Corpus, Division, Questions
from jobs.benchmark.allmrec_parts import Cost, Parts, catalogue_of, measured
from jobs.benchmark.allmrec_rows import Options
from jobs.run import log
from udfs import backbone, conditional_logit
from udfs.allmrec_reader import Catalogue, Reader
from udfs.backbone import SEQUENCE_MODELS, Backbone, SequenceBackbone, inner_products
from udfs.progress import Progress
from udfs.sampled_ranking import ndcg, ranks
from udfs.sequences import Ints, Sequences
from udfs.vectors import Matrix

METRICS = ("Hit@1", "NDCG@10", "HR@10")
# Users whose candidates the language model reads between two signs of progress.
_USERS = 32
_WEIGHED = ("stage 1 with text", "reader with stage 1")
_JOINED = ("stage 1", *_WEIGHED, "reader")


def groups(options: Options, scenario: str, others: list[str]) -> list[str]:
    """The groups of a scenario that a row can be measured on; none: the scenario does not apply to it.

    What learns nothing (random, popularity, the encoder or the language model alone) has no few-shot. A CF model knows only
    the items of its own domain; one of user numbers, only users that it was trained on.
    """
    read_only = options.ranker == "reader" and not (options.user or options.items)
    untrained = options.ranker in ("random", "text") or read_only
    learnt = options.ranker in ("backbone", *_JOINED) and not untrained
    sequential = options.backbone in SEQUENCE_MODELS
    if scenario == "all":
        return [name for name in others if sequential or not learnt or name != "cold users"]
    if scenario == "cross-domain":
        joined = options.ranker in _JOINED and sequential
        return others if untrained or joined else []
    return others if learnt and sequential else []


def cell(
    options: Options, folder: Path, corpus: Corpus, division: Division, seed: int, scenario: str, other: Corpus | None
) -> dict[str, Any] | None:
    """Figures "group metric", users by group, seconds and bytes; None if the scenario does not apply.

    Args:
        other: cross-domain: the corpus that is asked about; the parts are trained on `corpus` and `division`.
    """
    parts = Parts(folder, corpus, division, seed, scenario, options.device)
    asked = division.asked
    if other is not None:
        test = allmrec_data.divide(other, None, seed, options.test_users, options.cold_users).asked.of(["all"])
        asked = Questions(test.users, test.histories, test.candidates, {"cross-domain": test.groups["all"]})
    names = groups(options, scenario, list(asked.groups))
    if not names:
        return None
    asked = asked.of(names)
    scores, before = _scores(options, parts, asked, other)
    found, scoring = measured(lambda: ranks(scores()), options.device)
    figures: dict[str, float] = {}
    users = {name: int(rows.sum()) for name, rows in asked.groups.items() if rows.any()}
    for name in users:
        own = found[asked.groups[name]]
        values = {"Hit@1": own == 0, "NDCG@10": ndcg(own, 10), "HR@10": own < 10}
        figures |= {f"{name} {metric}": float(values[metric].mean()) for metric in METRICS}
    cost = before + scoring
    return {"figures": figures, "users": users, "seconds": round(cost.seconds, 1), "memory": cost.memory}


def _scores(options: Options, parts: Parts, asked: Questions, other: Corpus | None) -> tuple[Any, Cost]:
    """A function that gives [n, 20], and what it cost to get there."""
    corpus = other or parts.corpus
    if options.ranker == "random":
        rng = np.random.Generator(np.random.Philox(parts.seed))
        return lambda: rng.random(asked.candidates.shape, np.float32), Cost()
    if options.ranker == "popularity":
        return lambda: parts.division.counts[asked.candidates].astype(np.float32), Cost()
    if options.ranker == "text":
        texts, encoded = parts.texts(options, corpus)
        like = _nearest if options.nearest else _like_the_mean
        return lambda: like(texts, asked.histories, asked.candidates), encoded.cost
    if options.ranker == "backbone":
        model, trained = parts.backbone(options)
        return lambda: model.score(asked.users, asked.histories, asked.candidates), trained.cost
    if options.ranker == "reader":
        read, cost, users = _reader(options, parts, other)
        likelihoods, reading = read(users(asked.users, asked.histories), asked.histories, asked.candidates)
        return lambda: likelihoods, cost + reading
    several, cost, users = _several(options, parts, other)
    weights, weighing = _weights(options, parts) if options.ranker in _WEIGHED else (np.ones(1, np.float32), Cost())
    found, scoring = several(users(asked.users, asked.histories), asked.histories, asked.candidates)
    return lambda: np.tensordot(weights, np.stack(found), 1), cost + weighing + scoring


def _several(options: Options, parts: Parts, other: Corpus | None) -> tuple[Any, Cost, Any]:
    """A function of (x_u, histories, candidates) that gives the row's scores, one [n, 20] each: of the first stage, of how like
    the history's texts the candidates' are (their mean, and the nearest), and of the language model, and their cost; the cost
    before; and a function that gives x_u."""
    model, decoded, _, cost = _joined(options, parts, other)
    kinds: list[Any] = [lambda x, histories, candidates: inner_products(x, decoded, candidates)]
    if options.ranker in _WEIGHED:
        texts, _ = parts.texts(options, other or parts.corpus)
        kinds.append(lambda x, histories, candidates: _like_the_mean(texts, histories, candidates))
        if options.nearest:
            kinds.append(lambda x, histories, candidates: _nearest(texts, histories, candidates))
    read: Any = None
    if options.ranker == "reader with stage 1":
        read, of_reader, _ = _reader(options, parts, other)
        cost = of_reader if options.user or options.items else cost + of_reader

    def several(*asked: Any) -> tuple[list[Matrix], Cost]:
        found, spent = measured(lambda: [kind(*asked) for kind in kinds], options.device)
        if read is None:
            return found, spent
        likelihoods, reading = read(*asked)
        return [*found, likelihoods], spent + reading

    return several, cost, model.users


def _weights(options: Options, parts: Parts) -> tuple[Matrix, Cost]:
    """What each of the scores counts: by the validation items, which none of them has learnt from; and what that cost."""
    model, _ = parts.backbone(options)
    asked = allmrec_data.validation(parts.division, model)
    if options.ranker == "reader with stage 1":
        asked = allmrec_data.some(asked, options.weigh_users, parts.seed)
    candidates = asked.draw(np.arange(len(parts.corpus.titles)), 19, parts.seed)
    several, _, _ = _several(options, parts, None)
    found, cost = several(asked.users, asked.histories, candidates)
    weights = conditional_logit.fit(found)
    named = "stage 1, the mean and the nearest of the texts, and the language model"
    log(f"[benchmark] weights of {named}, as far as there are: {weights.round(4).tolist()}")
    return weights.astype(np.float32), cost


def _reader(options: Options, parts: Parts, other: Corpus | None) -> tuple[Any, Cost, Any]:
    """A function of (x_u, histories, candidates) that gives likelihoods [n, 20] and their cost; the cost before; and a function
    that gives x_u."""
    reader, joint, part = parts.reader(options)
    corpus, model = other or parts.corpus, None
    if options.user or options.items:
        model, _, vectors, _ = _joined(options, parts, other)
        if other is not None and not options.random_joint:
            joint = vectors
    if len(joint) != len(corpus.titles):
        joint = np.resize(joint, (len(corpus.titles), joint.shape[1]))
    catalogue = catalogue_of(reader, corpus, joint, options)

    def read(x: Matrix, histories: Sequences, candidates: Ints) -> tuple[Matrix, Cost]:
        of_users = x if options.user else x[:, :0]  # what no prompt names makes no difference
        asked: list[np.ndarray] = [of_users, histories.indptr, histories.items, candidates, joint]
        score = partial(_likelihoods, reader, catalogue, x, histories, candidates)
        return parts.likelihoods(options, part, corpus.titles, asked, score)

    def nobody(users: Ints, histories: Sequences) -> Matrix:
        return np.zeros((len(users), 1), np.float32)

    return read, part.cost, model.users if model else nobody


def _likelihoods(reader: Reader, catalogue: Catalogue, x: Matrix, histories: Sequences, candidates: Ints) -> Matrix:
    found = np.empty(candidates.shape, np.float32)
    with Progress("reader", len(x), "users") as progress:
        for start in range(0, len(x), _USERS):
            rows = np.arange(start, min(start + _USERS, len(x)))
            found[rows] = reader.score(catalogue, x[rows], histories.take(rows), candidates[rows])
            progress.advance(len(rows))
    return found


def _joined(options: Options, parts: Parts, other: Corpus | None) -> tuple[Backbone, Matrix, Matrix, Cost]:
    """A CF model for the items that are asked about, their decoded CF vectors, their joint vectors, and the cost.

    In another domain the items' decoded texts stand in the CF model where its own items' vectors were.
    """
    model, _ = parts.backbone(options)
    alignment, joint, part, adapted = parts.joint(options)
    if other is None:
        return model, alignment.decoded(joint), joint, part.cost
    texts, encoded = parts.texts(options, other, adapted)
    nothing = np.zeros((len(texts), options.dimension), np.float32)
    joint = alignment.joint(nothing, texts, np.ones(len(texts), np.bool_))
    decoded = alignment.decoded(joint)
    assert isinstance(model, SequenceBackbone)
    return SequenceBackbone(backbone.with_items(model.model, decoded)), decoded, joint, part.cost + encoded.cost


def _like_the_mean(texts: Matrix, histories: Sequences, candidates: Ints) -> Matrix:
    """[n, 20]: inner products of the mean of each history's texts with the candidates'; 0 for an empty history."""
    found = np.zeros((len(histories), texts.shape[1]), np.float32)
    np.add.at(found, histories.rows, texts[histories.items])
    found /= np.maximum(histories.lengths, 1)[:, None]
    return inner_products(found, texts, candidates)


def _nearest(texts: Matrix, histories: Sequences, candidates: Ints) -> Matrix:
    """[n, 20]: the highest inner product of a candidate's text with one of the history's; 0 for an empty history."""
    found = np.zeros(candidates.shape, np.float32)
    for row in np.flatnonzero(histories.lengths):
        own = histories.items[histories.indptr[row] : histories.indptr[row + 1]]
        found[row] = (texts[own] @ texts[candidates[row]].T).max(0)
    return found
