"""A-LLMRec's first stage on a night (arXiv 2404.11343, section 4.1): CF and text joined, as an artifact.

An alignment (`_artifacts/alignments/<version>`) belongs to one CF model (a space or a backbone), one text encoder and the
settings. It is trained on the warm items' pairs when there is none; with allmrec.alignment.lora the encoder is trained along, and
its adapters (udfs/lora.py) lie in the artifact. Of a space it gives cold items their vectors (refresh.cold=allmrec):
f_I^dec(f_T^enc(q_i)), the decoded text side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs import adapted_texts, allmrec_artifacts, allmrec_night, text_embeddings
from jobs.allmrec_artifacts import Training
from jobs.allmrec_backbone import Side, SpaceSide
from jobs.allmrec_night import Mask, Night, renumbered
from jobs.cf import Space
from jobs.run import Run
from jobs.sampled_users import ENOUGH
from jobs.staging import Staging
from udfs import allmrec_alignment, allmrec_alignment_training, lora
from udfs.allmrec_alignment import Alignment, Config, Weights
from udfs.allmrec_examples import AllmrecError, Examples
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
    language_model = str(run.staging("text_embeddings").facts()["model_version"])
    version = allmrec_artifacts.newest(run, KIND, _identity(run, space.version, language_model))
    if version is None:  # only then are all pairs in memory
        night = allmrec_night.read(run.staging("snapshot"))
        version = find(run, night, language_model, SpaceSide(night, space))
    return version


def vectors(run: Run, version: str, shas: list[str]) -> Matrix:
    """The CF vectors [len(shas), d] of texts of tonight's snapshot by alignment `version`, as long as CF makes those of items (its
    fact `length`)."""
    length = run.artifact(KIND, version).facts()["length"]
    return np.float32(length) * _decoded(load(run, version), texts(run, version, run.staging("snapshot"), shas))


def texts(run: Run, version: str, snapshot: Staging, shas: list[str]) -> Matrix:
    """Q [len(shas), D] of texts of `snapshot` as alignment `version` has them; with adapters of its own those that no night has
    asked for yet are encoded now, on Ray."""
    artifact = run.artifact(KIND, version)
    facts = artifact.facts()
    if facts["lora"]:
        adapted_texts.encode(run, artifact, snapshot, pa.array(shas, pa.string()))
    return text_embeddings.load(run, shas, facts["encoder_version"])


def _decoded(model: Alignment, texts: Matrix) -> Matrix:
    """f_I^dec(f_T^enc(q_i)) [n, d]."""
    absent = np.zeros((len(texts), model.config.dimension), np.float32)
    return model.decoded(model.joint(absent, texts, np.ones(len(texts), np.bool_)))


def load(run: Run, version: str) -> Alignment:
    """The networks of an alignment, on the CPU."""
    return allmrec_alignment.load(allmrec_artifacts.files(run, KIND, version))


def find(run: Run, night: Night, language_model: str, side: Side) -> str:
    """The newest alignment of this CF model and language model, or one that is trained now; its version.

    Args:
        language_model: version of the embeddings of the night's texts.

    Raises:
        AllmrecError: there is nothing to learn from.
        udfs.lora.LoraError: the language model cannot be trained along.
    """
    identity = _identity(run, side.version, language_model)
    version = allmrec_artifacts.newest(run, KIND, identity)
    if version is not None:
        return version
    world = _world(run, night, language_model, side)
    arrays: list[np.ndarray] = [
        world.items,
        world.texts,
        world.pool,
        *world.examples.arrays(),
        *world.validation.arrays(),
    ]
    fit = partial(_fit, run, language_model, world)
    return allmrec_artifacts.train(run, KIND, identity, None, arrays, fit)


def _identity(run: Run, cf_version: str, language_model: str) -> dict[str, str]:
    conf = allmrec_artifacts.conf_digest(run.settings.allmrec.alignment, run.settings.seed)
    identity = {"cf_version": cf_version, "language_model": language_model, "conf": conf, "definition": _DEFINITION}
    # Where the texts are trained along, dropout falls by batches.
    batches = {"batch_tokens": str(run.settings.text.batch_tokens)} if run.settings.allmrec.alignment.lora else {}
    return {**identity, **batches, "prompt": run.settings.text.prompt}


@dataclass(frozen=True)
class _World:
    """What an alignment learns from: n warm items with E [n, d] and Q [n, D] of the frozen encoder; `pool` are those that are not
    held out. content: n texts, if the encoder is trained along."""

    items: Matrix
    texts: Matrix
    content: list[str]
    pool: Ints
    examples: Examples
    validation: Examples


def _world(run: Run, night: Night, language_model: str, side: Side) -> _World:
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
        before, _ = night.histories.prefixes(chosen, lengths[mask])
        x = side.learnt(chosen, lengths[mask])
        return Examples(x, renumbered(before, number)[0], positives[mask], seen.take(chosen))

    asked = np.flatnonzero(held[positives] & (room[rows] > 1))[:_VALIDATION]
    validated = np.zeros(len(rows), np.bool_)
    validated[asked] = True
    shas = night.texts.take(pa.array(usable))
    frozen, content = text_embeddings.load(run, shas.to_pylist(), language_model), []
    if conf.lora:
        content = text_embeddings.texts(night.snapshot, shas, run.settings.text.max_tokens).to_pylist()
    learnt = ~held[positives] & (room[rows] > 1)
    return _World(side.items[usable], frozen, content, pool, examples(learnt), examples(validated))


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


def _fit(run: Run, language_model: str, world: _World, training: Training) -> dict[str, Any]:
    conf, seed = run.settings.allmrec.alignment, run.settings.seed
    training.log(f"training an alignment on {len(world.examples)} pairs of {len(world.pool)} items")
    config = Config(world.items.shape[1], world.texts.shape[1], conf.joint, conf.deep, tuple(conf.hidden), conf.dropout)
    model = allmrec_alignment.build(config, seed)
    model.standardise(world.items[world.pool], world.texts[world.pool])
    encoder = None
    source: torch.nn.Module
    if conf.lora:
        content = world.content
        encoder, source = adapted_texts.trainable(
            run.settings.text, conf, language_model, content, seed, training.device
        )
    else:
        source = FrozenTexts(world.texts).to(training.device)
    seen = world.validation.seen or world.validation.histories
    in_pool = np.isin(np.arange(len(world.items)), world.pool)
    longest = int(_within(seen, in_pool).max(initial=0))
    negatives = min(_NEGATIVES, len(world.pool) - longest)
    values = conf.model_dump()
    options = allmrec_alignment_training.Options(
        **{name: values[name] for name in _OPTIONS},
        weights=Weights(**{name: values[name] for name in Weights.__dataclass_fields__}),
        text_learning_rate=conf.lora_learning_rate,
        seed=seed,
        negatives=negatives,
    )
    found = allmrec_alignment_training.train(
        model.to(training.device),
        source,
        world.items,
        world.examples,
        world.pool,
        options,
        training.log,
        validation=world.validation if len(world.validation) else None,
        checkpoints=training.checkpoints,
    )
    files = {**allmrec_alignment.dump(model), **(lora.dump(encoder) if encoder else {})}
    allmrec_artifacts.write(training.artifact, files)
    found.pop("history")
    held, length = np.flatnonzero(~in_pool), 1.0
    if len(held) >= ENOUGH:
        length = norm_scale(world.items[held], _decoded(model, allmrec_alignment_training.vectors(source, held)))
    return {
        "encoder_version": adapted_texts.version(training.version) if encoder else language_model,
        "lora": conf.lora,
        "items": len(world.items),
        # Ranking losses care little how long a vector is, but rankers compare it with those of warm items.
        "length": length,
        "examples": len(world.examples),
        "validation_ndcg": found.pop("validation"),
        **found,
    }


_OPTIONS = ("epochs", "patience", "batch_size", "optimizer", "learning_rate", "weight_decay", "stop_by")
