"""A-LLMRec's first stage on a night (arXiv 2404.11343, section 4.1): CF and text joined, as an artifact.

An alignment (`_artifacts/alignments/<version>`) belongs to one CF model (a space or a backbone), one text encoder and the
settings. It is trained on the warm items' pairs when there is none. Of a space it gives cold items their vectors
(refresh.cold=allmrec): f_I^dec(f_T^enc(q_i)), the decoded text side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import allmrec_artifacts, allmrec_night, cf, text_embeddings
from jobs.allmrec_backbone import Side, SpaceSide
from jobs.allmrec_night import Mask, Night, prefixes, renumbered
from jobs.cf import Space
from jobs.run import Run, log
from jobs.sampled_users import ENOUGH
from jobs.staging import Staging
from udfs import allmrec_alignment, allmrec_alignment_training
from udfs.allmrec_alignment import Alignment, Config, Weights
from udfs.allmrec_examples import AllmrecError, Examples
from udfs.filterllm_checkpoint import Checkpoints
from udfs.filterllm_items import FrozenTexts, held_out
from udfs.fold_in import norm_scale
from udfs.sequences import Ints, Sequences
from udfs.vectors import Matrix

KIND = "alignments"
_DEFINITION = "2"  # raise it when other vectors come from the same settings
# Of the items that are held out: others that an item is ranked among, and the pairs that are asked for, at most.
_NEGATIVES, _VALIDATION = 99, 10_000


def for_space(run: Run, space: Space) -> str:
    """The version of the alignment of tonight's texts with `space`: one that is there, or trained now.

    Raises:
        AllmrecError: no warm item of the space has a text.
    """
    encoder_version = str(run.staging("text_embeddings").facts()["model_version"])
    version = allmrec_artifacts.newest(run, KIND, _identity(run, space.version, encoder_version))
    if version is None:  # only then are all pairs in memory
        night = allmrec_night.read(run.staging("snapshot"))
        version = find(run, night, encoder_version, SpaceSide(night, space))
    return version


def vectors(run: Run, version: str, shas: list[str]) -> Matrix:
    """The CF vectors [len(shas), d] of texts by alignment `version`, as long as CF makes those of items (its fact `length`)."""
    model, facts = load(run, version), run.artifact(KIND, version).facts()
    q = text_embeddings.load(run, shas, facts["encoder_version"])
    return np.float32(facts["length"]) * _decoded(model, q)


def _decoded(model: Alignment, texts: Matrix) -> Matrix:
    """f_I^dec(f_T^enc(q_i)) [n, d]."""
    absent = np.zeros((len(texts), model.config.dimension), np.float32)
    return model.decoded(model.joint(absent, texts, np.ones(len(texts), np.bool_)))


def load(run: Run, version: str) -> Alignment:
    """The networks of an alignment, on the CPU."""
    return allmrec_alignment.load(allmrec_artifacts.files(run, KIND, version))


def find(run: Run, night: Night, encoder_version: str, side: Side) -> str:
    """The newest alignment of this CF model and encoder, or one that is trained now; its version.

    Raises:
        AllmrecError: there is nothing to learn from.
    """
    identity = _identity(run, side.version, encoder_version)
    version = allmrec_artifacts.newest(run, KIND, identity)
    if version is not None:
        return version
    world = _world(run, night, encoder_version, side)

    def fit(artifact: Staging, checkpoints: Checkpoints) -> dict[str, Any]:
        return _fit(run, world, artifact, checkpoints)

    arrays: list[np.ndarray] = [
        world.items,
        world.texts,
        world.pool,
        *world.examples.arrays(),
        *world.validation.arrays(),
    ]
    return allmrec_artifacts.train(run, KIND, identity, None, arrays, fit)


def _identity(run: Run, cf_version: str, encoder_version: str) -> dict[str, str]:
    conf = allmrec_artifacts.conf_digest(run.settings.allmrec.alignment, run.settings.seed)
    identity = {"cf_version": cf_version, "encoder_version": encoder_version, "conf": conf, "definition": _DEFINITION}
    return {**identity, "prompt": run.settings.text.prompt}


@dataclass(frozen=True)
class _World:
    """What an alignment learns from: n warm items with E [n, d] and Q [n, D]; `pool` are those that are not held out."""

    items: Matrix
    texts: Matrix
    pool: Ints
    examples: Examples
    validation: Examples


def _world(run: Run, night: Night, encoder_version: str, side: Side) -> _World:
    conf, seed = run.settings.allmrec.alignment, run.settings.seed
    usable = np.flatnonzero(~night.cold & night.with_text & side.known)
    if not len(usable):
        raise AllmrecError(
            f"A-LLMRec has nothing to align: of {len(night.cold)} items {int((~night.cold).sum())} are warm, "
            f"{int((~night.cold & night.with_text).sum())} of them have a text, and none of these has a vector in "
            f"{side.version}. Add titles or texts to the table of items, or lower snapshot.warm_interactions"
        )
    number = np.full(len(night.cold), -1, np.int64)
    number[usable] = np.arange(len(usable))
    held = held_out(night.item_ids.take(pa.array(usable)).to_pylist(), conf.validation_share, seed)
    pool = np.flatnonzero(~held)
    rows, lengths, positives = _pairs(night, side, number, conf.examples, seed)
    seen, _ = renumbered(night.histories, number)
    # Of whoever has (nearly) everything no other item can be drawn.
    room = len(pool) - _within(seen, ~held)

    def examples(mask: Mask) -> Examples:
        chosen = rows[mask]
        before, _ = prefixes(night.histories, chosen, lengths[mask])
        x = side.learnt(chosen, lengths[mask])
        return Examples(x, renumbered(before, number)[0], positives[mask], seen.take(chosen))

    asked = np.flatnonzero(held[positives] & (room[rows] > 1))[:_VALIDATION]
    validated = np.zeros(len(rows), np.bool_)
    validated[asked] = True
    texts = text_embeddings.load(run, night.texts.take(pa.array(usable)).to_pylist(), encoder_version)
    learnt = ~held[positives] & (room[rows] > 1)
    return _World(side.items[usable], texts, pool, examples(learnt), examples(validated))


def _pairs(night: Night, side: Side, number: Ints, most: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """At most `most` events of usable items by users whom CF knows: users, items before each, and the item's number."""
    histories = night.histories
    user, item = histories.rows, number[histories.items]
    nth = np.arange(len(item)) - histories.indptr[user]
    there = np.flatnonzero((item >= 0) & side.users_known[user] & (nth >= side.least))
    if len(there) > most:
        drawn = np.random.Generator(np.random.Philox(seed)).permutation(len(there))[:most]
        there = there[np.sort(drawn)]
    return user[there], nth[there], item[there]


