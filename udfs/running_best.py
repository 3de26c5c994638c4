"""The best K of scores that arrive in pieces, for many rows at once: a threshold a row, and few candidates above it."""

from __future__ import annotations

import torch

_NONE = torch.iinfo(torch.int64).min


class RunningBest:
    """For each of `rows` rows, the `kept` best (score, user) seen so far; of equal scores the smaller user is better.

    Candidates wait until there are about `kept` a row and are then sorted in at once, so the threshold lags a little
    behind: a few candidates too many are taken, never one too few.

    threshold: [rows] float32. A score that is not above it cannot be among the best, if its user comes after all before.
    """

    def __init__(self, rows: int, kept: int, device: torch.device) -> None:
        self.threshold = torch.full((rows,), -torch.inf, device=device)
        self._kept = kept
        self._best = torch.empty((rows, 0), dtype=torch.int64, device=device)
        # Candidates that wait: packed, with their rows and places in the rows, piece by piece; how many each row has.
        self._pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._waiting = 0

    @property
    def empty(self) -> bool:
        """Nothing was added yet."""
        return not self._waiting and not self._best.shape[1]

    def expect(self, scores: torch.Tensor) -> None:
        """Raise the thresholds: `scores` [rows, m] are of m different users, of whom all that matter are still to be added."""
        if scores.shape[1] >= self._kept:
            lowest = torch.topk(scores, self._kept, dim=1, sorted=False).values.amin(dim=1)
            # A score equal to the lowest may still be among the best.
            below = torch.nextafter(lowest, lowest.new_tensor(-torch.inf))
            self.threshold = torch.maximum(self.threshold, below)

    def add(self, rows: torch.Tensor, users: torch.Tensor, scores: torch.Tensor) -> None:
        """Candidates [m]: row numbers in ascending order, users (int64, below 2^32; after all before), float32 scores."""
        counts = torch.bincount(rows, minlength=len(self._counts))
        places = torch.arange(len(rows), device=rows.device) + (self._counts + counts - counts.cumsum(0))[rows]
        self._pieces.append((rows, places, _packed(scores, users)))
        self._counts += counts
        self._waiting += len(rows)
        # One row with very many must not make all of them wide.
        if self._waiting >= len(self._counts) * self._kept or int(self._counts.max()) > 8 * self._kept:
            self._sort_in()

    def users(self) -> torch.Tensor:
        """The best users of each row, [rows, m] int64 in no order.

        Raises:
            ValueError: a row was given fewer than `kept` candidates.
        """
        if self._waiting:
            self._sort_in()
        if self._best.shape[1] < self._kept or bool((self._best == _NONE).any()):
            raise ValueError(f"a row has fewer than {self._kept} candidates")
        return 2**32 - 1 - (self._best & (2**32 - 1))

    def _sort_in(self) -> None:
        old = self._best.shape[1]
        both = self._best.new_full((len(self._best), old + int(self._counts.max())), _NONE)
        both[:, :old] = self._best
        for rows, places, packed in self._pieces:
            both[rows, old + places] = packed
        self._best = torch.topk(both, min(self._kept, both.shape[1]), dim=1, sorted=False).values
        if self._best.shape[1] == self._kept:
            last = self._best.amin(dim=1)
            score = torch.where(last == _NONE, -torch.inf, _score(last))
            self.threshold = torch.maximum(self.threshold, score)
        self._pieces, self._waiting = [], 0
        self._counts.zero_()


def _packed(scores: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """int64 whose order is: greater float32 score first, then smaller user."""
    # Of the two zeros, which are equal, -0.0 becomes 0.0.
    bits = (scores + 0.0).contiguous().view(torch.int32)
    # IEEE floats order as sign and magnitude; this makes them order as two's complement.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return ordered * 2**32 + (2**32 - 1 - users)


def _score(packed: torch.Tensor) -> torch.Tensor:
    """The scores of `_packed`."""
    ordered = (packed >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
