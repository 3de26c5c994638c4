"""A cell of the A-LLMRec benchmark: a row in one scenario (all users, few of them, another domain) with one seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmark import allmrec_data
from jobs.benchmark.allmrec_data import Asked, Corpus, Division
from jobs.benchmark.allmrec_parts import Cost, Parts, catalogue_of, measured
from jobs.benchmark.allmrec_rows import Options
from udfs import backbone
from udfs.backbone import SEQUENCE_MODELS, Backbone, SequenceBackbone, inner_products
from udfs.progress import Progress
from udfs.sampled_ranking import ndcg, ranks
from udfs.sequences import Sequences
from udfs.vectors import Matrix

METRICS = ("Hit@1", "NDCG@10", "HR@10")
# Users whose candidates the language model reads between two signs of progress.
_USERS = 32
_STAGE_1 = ("stage 1", "stage 1 with text")
# Of the text similarity beside the first stage's score, both of standard deviation 1.
_FACTORS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def groups(options: Options, scenario: str, others: list[str]) -> list[str]:
    """The groups of a scenario that a row can be measured on; none: the scenario does not apply to it.

    What learns nothing (random, popularity, the encoder or the language model alone) has no few-shot. A CF model knows only
    the items of its own domain; one of user numbers, only users that it was trained on.
    """
    untrained = options.ranker in ("random", "text") or not (options.user or options.items)
    learnt = options.ranker in ("backbone", *_STAGE_1, "reader") and not untrained
    sequential = options.backbone in SEQUENCE_MODELS
    if scenario == "all":
        return [name for name in others if sequential or not learnt or name != "cold users"]
    if scenario == "cross-domain":
        joined = options.ranker in (*_STAGE_1, "reader") and sequential
        return others if untrained or joined else []
    return others if learnt and sequential else []


def cell(
    options: Options, folder: Path, corpus: Corpus, division: Division, seed: int, scenario: str, other: Corpus | None
) -> dict[str, Any] | None:
    """Figures "group metric", users by group, seconds and bytes; None if the scenario does not apply.

    Args:
        other: cross-domain: the corpus that is asked about; the parts are trained on `corpus` and `division`.
    """
    parts = Parts(folder, corpus, division, seed, scenario)
    asked = division.asked
    if other is not None:
        test = allmrec_data.divide(other, None, seed, options.test_users, options.cold_users).asked.of(["all"])
        asked = Asked(test.users, test.histories, test.candidates, {"cross-domain": test.groups["all"]})
    names = groups(options, scenario, list(asked.groups))
    if not names:
        return None
    asked = asked.of(names)
    scores, before = _scores(options, parts, asked, other)
    found, scoring = measured(lambda: ranks(scores()))
    figures: dict[str, float] = {}
    users = {name: int(rows.sum()) for name, rows in asked.groups.items() if rows.any()}
    for name in users:
        own = found[asked.groups[name]]
        values = {"Hit@1": own == 0, "NDCG@10": ndcg(own, 10), "HR@10": own < 10}
        figures |= {f"{name} {metric}": float(values[metric].mean()) for metric in METRICS}
    cost = before + scoring
    return {
        "figures": figures,
        "users": users,
        "seconds": round(cost.seconds, 1),
        "scoring": round(scoring.seconds, 1),
        "memory": cost.memory,
    }


def _scores(options: Options, parts: Parts, asked: Asked, other: Corpus | None) -> tuple[Any, Cost]:
    """A function that gives [n, 20], and what it cost to get there."""
    corpus = other or parts.corpus
    if options.ranker == "random":
        rng = np.random.Generator(np.random.Philox(parts.seed))
        return lambda: rng.random(asked.candidates.shape, np.float32), Cost()
    if options.ranker == "popularity":
        return lambda: parts.division.counts[asked.candidates].astype(np.float32), Cost()
    if options.ranker == "text":
        texts, encoded = parts.texts(options, corpus)
        return lambda: inner_products(_means(texts, asked.histories), texts, asked.candidates), encoded.cost
    if options.ranker == "backbone":
        model, trained = parts.backbone(options)
        return lambda: model.score(asked.users, asked.histories, asked.candidates), trained.cost
    if options.ranker in _STAGE_1:
        model, decoded, _, cost = _joined(options, parts, other)
        weight = _text_weight(options, parts) if options.ranker == "stage 1 with text" else 0.0

        def both() -> Matrix:
            scores = inner_products(model.users(asked.users, asked.histories), decoded, asked.candidates)
            if weight:
                q, _ = parts.texts(options, corpus)
                scores += weight * inner_products(_means(q, asked.histories), q, asked.candidates)
            return scores

        return both, cost
    reader, joint, part = parts.reader(options)
    cost, users = part.cost, np.zeros((len(asked.users), 1), np.float32)
    if options.user or options.items:
        model, _, vectors, _ = _joined(options, parts, other)
        users = model.users(asked.users, asked.histories)
        if other is not None and not options.random_joint:
            joint = vectors
    if len(joint) != len(corpus.titles):
        joint = np.resize(joint, (len(corpus.titles), joint.shape[1]))
    catalogue = catalogue_of(reader, corpus, joint, options)

    def read() -> Matrix:
        found = np.empty(asked.candidates.shape, np.float32)
        with Progress("reader", len(users), "users") as progress:
            for start in range(0, len(users), _USERS):
                rows = np.arange(start, min(start + _USERS, len(users)))
                own = asked.histories.take(rows), asked.candidates[rows]
                found[rows] = reader.score(catalogue, users[rows], *own)
                progress.advance(len(rows))
        return found

    return read, cost


def _text_weight(options: Options, parts: Parts) -> float:
    """What the text similarity counts beside the first stage's score: the best of a few for the validation items."""
    model, decoded, _, _ = _joined(options, parts, None)
    texts, _ = parts.texts(options)
    asked = allmrec_data.validation(parts.division, model)
    candidates = asked.draw(np.arange(len(texts)), 19, parts.seed)
    stage_1 = inner_products(asked.users, decoded, candidates)
    similar = inner_products(_means(texts, asked.histories), texts, candidates)
    weights = [factor * float(stage_1.std() / similar.std()) for factor in _FACTORS]
    found = [float(ndcg(ranks(stage_1 + weight * similar), 10).mean()) for weight in weights]
    return weights[int(np.argmax(found))]


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


def _means(texts: Matrix, histories: Sequences) -> Matrix:
    """[n, width]: the mean of each history's texts; zeros for an empty one."""
    found = np.zeros((len(histories), texts.shape[1]), np.float32)
    np.add.at(found, histories.rows, texts[histories.items])
    found /= np.maximum(histories.lengths, 1)[:, None]
    return found
