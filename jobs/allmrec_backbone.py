"""The CF side of A-LLMRec on a night: an embedding space of this project, or a backbone that is trained on its histories."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from jobs import allmrec_artifacts, cf
from jobs.allmrec_artifacts import Training
from jobs.allmrec_night import Mask, Night, renumbered
from jobs.cf import Space
from jobs.run import Run
from udfs import backbone, ncf, sampled_ranking, sequence_training
from udfs.ids import place, take
from udfs.sequences import PADDING, Ints, Sequences, Split
from udfs.vectors import Matrix

KIND = "backbones"


class Side(Protocol):
    """What a CF model makes of a night's users and items (numbered as in the night). All matrices are float32."""

    #: Which model it is.
    version: str
    #: E [I, d]; rows of `known` only are anything.
    items: Matrix
    known: Mask
    #: [U]: users who have an x_u.
    users_known: Mask
    #: Items of a history that must come before what is learnt from it.
    least: int

    def users(self, rows: Ints) -> Matrix:
        """x_u [n, d] tonight."""

    def before(self, rows: Ints, lengths: Ints) -> Matrix:
        """x_u [n, d] as it would be, had these users had the first `lengths` items of their histories only."""

    def learnt(self, rows: Ints, lengths: Ints) -> Matrix:
        """x_u [n, d] that the first stage learns from, with what follows the first `lengths` items as the positive."""


class SpaceSide:
    """A space: what was trained in it stands for users and items, unless `vectors` hold others of the same space.

    `before` folds in. A user's own vector knows the whole history, also what the second stage would have to find.
    """

    least = 0

    def __init__(self, night: Night, space: Space, vectors: dict[str, tuple[list[str], Matrix]] | None = None) -> None:
        """`vectors`: users and items -> their ids and vectors, such as those that a night published."""
        self._night, self._space, self.version = night, space, space.version
        given = vectors or {"users": (space.user_ids, space.users), "items": (space.item_ids, space.items)}
        self._users, self.users_known = take(night.user_ids, *given["users"])
        self.items, self.known = take(night.item_ids, *given["items"])
        self._in_space = place(night.item_ids, space.item_ids)

    def users(self, rows: Ints) -> Matrix:
        return self._users[rows]

    def before(self, rows: Ints, lengths: Ints) -> Matrix:
        histories, at = self._night.histories.prefixes(rows, lengths)
        mapped, kept = renumbered(histories, self._in_space)
        weights = cf.pair_weights(self._night.weights[at][kept], self._space.facts["binary"])
        return self._space.fold_in(self._space.items, (mapped.indptr, mapped.items, weights), "user_scale")

    def learnt(self, rows: Ints, lengths: Ints) -> Matrix:
        return self._users[rows]


class TrainedSide:
    """A backbone: sequence models read histories, ncf knows users by their ids."""

    def __init__(self, night: Night, version: str, model: Any, user_ids: list[str], item_ids: list[str]) -> None:
        """`user_ids`, `item_ids`: of the model's numbers; of those, tonight's are what it knows."""
        self._night, self.version, self._backbone = night, version, backbone.of(model)
        self._items = place(night.item_ids, item_ids)
        self._users = place(night.user_ids, user_ids)
        by_id = isinstance(model, ncf.NeuMf)
        self.known = self._items >= 0
        self.items = self._backbone.items[np.maximum(self._items, 0)]
        self.least = 0 if by_id else 1
        reads = np.asarray(renumbered(night.histories, self._items)[0].lengths > 0)
        self.users_known = np.asarray(self._users >= 0) if by_id else reads

    def users(self, rows: Ints) -> Matrix:
        return self.before(rows, self._night.histories.lengths[rows])

    def before(self, rows: Ints, lengths: Ints) -> Matrix:
        histories, _ = self._night.histories.prefixes(rows, lengths)
        # A user whom ncf does not know is asked for by nobody (`users_known`).
        return self._backbone.users(np.maximum(self._users[rows], 0), renumbered(histories, self._items)[0])

    def learnt(self, rows: Ints, lengths: Ints) -> Matrix:
        return self.before(rows, lengths)


def trained(run: Run, night: Night) -> TrainedSide:
    """The backbone that the settings name: the newest of the last allmrec.retrain_days days, or one that is trained now.

    Raises:
        udfs.cf_inputs.CfError: there is nothing to train on.
    """
    settings = run.settings.allmrec
    conf = allmrec_artifacts.conf_digest(settings.model, run.settings.seed)
    identity = {"kind": settings.backbone, "conf": conf, "data": run.settings.digest("snapshot", "inputs")}
    version = allmrec_artifacts.newest(run, KIND, identity, settings.retrain_days)
    if version is None:
        data = [night.user_ids.to_pylist(), night.item_ids.to_pylist()]
        arrays = [night.histories.indptr, night.histories.items]

        version = allmrec_artifacts.train(run, KIND, identity, data, arrays, partial(_fit, run, night))
    model = backbone.load(allmrec_artifacts.files(run, KIND, version))
    artifact = run.artifact(KIND, version)
    ids = (artifact.read(name)["id"].to_pylist() for name in ("users", "items"))
    return TrainedSide(night, version, model, *ids)


def _fit(run: Run, night: Night, training: Training) -> dict[str, Any]:
    """Train on all but the last items of the histories, which decide when to stop."""
    conf, seed, kind = run.settings.allmrec.model, run.settings.seed, run.settings.allmrec.backbone
    training.log(f"training {kind} on {len(night.histories)} histories, in the order of {night.order}")
    items, n_users = len(night.item_ids), len(night.user_ids)
    shape = {"users": n_users} if kind == "ncf" else {"max_length": conf.max_length}
    model = backbone.build(kind, seed, items=items, dimension=conf.dimension, **shape)
    model.to(training.device)
    split = _split(night.histories)
    validate = None
    if (split.validation != PADDING).any() and items > int(night.histories.lengths.max()) + 1:
        validate = sampled_ranking.validation(backbone.of(model), split, seed)
    trainer: Any = ncf if kind == "ncf" else sequence_training
    how = trainer.Options(epochs=conf.epochs, patience=conf.patience, seed=seed, learning_rate=conf.learning_rate)

    def said(line: str) -> None:
        training.log(f"{kind}: {line}")

    found = trainer.train(model, split.train, how, said, validate=validate, checkpoints=training.checkpoints)
    allmrec_artifacts.write(training.artifact, backbone.dump(model))
    training.artifact.write("users", pa.table({"id": night.user_ids}))
    training.artifact.write("items", pa.table({"id": night.item_ids}))
    found.pop("history")
    return {"users": n_users, "items": items, "order": night.order, **found}


def _split(histories: Sequences) -> Split:
    """The last item of every history of three or more is for validation; nothing is kept for a test."""
    held = histories.lengths >= 3
    last = histories.indptr[1:] - 1
    validation = np.full(len(histories), PADDING, np.int64)
    validation[held] = histories.items[last[held]]
    train, _ = histories.prefixes(np.arange(len(histories)), histories.lengths - held)
    return Split(train, validation, np.full(len(histories), PADDING, np.int64))
