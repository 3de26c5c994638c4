"""Drawing K users without replacement from p(u | item), exactly, while users pass by in tiles.

Gumbel-top-K (Kool et al. 2019, "Stochastic Beams and Where to Find Them", section 3): the K highest of
logit / T + Gumbel noise are a sample without replacement from p^(1/T). The noise of (item, user) is a function of
(seed, item id, the user's number in the vocabulary) alone: a counter-based generator, so the draw does not depend on tiles,
shards, batches, order or retries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from udfs.streaming_topk import Noise, Selection, top_k

# splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def item_keys(seed: int, item_ids: Sequence[str]) -> torch.Tensor:
    """[n] int64: where each item's sequence of random numbers starts."""
    digests = [hashlib.sha256(f"users:{seed}:{item_id}".encode()).digest()[:8] for item_id in item_ids]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def uniform(keys: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float64 of 52 random bits: the `users`-th (0, 1, ...) of each key's splitmix64 sequence.

    `keys` and `users` are int64 and broadcast against each other.
    """
    state = keys + (users + 1) * _GOLDEN  # int64 wraps around, as the generator wants
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 12).double() + 0.5) * 2.0**-52


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros; torch's own fills with the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


def gumbel(keys: torch.Tensor) -> Noise:
    """Standard Gumbel noise of the items with these `keys` [n] (see `item_keys`), for `udfs.streaming_topk.top_k`."""

    def noise(items: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        of_item = keys[items] if items.dim() == 2 else keys[items][:, None]
        return -torch.log(-torch.log(uniform(of_item, users)))

    return noise


def draw(
    queries: torch.Tensor,
    keys: torch.Tensor,
    k: int,
    *,
    item_ids: Sequence[str],
    seed: int,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    tile: int = 16384,
    first_user: int = 0,
) -> Selection:
    """K users of each item, drawn without replacement from p^(1 / temperature), the first drawn first.

    Arguments as for `udfs.streaming_topk.top_k`; `item_ids` [n] are those of the queries. Draws from several shards of a
    vocabulary are joined by `udfs.streaming_topk.merge`.
    """
    noise = gumbel(item_keys(seed, item_ids).to(queries.device))
    return top_k(
        queries,
        keys,
        k,
        bias=bias,
        allowed=allowed,
        tile=tile,
        first_user=first_user,
        temperature=temperature,
        noise=noise,
    )
