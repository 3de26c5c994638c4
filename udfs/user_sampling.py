"""Drawing K users without replacement from p(u | item), exactly, while users pass by in tiles.

Gumbel-top-K (Kool et al. 2019, "Stochastic Beams and Where to Find Them", section 3): the K highest of
logit / T + Gumbel noise are a sample without replacement from p^(1/T). The noise of (item, user) is a function of
(seed, item id, the user's number in the vocabulary) alone: a counter-based generator, so the draw does not depend on tiles,
shards, batches, order or retries.

Gumbel noise is -log E of a standard exponential E. Users are numbered in groups of 32, and the exponentials of a group are
made smallest first: the smallest of 32 is itself exponential, with mean 1/32; whose it is, is uniform; and what the others
lie above it is exponential again, with mean 1 (the exponential distribution has no memory). So all are independent, as
they must be, and the highest noise of a group costs one random number: groups that cannot reach the K-th best score, which
are nearly all, are passed over without a number for each of their users.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from udfs.streaming_topk import Selection, top_k

# splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64

# Changes when the users that a seed draws do.
DEFINITION = 2

# Users of a group: part of what defines the draw. A power of 2, at most 2^12.
_GROUP = 32
# The groups' numbers lie in the same sequence as the users', behind all users.
_FIRST_GROUP = 2**40


def item_keys(seed: int, item_ids: Sequence[str]) -> torch.Tensor:
    """[n] int64: where each item's sequence of random numbers starts."""
    digests = [hashlib.sha256(f"users:{seed}:{item_id}".encode()).digest()[:8] for item_id in item_ids]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def uniform(keys: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), float64 of 52 random bits: the `users`-th (0, 1, ...) of each key's splitmix64 sequence.

    `keys` and `users` are int64 and broadcast against each other.
    """
    return _unit(_bits(keys, users))


def _bits(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """64 random bits: the `counters`-th number of each key's splitmix64 sequence, as int64."""
    state = keys + (counters + 1) * _GOLDEN  # int64 wraps around, as the generator wants
    state = state.bitwise_xor_(_shifted(state, 30)).mul_(_FIRST)
    state = state.bitwise_xor_(_shifted(state, 27)).mul_(_SECOND)
    return state.bitwise_xor_(_shifted(state, 31))


def _unit(bits: torch.Tensor) -> torch.Tensor:
    """The upper 52 of 64 bits as a number in (0, 1), float64."""
    return _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros; torch's own fills with the sign."""
    return (value >> bits).bitwise_and_(2 ** (64 - bits) - 1)


class Gumbel:
    """Standard Gumbel noise of the items with these `keys` [n] (see `item_keys`), for `udfs.streaming_topk.top_k`."""

    def __init__(self, keys: torch.Tensor) -> None:
        self._keys = keys

    def __call__(self, items: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        keys = self._keys[items] if items.dim() == 2 else self._keys[items][:, None]
        smallest, whose = _smallest(keys, users // _GROUP)
        above = -torch.log(uniform(keys, users))
        return -torch.log(smallest + torch.where(users % _GROUP == whose, 0.0, above))

    def highest(self, items: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        keys = self._keys[items][:, None]
        from_group, to_group = first // _GROUP, (first + count - 1) // _GROUP
        smallest, _ = _smallest(keys, from_group)
        for more in range(1, 1 + int((to_group - from_group).max())):
            smallest = torch.minimum(smallest, _smallest(keys, torch.minimum(from_group + more, to_group))[0])
        # The slack is for vectorised logarithms, which may differ in the last bit.
        return 1e-12 - torch.log(smallest)


def _smallest(keys: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest exponential of each group of users, float64, and the place in the group, int64, of the user whose it is."""
    bits = _bits(keys, groups + _FIRST_GROUP)
    # The number uses the upper 52 bits, the place the lowest.
    return torch.log(_unit(bits)) * (-1 / _GROUP), bits & (_GROUP - 1)


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
    noise = Gumbel(item_keys(seed, item_ids).to(queries.device))
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
