"""The best K of all users for each item, and the log-sum-exp over all users, without ever holding items x users.

Users pass by in tiles; an item keeps its best candidates and a running log-sum-exp. Shards of a vocabulary are scored apart
and merged. Candidates are found in float32 and then scored again in float64, and equal scores are put in the order of the
users' numbers, so that neither tiles nor shards nor the order of work decide who is chosen: only users whose scores lie
within float32 rounding of the K-th, beyond a margin of candidates kept for this, could still change places.

What a tile costs is its matrix product, one maximum a block of 32 users, and one exponential a user: only blocks whose
maximum is above the item's K-th best score so far are looked into. The log-sum-exp adds float32 exponentials within a tile
and float64 sums of tiles: its absolute error is below 1e-6 beside the logits' own rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from udfs.running_best import RunningBest
from udfs.threads import in_threads

# Candidates kept beyond K, to be told apart in float64.
_MARGIN = 16
# Users whose highest score is compared with the threshold; a measured optimum, which results do not depend on.
_BLOCK = 32
# Logits that exist at a time: on a CPU what stays in its cache. Items scored at a time, so that tiles are not narrow.
_CELLS = {"cpu": 2**20, "cuda": 2**28}
_ROWS = {"cpu": 256, "cuda": 4096}
# Fewer items than this a thread, and torch shares out the work within each operation; so few logits in all, and they are
# one tile too.
_ROWS_A_THREAD, _FEW_LOGITS = 16, 2**22


class Noise(Protocol):
    """A random number for each pair of an item (its row among the queries) and a user (its number in the vocabulary)."""

    def __call__(self, items: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
        """Of items [n] and users [m]: [n, m]; of items [n, 1] and users [n, m]: [n, m]. float64, on the items' device."""
        ...

    def highest(self, items: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        """No noise of items [n] with any of the users first [m] .. first + count - 1 is above this, [n, m] float64."""
        ...


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
        queries: [n, d] float32, and keys: [U, d] float32, or bfloat16 where memory is short (a tile at a time is made
            float32, so nothing else is rounded), on one device. bias: [U] float32.
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
    kept = min(k + _MARGIN, len(keys) if allowed is None else int(allowed.sum()))
    if not len(queries) or not kept:
        empty = queries.new_zeros((len(queries), min(k, kept)), dtype=torch.float64)
        return Selection(empty.long(), empty, empty, empty.new_full((len(queries),), -torch.inf))
    rows = torch.arange(len(queries), device=queries.device)
    few = len(queries) * len(keys) <= _FEW_LOGITS
    cells = max(_CELLS[queries.device.type], _FEW_LOGITS if few else 0)
    together = few or queries.device.type != "cpu" or len(rows) < _ROWS_A_THREAD * torch.get_num_threads()

    def scan(rows: torch.Tensor) -> list[Selection]:
        """`top_k` of these rows of queries."""
        with torch.inference_mode():
            blocks = rows.split(_ROWS[queries.device.type])
            scans = [_Scan(queries[block], block, kept, temperature, noise, first_user) for block in blocks]
            widest = max(1, min(tile, max(cells // len(blocks[0]), _BLOCK)))
            buffer = queries.new_empty(len(blocks[0]) * -(-widest // _BLOCK) * _BLOCK)
            # Noise is dear where there is no threshold yet, so the first tiles are narrow then.
            width = widest if noise is None else min(widest, -(-8 * kept // _BLOCK) * _BLOCK)
            start = 0
            while start < len(keys):
                of_tile = slice(start, start + width)
                added = None if bias is None else bias[of_tile]
                if allowed is not None:
                    added = torch.where(allowed[of_tile], 0.0 if added is None else added, -torch.inf)
                part = keys[of_tile].to(queries.dtype)
                for one in scans:
                    one.add(part, added, start, buffer)
                start, width = start + width, min(2 * width, widest)
            return [one.selection(keys, bias, k) for one in scans]

    shares = [rows] if together else list(rows.chunk(torch.get_num_threads()))
    parts = [part for share in in_threads(scan, shares) for part in share]
    return Selection(*(torch.cat([getattr(part, f) for part in parts]) for f in ("users", "scores", "logits", "lse")))


class _Scan:
    """`top_k` of a block of queries [n, d], which are the rows `items` of all queries, while tiles of users pass by."""

    def __init__(
        self,
        queries: torch.Tensor,
        items: torch.Tensor,
        kept: int,
        temperature: float,
        noise: Noise | None,
        first_user: int,
    ) -> None:
        self._queries, self._items, self._noise = queries, items, noise
        self._temperature, self._first_user = temperature, first_user
        self._best = RunningBest(len(queries), kept, queries.device)
        self._peak = queries.new_full((len(queries),), -torch.inf)
        self._lse = queries.new_full((len(queries),), -torch.inf, dtype=torch.float64)

    def add(self, keys: torch.Tensor, added: torch.Tensor | None, start: int, buffer: torch.Tensor) -> None:
        """Score a tile: users `start`, ... with these keys [t, d] and what is added to their logits [t], in `buffer`."""
        blocks = -(-len(keys) // _BLOCK)
        logits = buffer[: len(self._queries) * blocks * _BLOCK].view(len(self._queries), blocks * _BLOCK)
        torch.mm(self._queries, keys.T, out=logits[:, : len(keys)])
        if added is not None:
            logits[:, : len(keys)] += added
        logits[:, len(keys) :] = -torch.inf
        blocked = logits.view(len(self._queries), blocks, _BLOCK)
        highest = blocked.amax(dim=2)
        peak = highest.amax(dim=1)
        if not (peak < torch.inf).all():
            raise ValueError("a logit is infinite or not a number: so is something in the model or in a text embedding")
        self._choose(blocked, highest, start)
        self._sum(logits, peak)

    def _choose(self, logits: torch.Tensor, highest: torch.Tensor, start: int) -> None:
        """Take the candidates out of a tile [n, blocks, 32], of whose blocks the highest logit is given."""
        limit = self._best.threshold[:, None]
        if self._noise is not None:
            first = torch.arange(highest.shape[1], device=highest.device) * _BLOCK + (start + self._first_user)
            above = self._noise.highest(self._items, first, _BLOCK)
            # What a logit must exceed if its noise were the highest of the block; a little less, for rounding.
            limit = limit.double()
            limit = (limit - above - 1e-6 * (limit.abs() + above.abs())) * self._temperature
        elif self._best.empty:
            self._best.expect(highest)
            limit = self._best.threshold[:, None]
        hit = torch.nonzero((highest > limit).view(-1)).flatten()
        inside = logits.view(-1, _BLOCK).index_select(0, hit)
        rows = hit.div(highest.shape[1], rounding_mode="floor")
        limit = limit.view(-1)[hit if limit.shape[1] > 1 else rows]
        found, columns = torch.nonzero(inside > limit[:, None], as_tuple=True)
        rows, scores = rows[found], inside[found, columns]
        users = (hit[found] % highest.shape[1]).mul_(_BLOCK).add_(columns).add_(start)
        if self._noise is not None:
            noise = self._noise(self._items[rows][:, None], (users + self._first_user)[:, None])[:, 0]
            scores = (scores.double() / self._temperature + noise).float()
            chosen = torch.nonzero(scores > self._best.threshold[rows]).flatten()
            rows, users, scores = rows[chosen], users[chosen], scores[chosen]
        self._best.add(rows, users, scores)

    def _sum(self, logits: torch.Tensor, peak: torch.Tensor) -> None:
        """Add a tile to the log-sum-exp; the logits are overwritten."""
        self._peak = torch.maximum(self._peak, peak)
        # Where exp() neither overflows nor loses what counts, nothing needs to be subtracted first.
        plain = bool((self._peak.amax() < 60) & (self._peak.nan_to_num(neginf=0.0).amin() > -20))
        shift = torch.zeros_like(peak) if plain else torch.where(peak.isfinite(), peak, 0.0)
        if not plain:
            logits -= shift[:, None]
        self._lse = torch.logaddexp(self._lse, torch.log(logits.exp_().sum(dim=1).double()) + shift.double())

    def selection(self, keys: torch.Tensor, bias: torch.Tensor | None, k: int) -> Selection:
        """The best k of all users seen; `keys` and `bias` are those of all users."""
        candidates = self._best.users()
        exact = torch.cat(
            [
                torch.einsum("nd,nkd->nk", some.double(), keys[users.flatten()].double().view(*users.shape, -1))
                for some, users in zip(self._queries.split(64), candidates.split(64), strict=True)
            ]
        )
        if bias is not None:
            exact += bias[candidates].double()
        # Rounded, so that logits equal but for the last bits of a float64 sum are equal, and tie.
        exact = exact.float().double()
        users = candidates + self._first_user
        scores = exact
        if self._noise is not None:
            scores = exact / self._temperature + self._noise(self._items[:, None], users)
        order = _order(scores, users)[:, :k]
        users, scores, exact = (torch.gather(t, 1, order) for t in (users, scores, exact))
        return Selection(users, scores, exact, self._lse)


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
