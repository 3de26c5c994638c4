"""ColdLLM's filter (arXiv 2402.09176, section 4.2): two towers over text embeddings keep a few candidate users a cold item.

Each tower is Linear -> ReLU -> Linear; a pair's score is sigmoid(item . user), trained by binary cross-entropy with one random
negative a positive. An item's input is the mean-pooled hidden state of a language model over its text. A user's input is the
mean of the inputs of its training items; while a pair is trained on, its own item is taken out of that mean, as it is not in
it when the item is cold. The negative of (user, item) is another user, drawn uniformly, because users are what is ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from udfs.devices import forked
from udfs.streaming_topk import Selection, top_k
from udfs.vectors import Matrix

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """hidden and dimension are the paper's; the others are this project's, and not tuned."""

    hidden: int = 2048
    dimension: int = 200
    epochs: int = 5
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    batch_size: int = 1024
    seed: int = 7


class TwoTower(nn.Module):
    """Item and user tower over inputs [n, width] float32, which are standardised by mean and std [width] of the warm items."""

    def __init__(self, width: int, options: Options) -> None:
        super().__init__()
        self.item, self.user = (
            nn.Sequential(nn.Linear(width, options.hidden), nn.ReLU(), nn.Linear(options.hidden, options.dimension))
            for _ in range(2)
        )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.inference_mode()
    def vectors(self, inputs: Matrix, tower: nn.Module) -> torch.Tensor:
        """[n, dimension] float32 of inputs [n, width], by `self.item` or `self.user`."""
        device = self.mean.device
        parts = [torch.from_numpy(np.array(inputs[s : s + 4096], np.float32)) for s in range(0, len(inputs), 4096)]
        return torch.cat([tower((part.to(device) - self.mean) / self.std) for part in parts])


def user_inputs(states: Matrix, indptr: Ints, indices: Ints) -> Matrix:
    """[U, width] float32: the mean of each user's items; zeros for a user without any.

    Args:
        states: [I, width] of the warm items.
        indptr, indices: user u's items are indices[indptr[u]:indptr[u + 1]].
    """
    from scipy import sparse

    shape = (len(indptr) - 1, len(states))
    history = sparse.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=shape)
    return np.asarray(history @ states / np.maximum(np.diff(indptr), 1)[:, None], np.float32)


def train(
    states: Matrix, indptr: Ints, indices: Ints, options: Options, log: Callable[[str], None], device: str = "cpu"
) -> TwoTower:
    """Fit both towers to the training pairs; the arguments are those of `user_inputs`. The same seed gives the same towers.

    Raises:
        ValueError: there is no pair.
    """
    if not len(indices):
        raise ValueError("the two-tower filter needs training pairs, there are none")
    rng = np.random.Generator(np.random.Philox(options.seed))
    counts = np.diff(indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    profiles = torch.from_numpy(user_inputs(states, indptr, indices)).to(device)
    items = torch.from_numpy(np.array(states, np.float32)).to(device)
    sizes = torch.from_numpy(counts.astype(np.float32)).to(device)[:, None]
    with forked():
        torch.manual_seed(options.seed)
        model = TwoTower(states.shape[1], options).to(device)
    model.mean.copy_(items.mean(0))
    std = items.std(0, correction=0)
    model.std.copy_(torch.where(std > 1e-6, std, 1.0))
    items, profiles = (items - model.mean) / model.std, (profiles - model.mean) / model.std
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    for epoch in range(1, options.epochs + 1):
        order, total = rng.permutation(len(rows)), torch.zeros((), dtype=torch.float64, device=device)
        others = rng.integers(0, len(counts), len(rows))
        for start in range(0, len(order), options.batch_size):
            pairs = order[start : start + options.batch_size]
            user, item, other = (torch.from_numpy(of[pairs]).to(device) for of in (rows, indices, others))
            own = items[item]
            # The mean of the user's other items; of a user with only this one, the mean of all items, which is 0.
            rest = (profiles[user] * sizes[user] - own) / (sizes[user] - 1).clamp(min=1)
            users = model.user(torch.cat([rest, profiles[other]]))
            logits = (model.item(own).repeat(2, 1) * users).sum(1)
            labels = (torch.arange(2 * len(pairs), device=device) < len(pairs)).float()
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach().double() * len(pairs)
        log(f"two towers: epoch {epoch}/{options.epochs}, loss {float(total) / len(rows):.4f}")
    return model.eval()


def candidates(
    model: TwoTower, cold: Matrix, profiles: Matrix, k: int, allowed: NDArray[np.bool_] | None = None
) -> Selection:
    """The k users with the highest score of each cold item [n, width], users passing in tiles.

    Args:
        profiles: [U, width], as `user_inputs` gives them.
        allowed: [U]; others are not chosen (such as users without any item).
    """
    mask = None if allowed is None else torch.from_numpy(allowed).to(model.mean.device)
    return top_k(model.vectors(cold, model.item), model.vectors(profiles, model.user), k, allowed=mask)
