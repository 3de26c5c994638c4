"""What both stages of A-LLMRec (arXiv 2404.11343) learn from: users, their histories, and the item that came next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schemas.errors import ColdRefreshError
from udfs.sampled_ranking import candidates
from udfs.sequences import Ints, Sequences
from udfs.vectors import Matrix


class AllmrecError(ColdRefreshError):
    """A part of A-LLMRec does not fit another one, or a training has nothing to learn from: the message says which."""


@dataclass(frozen=True)
class Examples:
    """n examples, one a row; a user may have several.

    users [n, d] float32: x_u, what the CF model makes of the user without the positive. histories: the n users' items before
    it, oldest first. positives [n] int64: the item that came next. seen: of the same n users, items that are never drawn as
    negatives, in any order; the histories if None. The positive itself never is one.
    """

    users: Matrix
    histories: Sequences
    positives: Ints
    seen: Sequences | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.histories), len(self.positives), len(self.seen or self.histories)}
        if len(lengths) != 1:
            raise AllmrecError(
                f"examples of different lengths: {len(self.users)} users, {len(self.histories)} histories, "
                f"{len(self.positives)} positives, {len(self.seen or self.histories)} lists of seen items"
            )

    def __len__(self) -> int:
        return len(self.positives)

    def take(self, rows: Ints) -> Examples:
        """The examples `rows`, in that order."""
        seen = self.seen.take(rows) if self.seen else None
        return Examples(self.users[rows], self.histories.take(rows), self.positives[rows], seen)

    def draw(self, pool: Ints, negatives: int, seed: int) -> Ints:
        """[n, 1 + negatives]: each positive, then different items of `pool` that are not seen, uniformly.

        The same for a seed, whatever is done with which rows.

        Args:
            pool: different item numbers; a positive need not be among them.

        Raises:
            AllmrecError: a row has too few items to draw from.
        """
        seen = self.seen or self.histories
        rows = np.concatenate([seen.rows, np.arange(len(self))])
        items = np.concatenate([seen.items, self.positives])
        place = np.full(max(items.max(initial=-1), pool.max(initial=-1)) + 1, -1, np.int64)
        place[pool] = np.arange(len(pool))
        inside = place[items] >= 0
        known = Sequences.of(rows[inside], place[items[inside]], np.zeros(int(inside.sum())), len(self))
        try:
            # One place behind the pool's stands for the truth, which is no negative of its own row.
            found = candidates(np.full(len(self), len(pool)), known, len(pool) + 1, negatives, seed)
        except ValueError as error:
            raise AllmrecError(
                f"{negatives} items that a user has not seen cannot be drawn from a pool of {len(pool)}: draw fewer, or "
                "leave out users who have seen nearly all of them"
            ) from error
        return np.concatenate([self.positives[:, None], pool[found[:, 1:]]], 1)

    def arrays(self) -> list[np.ndarray]:
        """Everything in them, for `fingerprint`."""
        histories = (self.histories, self.seen or self.histories)
        return [self.users, self.positives, *(part for one in histories for part in (one.indptr, one.items))]
