"""The best K of all users for each item, and the log-sum-exp over all users, without ever holding items x users.

Users pass by in tiles; an item keeps its best candidates and a running log-sum-exp, both exact. Shards of a vocabulary are
scored apart and merged. Candidates are found in float32 and then scored again in float64, and equal scores are put in the
order of the users' numbers, so that neither tiles nor shards nor the order of work decide who is chosen: only users whose
scores lie within float32 rounding of the K-th, beyond a margin of candidates kept for this, could still change places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Candidates kept beyond K, to be told apart in float64.
_MARGIN = 16
# Items scored at a time: [_ROWS, tile] is what is held.
_ROWS = 256

# Noise of (items [n], users [m]) -> [n, m], or of (items [n, 1], users [n, m]) -> [n, m]; float64, on the items' device.
Noise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Selection:
    """The K users of each of n items, best first: fewer than K columns if fewer users were allowed.

    users [n, K] int64: numbers in the whole vocabulary. scores [n, K] float64: what they were chosen by, non-increasing.
    logits [n, K] float64, rounded to float32. lse [n] float64: log-sum-exp of the logits of all allowed users.
    """

    users: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor
    lse: torch.Tensor

    @property
    def probabilities(self) -> torch.Tensor:
        """p(u | item) over all allowed users, [n, K] float64 in (0, 1]."""
        p = torch.exp(self.logits - self.lse[:, None])
        # Far out in the tail exp() underflows to 0; a drawn user's probability is above it.
        return p.clamp(torch.finfo(torch.float64).tiny, 1.0)

    def by_probability(self) -> Selection:
        """The same users with the most probable first."""
        order = _order(self.logits, self.users)
        users, scores, logits = (torch.gather(t, 1, order) for t in (self.users, self.scores, self.logits))
        return Selection(users, scores, logits, self.lse)


def top_k(
    queries: torch.Tensor,
    keys: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    tile: int = 16384,
    first_user: int = 0,
    temperature: float = 1.0,
    noise: Noise | None = None,
) -> Selection:
    """The K users with the highest score queries . keys + bias, for each query.

    Args:
        queries: [n, d] and keys: [U, d], float32, on one device. bias: [U].
        allowed: [U] bool; other users are neither chosen nor part of the log-sum-exp.
        tile: users scored at a time.
        first_user: number of keys[0] in the whole vocabulary, when keys are a shard of it.
        temperature, noise: users are chosen by logit / temperature + noise (see udfs/user_sampling.py); the log-sum-exp is
            of the logits alone.

    Raises:
        ValueError: k < 1, or a logit is not a number.
    """
    if k < 1:
        raise ValueError(f"k is {k}, must be 1 or more")
    numbers = torch.arange(len(keys), device=keys.device) if allowed is None else torch.nonzero(allowed).flatten()
    with torch.inference_mode():
        blocks = [
            _block(queries, rows, keys, numbers, k, bias, allowed, tile, first_user, temperature, noise)
            for rows in torch.arange(len(queries), device=queries.device).split(_ROWS)
        ]
    if not blocks:
        empty = queries.new_zeros((0, min(k, len(numbers))), dtype=torch.float64)
        return Selection(empty.long(), empty, empty, empty.new_zeros(0))
    return Selection(*(torch.cat([getattr(b, f) for b in blocks]) for f in ("users", "scores", "logits", "lse")))


def _block(
    queries: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    numbers: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    allowed: torch.Tensor | None,
    tile: int,
    first_user: int,
    temperature: float,
    noise: Noise | None,
) -> Selection:
    """`top_k` of the queries `rows`; `numbers` are the allowed rows of keys."""
    part = queries[rows]
    kept = min(k + _MARGIN, len(numbers))
    best = torch.full((len(rows), 0), 0, dtype=torch.int64, device=part.device)
    lse = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=part.device)
    for start in range(0, len(keys), tile):
        of_tile = slice(start, start + tile)
        logits = part @ keys[of_tile].T
        if bias is not None:
            logits += bias[of_tile]
        if allowed is not None:
            logits.masked_fill_(~allowed[of_tile], -torch.inf)
        peak = logits.amax(dim=1)
        if not (peak < torch.inf).all():
            raise ValueError("a logit is infinite or not a number: so is something in the model or in a text embedding")
        # float32 terms, float64 sum; a tile without allowed users adds nothing.
        shifted = torch.exp(logits - torch.where(peak.isfinite(), peak, 0.0)[:, None])
        lse = torch.logaddexp(
            lse, torch.log(shifted.sum(dim=1, dtype=torch.float64)) + peak.double().nan_to_num(neginf=0)
        )
        scores = logits
        if noise is not None:
            users = torch.arange(start, start + logits.shape[1], device=part.device) + first_user
            scores = (logits.double() / temperature + noise(rows, users)).float()
        best = torch.cat([best, _packed(scores, start)], dim=1)
        best = torch.topk(best, min(kept, best.shape[1]), dim=1).values
    candidates = _unpacked(best)[:, :kept]
    exact = (part.double()[:, None, :] * keys[candidates].double()).sum(dim=2)
    if bias is not None:
        exact += bias[candidates].double()
    # Rounded, so that logits equal but for the last bits of a float64 sum are equal, and tie.
    exact = exact.float().double()
    users = candidates + first_user
    scores = exact if noise is None else exact / temperature + noise(rows[:, None], users)
    order = _order(scores, users)[:, :k]
    users, scores, exact = (torch.gather(t, 1, order) for t in (users, scores, exact))
    return Selection(users, scores, exact, lse)


def merge(parts: Sequence[Selection], k: int) -> Selection:
    """The selection over the union of several shards' users, from each shard's own."""
    users, scores, logits = (torch.cat([getattr(p, f) for p in parts], dim=1) for f in ("users", "scores", "logits"))
    order = _order(scores, users)[:, :k]
    lse = torch.logsumexp(torch.stack([p.lse for p in parts]), dim=0)
    users, scores, logits = (torch.gather(t, 1, order) for t in (users, scores, logits))
    return Selection(users, scores, logits, lse)


def _order(scores: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """Columns of each row by descending score, equal scores by ascending user."""
    by_user = torch.argsort(users, dim=1, stable=True)
    by_score = torch.argsort(torch.gather(scores, 1, by_user), dim=1, stable=True, descending=True)
    return torch.gather(by_user, 1, by_score)


def _packed(scores: torch.Tensor, start: int) -> torch.Tensor:
    """int64 whose order is: greater float32 score first, then smaller user; the user is start + column (below 2^32)."""
    bits = scores.contiguous().view(torch.int32)
    # IEEE floats order as sign and magnitude; this makes them order as two's complement.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    columns = torch.arange(start, start + scores.shape[1], device=scores.device)
    return ordered * 2**32 + (2**32 - 1 - columns)


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The users of `_packed`."""
    return 2**32 - 1 - (packed & (2**32 - 1))
