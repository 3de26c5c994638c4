"""What CF models are given: the pairs, how to train, and the error that says why they cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from schemas.errors import ColdRefreshError


class CfError(ColdRefreshError):
    """Collaborative filtering cannot be trained: the message says on what, and the remedy."""


@dataclass(frozen=True)
class CfParams:
    """How to train; jobs/settings.py describes each (section cf)."""

    dimension: int = 64
    epochs: int = 15
    regularization: float = 0.05
    alpha: float = 40.0
    blocks: int = 2
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    batch_size: int = 8192
    layers: int = 2
    negatives: Literal["item", "user"] = "item"  # bpr, lightgcn, sgl: see udfs/bpr.py
    init_std: float = 0.1
    temperature: float = 0.2
    contrast_weight: float = 0.05
    edge_dropout: float = 0.1
    device: str = "auto"
    checkpoint_dir: str | None = None  # als: a folder that Spark's workers share

    def torch_device(self) -> str:
        """cuda or cpu.

        Raises:
            CfError: cuda is asked for and there is none.
        """
        import torch

        if self.device == "cpu":
            return "cpu"
        if torch.cuda.is_available():
            return "cuda"
        if self.device == "cuda":
            raise CfError("cf.device is cuda and torch sees no GPU: set cf.device=auto or cpu, or check the driver")
        return "cpu"


@dataclass(frozen=True)
class Pairs:
    """(user, item) pairs as arrays of one length, each pair once: indices and weights above 0."""

    users: npt.NDArray[np.integer]
    items: npt.NDArray[np.integer]
    weights: npt.NDArray[np.floating]

    def sorted(self) -> Pairs:
        """By user, then item: training must not depend on the order in which rows were read."""
        order = np.lexsort((self.items, self.users))
        return Pairs(self.users[order], self.items[order], self.weights[order])
