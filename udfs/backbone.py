"""What A-LLMRec (arXiv 2404.11343) needs of a trained, frozen CF model, whatever its kind, and its files.

A sequence model represents a user by the history; a model of ids by the user's number. Both are given to either, so the caller
need not know which it has.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import torch

from udfs import gru4rec, module_files, ncf, nextitnet, sasrec
from udfs.cf_inputs import CfError
from udfs.devices import forked
from udfs.sequences import Ints, Sequences, batches
from udfs.vectors import Matrix

# Numbers that a batch of what is computed may hold.
_POSITIONS = 65_536
_GATHERED = 8_000_000

SequenceModel = sasrec.SasRec | gru4rec.Gru4Rec | nextitnet.NextItNet


class Backbone(Protocol):
    """A CF model with items 0 .. I - 1 in a space of d dimensions. All matrices are float32 and finite."""

    @property
    def items(self) -> Matrix:
        """E [I, d]."""

    def users(self, users: Ints, histories: Sequences) -> Matrix:
        """x [n, d]: x_u . E_i ranks items for a user.

        Args:
            users: [n], of those that a model of ids was trained on.
            histories: of n users, in the order of `users`.
        """

    def score(self, users: Ints, histories: Sequences, candidates: Ints) -> Matrix:
        """[n, C] of candidates [n, C]; comparable within a row only."""


class MatrixBackbone:
    """A model of ids whose score is an inner product (udfs/cf_model.py): users [U, d] and items [I, d]. Histories are not read.

    A user whom CF was not trained on has a row of zeros there, and all items score 0.
    """

    def __init__(self, users: Matrix, items: Matrix) -> None:
        self._users, self._items = (np.asarray(part, np.float32) for part in (users, items))

    @property
    def items(self) -> Matrix:
        return self._items

    def users(self, users: Ints, histories: Sequences) -> Matrix:
        return self._users[users]

    def score(self, users: Ints, histories: Sequences, candidates: Ints) -> Matrix:
        return inner_products(self._users[users], self._items, candidates)


class SequenceBackbone:
    """SASRec, GRU4Rec or NextItNet: a user is what the model says behind the history's last item. Numbers are not read.

    The empty history is the zero vector, and all items score 0.
    """

    def __init__(self, model: SequenceModel) -> None:
        self.model = model

    @property
    def items(self) -> Matrix:
        return self.model.items.detach().cpu().numpy()

    @torch.no_grad()
    def users(self, users: Ints, histories: Sequences) -> Matrix:
        model = self.model
        training = model.training
        model.eval()
        found = np.zeros((len(histories), model.config.dimension), np.float32)
        lengths = np.minimum(histories.lengths, model.config.max_length)
        for rows in batches(lengths, _POSITIONS):
            padded = histories.padded(rows, max(1, int(lengths[rows].max())))
            found[rows] = model(torch.from_numpy(padded).to(model.items.device))[:, -1].cpu().numpy()
        model.train(training)
        return found

    def score(self, users: Ints, histories: Sequences, candidates: Ints) -> Matrix:
        return inner_products(self.users(users, histories), self.items, candidates)


class NcfBackbone:
    """NeuMF (udfs/ncf.py): `score` is the whole model's, users and items are its factorisation part's. Histories are not read.

    A user without an event in training is the zero vector; `score` then ranks by what the MLP says of the items alone.
    """

    def __init__(self, model: ncf.NeuMf) -> None:
        self.model = model

    @property
    def items(self) -> Matrix:
        return self.model.gmf_items.detach().cpu().numpy()

    def users(self, users: Ints, histories: Sequences) -> Matrix:
        return (self.model.gmf_users * self.model.gmf_weights).detach().cpu().numpy()[users]

    @torch.no_grad()
    def score(self, users: Ints, histories: Sequences, candidates: Ints) -> Matrix:
        found = np.empty(candidates.shape, np.float32)
        step = max(1, _POSITIONS // max(1, candidates.shape[1]))
        device = self.model.gmf_items.device
        for start in range(0, len(users), step):
            items = torch.from_numpy(candidates[start : start + step]).to(device)
            user = torch.from_numpy(users[start : start + step]).to(device)[:, None].expand_as(items)
            found[start : start + step] = self.model(user, items).cpu().numpy()
        return found


def inner_products(users: Matrix, items: Matrix, candidates: Ints) -> Matrix:
    """[n, C]: users [n, d] times their own candidates [n, C] of items [I, d]."""
    step = max(1, _GATHERED // max(1, candidates.shape[1] * items.shape[1]))
    parts = [
        np.einsum("nd,ncd->nc", users[start : start + step], items[candidates[start : start + step]])
        for start in range(0, len(users), step)
    ]
    return np.concatenate(parts) if parts else np.zeros(candidates.shape, np.float32)


_KINDS: dict[str, tuple[Any, Any]] = {
    "sasrec": (sasrec.SasRec, sasrec.Config),
    "gru4rec": (gru4rec.Gru4Rec, gru4rec.Config),
    "nextitnet": (nextitnet.NextItNet, nextitnet.Config),
    "ncf": (ncf.NeuMf, ncf.Config),
}
#: The models that read histories.
SEQUENCE_MODELS = ("sasrec", "gru4rec", "nextitnet")


def build(kind: str, seed: int, **config: Any) -> Any:
    """An untrained model: sasrec, gru4rec, nextitnet or ncf; `config` are the fields of its Config. `seed` decides its start."""
    model, fields = _KINDS[kind]
    with forked():
        torch.manual_seed(seed)
        return model(fields(**config))


def of(model: SequenceModel | ncf.NeuMf) -> Backbone:
    """The trained model as a backbone."""
    return NcfBackbone(model) if isinstance(model, ncf.NeuMf) else SequenceBackbone(model)


def with_items(model: SequenceModel, items: Matrix) -> SequenceModel:
    """The trained model for other items [J, d], whose vectors lie in the space of its own, in evaluation mode."""
    other = type(model)(replace(model.config, items=len(items)))  # type: ignore[arg-type]
    other.load_state_dict({**model.state_dict(), "items": torch.from_numpy(np.array(items, np.float32))})
    return other.to(model.items.device).eval()


def dump(model: SequenceModel | ncf.NeuMf) -> dict[str, bytes]:
    """The model as files: model.safetensors and config.json."""
    kind = next(kind for kind, (known, _) in _KINDS.items() if isinstance(model, known))
    return module_files.dump(model, {"kind": kind, **asdict(model.config)})


def load(files: dict[str, bytes]) -> Any:
    """The model of `dump`'s files, in evaluation mode.

    Raises:
        CfError: a file is absent or unreadable, or they do not fit each other, or a number is not finite.
    """
    return module_files.load(files, lambda fields: build(fields.pop("kind"), 0, **fields), "CF model", CfError)
