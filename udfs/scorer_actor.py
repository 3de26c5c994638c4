"""A worker that finds the users of items: it holds the user vocabulary once and is given shards of items."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from schemas.errors import ColdRefreshError
from udfs import streaming_topk, user_sampling


@dataclass(frozen=True)
class Sampling:
    """How users are chosen; the names are those of the settings."""

    k: int
    draw: Literal["top_k", "sampled"]
    temperature: float
    user_tile: int
    seed: int


class Scorer:
    """A worker for `udfs.actor_pool.map_ordered`: a shard is (item ids [n], queries [n, d] float32).

    Its result is (users [n, K] int64, probabilities [n, K] float64), the most probable user first; K is less than
    sampling.k only if fewer users are allowed.
    """

    def __init__(
        self, keys: np.ndarray, bias: np.ndarray | None, allowed: np.ndarray, sampling: Sampling, device: str
    ) -> None:
        """keys [U, d] float32, bias [U] float32, allowed [U] bool: shared arrays are used in place, not copied.

        Raises:
            ColdRefreshError: a GPU is asked for and torch finds none.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ColdRefreshError("ray.gpus_per_actor is above 0, but torch finds no usable GPU in the worker")
        self._sampling, self._device = sampling, device
        with warnings.catch_warnings():
            # Arrays of Ray's object store are read-only, which torch warns of; nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._keys = torch.from_numpy(keys).to(device)
            self._bias = None if bias is None else torch.from_numpy(bias).to(device)
            self._allowed = None if allowed.all() else torch.from_numpy(allowed).to(device)

    def work(self, shard: tuple[list[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        item_ids, vectors = shard
        queries = torch.from_numpy(np.array(vectors, np.float32)).to(self._device)
        s = self._sampling
        if s.draw == "top_k":
            chosen = streaming_topk.top_k(
                queries, self._keys, s.k, bias=self._bias, allowed=self._allowed, tile=s.user_tile
            )
        else:
            chosen = user_sampling.draw(
                queries,
                self._keys,
                s.k,
                item_ids=item_ids,
                seed=s.seed,
                temperature=s.temperature,
                bias=self._bias,
                allowed=self._allowed,
                tile=s.user_tile,
            ).by_probability()
        return chosen.users.cpu().numpy(), chosen.probabilities.cpu().numpy()
