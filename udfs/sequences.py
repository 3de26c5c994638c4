"""Users' histories as sequences of items: built from events, split leave-one-out, and padded for a batch.

Histories of different lengths are kept end to end (as a CSR matrix keeps its rows) and padded only when a batch is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

#: Stands for an item that is missing: before the oldest of a history that is shorter than its row, behind the last candidate of
#: a user who has fewer than others. Item numbers are 0 .. I - 1.
PADDING = -1


@dataclass(frozen=True)
class Sequences:
    """n histories, oldest item first: history k is items[indptr[k]:indptr[k + 1]]; both int64."""

    indptr: Ints
    items: Ints

    @classmethod
    def of(cls, users: Ints, items: Ints, order: NDArray, n_users: int) -> Sequences:
        """The histories of users 0 .. n_users - 1 from events in any order; a user without an event has an empty one.

        Args:
            users, items: [N] numbers.
            order: [N], anything that sorts, such as times or positions. Events of a user that are equal in it are put
                in the order of their items, so that the rows' order never matters.

        Raises:
            ValueError: the arrays differ in length, or a number is out of range.
        """
        if not len(users) == len(items) == len(order):
            raise ValueError(
                f"events of different lengths: {len(users)} users, {len(items)} items, {len(order)} places"
            )
        if len(users) and not (users.min() >= 0 and users.max() < n_users and items.min() >= 0):
            raise ValueError(f"events of users outside of 0 .. {n_users - 1}, or of items below 0")
        sort = np.lexsort((items, order, users))
        counts = np.bincount(users, minlength=n_users)
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), items[sort].astype(np.int64))

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> Ints:
        """[n]"""
        return np.diff(self.indptr)

    @property
    def rows(self) -> Ints:
        """[N]: whose history each of `items` is in."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def padded(self, rows: Ints, length: int) -> Ints:
        """[len(rows), length]: the last `length` items of these histories, PADDING before shorter ones."""
        end = self.indptr[rows + 1, None]
        at = end - length + np.arange(length)
        real = at >= self.indptr[rows, None]
        found = np.full(at.shape, PADDING, np.int64)
        found[real] = self.items[at[real]]
        return found

    def prefixes(self, rows: Ints, lengths: Ints) -> tuple[Sequences, Ints]:
        """The first `lengths` [m] items of the histories `rows` [m], in this order; and where each of them is in `items`."""
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], lengths)
        return Sequences(indptr, self.items[at]), at

    def take(self, rows: Ints) -> Sequences:
        """These histories, in this order."""
        return self.prefixes(rows, self.indptr[rows + 1] - self.indptr[rows])[0]

    def where(self, keep: NDArray[np.bool_]) -> Sequences:
        """The same users with the histories of all others than `keep` [n] empty: such as to leave users out of training."""
        lengths = np.where(keep, self.lengths, 0)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Sequences(indptr, self.items[np.repeat(keep, self.lengths)])


@dataclass(frozen=True)
class Split:
    """A leave-one-out split of n histories: what is trained on, and the two last items [n] (PADDING where there is none)."""

    train: Sequences
    validation: Ints
    test: Ints

    def before_test(self) -> Sequences:
        """What is known when the test item is asked for: the training history and the validation item behind it."""
        lengths = self.train.lengths + (self.validation != PADDING)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        items = np.empty(indptr[-1], np.int64)
        last = np.zeros(len(items), np.bool_)
        last[indptr[1:][self.validation != PADDING] - 1] = True
        items[last] = self.validation[self.validation != PADDING]
        items[~last] = self.train.items
        return Sequences(indptr, items)


def leave_one_out(histories: Sequences) -> Split:
    """The last item of each history is for the test, the one before it for validation.

    A history of less than three items is for training as a whole (Kang and McAuley 2018, released code).
    """
    split = histories.lengths >= 3
    end = histories.indptr[1:]
    validation, test = (np.full(len(histories), PADDING, np.int64) for _ in range(2))
    validation[split], test[split] = histories.items[end[split] - 2], histories.items[end[split] - 1]
    train, _ = histories.prefixes(np.arange(len(histories)), histories.lengths - 2 * split)
    return Split(train, validation, test)


def batches(lengths: Ints, positions: int) -> list[Ints]:
    """Indices of `lengths` [n] in groups of similar length, each of at most `positions` numbers once padded to its longest.

    Shorter ones come first, equal ones in their order; one that is longer than `positions` is a group of its own.
    """
    order = np.argsort(lengths, kind="stable")
    ascending = np.maximum(lengths[order], 1)
    found, start = [], 0
    while start < len(order):
        most = max(1, positions // ascending[start])
        padded = ascending[start : start + most] * np.arange(1, len(ascending[start : start + most]) + 1)
        stop = start + max(1, int(np.searchsorted(padded, positions, side="right")))
        found.append(order[start:stop])
        start = stop
    return found