def _within(histories: Sequences, mask: Mask) -> Ints:
    """[n]: how many items of each history are in `mask`."""
    return np.bincount(histories.rows, mask[histories.items], minlength=len(histories)).astype(np.int64)


def _fit(run: Run, world: _World, artifact: Staging, checkpoints: Checkpoints) -> dict[str, Any]:
    conf, seed = run.settings.allmrec.alignment, run.settings.seed
    log(f"[allmrec] training an alignment on {len(world.examples)} pairs of {len(world.pool)} items")
    config = Config(world.items.shape[1], world.texts.shape[1], conf.joint, conf.deep, tuple(conf.hidden), conf.dropout)
    model = allmrec_alignment.build(config, seed)
    model.standardise(world.items[world.pool], world.texts[world.pool])
    device = cf.params(run.settings).torch_device()
    seen = world.validation.seen or world.validation.histories
    in_pool = np.isin(np.arange(len(world.items)), world.pool)
    longest = int(_within(seen, in_pool).max(initial=0))
    negatives = min(_NEGATIVES, len(world.pool) - longest)
    values = conf.model_dump()
    options = allmrec_alignment_training.Options(
        **{name: values[name] for name in _OPTIONS},
        weights=Weights(**{name: values[name] for name in Weights.__dataclass_fields__}),
        seed=seed,
        negatives=negatives,
    )
    found = allmrec_alignment_training.train(
        model.to(device),
        FrozenTexts(world.texts).to(device),
        world.items,
        world.examples,
        world.pool,
        options,
        lambda line: log(f"[allmrec] {line}"),
        validation=world.validation if len(world.validation) else None,
        checkpoints=checkpoints,
    )
    allmrec_artifacts.write(artifact, allmrec_alignment.dump(model))
    found.pop("history")
    held = np.flatnonzero(~in_pool)
    length = norm_scale(world.items[held], _decoded(model, world.texts[held])) if len(held) >= ENOUGH else 1.0
    return {
        "items": len(world.items),
        # Ranking losses care little how long a vector is, but rankers compare it with those of warm items.
        "length": length,
        "examples": len(world.examples),
        "validation_ndcg": found.pop("validation"),
        **found,
    }


_OPTIONS = ("epochs", "patience", "batch_size", "optimizer", "learning_rate", "weight_decay", "stop_by")
