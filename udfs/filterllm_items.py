"""What FilterLLM trains on: warm items with their users and CF vectors, and their texts' hidden states.

Which items are held out, and which users stand for an item that has too many, is decided by a hash of (seed, item_id): so it
does not depend on the order or number of the others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from udfs.sequences import Sequences

_PIECE = 1 << 27


@dataclass(frozen=True)
class Items:
    """Warm items to train on, n of them, numbered as the hidden states are.

    item_ids: n ids. embeddings [n, dimension] float32: their CF vectors. indptr [n + 1], users [indptr[-1]] int32 or int64:
    item i's users are users[indptr[i]:indptr[i + 1]], each once, as rows of the vocabulary.
    """

    item_ids: list[str]
    embeddings: np.ndarray
    indptr: np.ndarray
    users: np.ndarray

    def targets(self, index: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """indptr and users of the items `index`, int64."""
        users = Sequences(self.indptr, self.users).take(index)
        return torch.from_numpy(users.indptr).to(device), torch.from_numpy(users.items.astype(np.int64)).to(device)

    def popularity(self, vocabulary: int) -> np.ndarray:
        """How many items each of so many users has: [vocabulary] int64."""
        counts = np.zeros(vocabulary, np.int64)
        # In pieces: of other integers than its own np.bincount makes a copy.
        for start in range(0, len(self.users), _PIECE):
            counts += np.bincount(self.users[start : start + _PIECE], minlength=vocabulary)
        return counts


class FrozenTexts(nn.Module):
    """Hidden states [n, width] that the language model gave once; training does not change them."""

    def __init__(self, hidden: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.from_numpy(np.array(hidden, np.float32)), persistent=False)

    def forward(self, index: np.ndarray) -> torch.Tensor:
        return self.hidden[torch.from_numpy(index).to(self.hidden.device)]


def _hash(seed: int, item_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{item_id}".encode()).digest()[:8], "big")


def held_out(item_ids: list[str], share: float, seed: int) -> np.ndarray:
    """[n] bool: the items whose hash falls into the first `share`; one at least, unless there is only one item."""
    hashes = np.array([_hash(seed, item_id) for item_id in item_ids], dtype=np.uint64)
    chosen = hashes < np.uint64(int(share * 2**64))
    if len(item_ids) > 1 and not chosen.any():
        chosen[hashes.argmin()] = True
    if len(item_ids) > 0 and chosen.all():
        chosen[hashes.argmax()] = False
    return chosen


def at_most(items: Items, max_users: int, seed: int) -> Items:
    """`items` with at most `max_users` users each; which ones depends on (seed, item_id) only."""
    if np.diff(items.indptr).max(initial=0) <= max_users:
        return items
    kept, counts = [], []
    for number, item_id in enumerate(items.item_ids):
        users = items.users[items.indptr[number] : items.indptr[number + 1]]
        if len(users) > max_users:
            generator = np.random.Generator(np.random.Philox(key=_hash(seed, item_id)))
            users = np.sort(generator.choice(np.sort(users), max_users, replace=False))
        kept.append(users)
        counts.append(len(users))
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Items(items.item_ids, items.embeddings, indptr, np.concatenate(kept))
