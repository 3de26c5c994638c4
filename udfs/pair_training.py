"""One training loop for the CF models that learn embeddings from (user, item) pairs: bpr, lightgcn, sgl and sgcl.

A model is an objective: what a batch of pairs costs, and what is scored in the end. The loop is the rest: the start, batches
in an order drawn each epoch, Adam, and a look at the embeddings after each epoch for whoever wants to stop early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from udfs.cf_inputs import CfParams, Pairs
from udfs.vectors import Matrix

# Rows to begin with: users [n_users, d] and items [n_items, d].
Start = tuple[Matrix, Matrix]
# Called after each epoch with its number (from 1) and what gives the embeddings as they are then; True ends the training.
OnEpoch = Callable[[int, Callable[[], tuple[Matrix, Matrix]]], bool]


@dataclass(frozen=True)
class Data:
    """The pairs on the device, each once: users, items [pairs] int64 and weights [pairs] with a mean of 1, of the
    type that is computed in.

    `generator` is of the device; all that is drawn in a training comes from it.
    """

    users: torch.Tensor
    items: torch.Tensor
    weights: torch.Tensor
    n_users: int
    n_items: int
    generator: torch.Generator


class Objective(Protocol):
    """What is learnt. `ego` [users + items, d] are the parameters, users first."""

    def begin_epoch(self) -> None:
        """Draw what stays the same for an epoch."""
        ...

    def loss(self, ego: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Of the pairs `batch` [n] (their numbers), a mean over them."""
        ...

    def embeddings(self, ego: torch.Tensor) -> torch.Tensor:
        """What is scored, as wide as `ego`."""
        ...


def train(
    pairs: Pairs,
    n_users: int,
    n_items: int,
    params: CfParams,
    seed: int,
    objective_of: Callable[[Data, CfParams], Objective],
    start: Start | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[Matrix, Matrix]:
    """Learn embeddings with Adam, all of them in each step.

    The same seed gives the same result on a CPU; on a GPU sparse products and sums of gradients add in no fixed order.

    Args:
        pairs: users 0 .. n_users - 1 and items 0 .. n_items - 1, each with at least one pair.
        start: where to begin; otherwise at normal draws with standard deviation params.init_std.

    Returns:
        users [n_users, d] and items [n_items, d] as they are scored, float32.
    """
    device = torch.device(params.torch_device())
    generator = torch.Generator(device=device).manual_seed(seed)
    if start is None:
        drawn = torch.Generator().manual_seed(seed)
        begin = params.init_std * torch.randn(n_users + n_items, params.dimension, generator=drawn)
    else:
        begin = torch.from_numpy(np.concatenate(start).astype(np.float32))
    ego = torch.nn.Parameter(begin.to(device))
    weights = torch.from_numpy((pairs.weights / pairs.weights.mean()).astype(np.float32)).to(device)
    users, items = (torch.from_numpy(side.astype(np.int64)).to(device) for side in (pairs.users, pairs.items))
    objective = objective_of(Data(users, items, weights, n_users, n_items, generator), params)
    optimizer = torch.optim.Adam([ego], lr=params.learning_rate, fused=True)

    def embeddings() -> tuple[Matrix, Matrix]:
        with torch.no_grad():
            final = objective.embeddings(ego).float().cpu().numpy()
        return final[:n_users].copy(), final[n_users:].copy()

    for epoch in range(1, params.epochs + 1):
        objective.begin_epoch()
        order = torch.randperm(len(users), generator=generator, device=device)
        for batch in order.split(params.batch_size):
            optimizer.zero_grad(set_to_none=True)
            objective.loss(ego, batch).backward()
            optimizer.step()
        if on_epoch is not None and on_epoch(epoch, embeddings):
            break
    return embeddings()
