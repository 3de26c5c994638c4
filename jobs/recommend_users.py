"""Who of the users that are asked for can be served, with which candidates, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from jobs.allmrec_night import Mask, Night
from jobs.item_index import ItemIndex
from udfs.ids import place
from udfs.sequences import PADDING, Ints
from udfs.vectors import Matrix


@dataclass(frozen=True)
class Users:
    """users [n]: those to serve, numbers of the night, ascending. candidates [n, C]: items, best first, PADDING behind the last;
    retrieval [n, C]: their inner products. rejected: (user id, reason, detail, rows)."""

    users: Ints
    candidates: Ints
    retrieval: Matrix
    rejected: list[tuple[str, str, str, int]]


class Nearest:
    """A night's index, with the items as the night numbers them."""

    def __init__(self, index: ItemIndex, night: Night) -> None:
        self._index = index
        of_item = place(index.item_ids, night.item_ids)
        self._number = dict(zip(index.item_ids, of_item.tolist(), strict=True))

    def __call__(self, vector: Matrix, had: Ints, spoken: Mask, most: int) -> list[tuple[int, float]]:
        """The `most` best items of `spoken` that are not in `had`, with their inner products; the index is asked for more
        until there are enough, or no others."""
        known, wanted, total = set(had.tolist()), most + len(had), len(self._index.item_ids)
        while True:
            best = self._index.search(vector, min(wanted, total))
            found = [(self._number[name], score) for name, score in best]
            found = [(item, score) for item, score in found if item >= 0 and item not in known and spoken[item]]
            if len(found) >= most or wanted >= total or len(best) < wanted:
                return found[:most]
            wanted *= 2


def choose(
    night: Night,
    asked: list[str],
    x_known: Mask,
    spoken: Mask,
    vectors: tuple[list[str], Matrix],
    nearest: Nearest,
    most: int,
) -> Users:
    """The users to serve and their `most` best items by the index that are not in the history.

    Args:
        asked: user ids, any number of times.
        x_known: [U], users whom the CF side of the reader knows. spoken: [I], items that a prompt can name.
        vectors: published user ids and vectors.
    """
    times = Counter(asked)
    ids = sorted(times)
    rejected = [(name, "duplicate", "asked for more than once", times[name] - 1) for name in ids if times[name] > 1]
    number = place(ids, night.user_ids)
    row = place(ids, vectors[0])
    histories = night.histories
    users, candidates, retrieval = [], [], []
    for at, name in enumerate(ids):
        user = int(number[at])
        reason = None
        if user < 0:
            reason = ("unknown_user", "no interaction of before the run date is used")
        elif row[at] < 0 or not x_known[user]:
            reason = ("no_vector", "no published vector" if row[at] < 0 else "the backbone has no vector")
        else:
            had = histories.items[histories.indptr[user] : histories.indptr[user + 1]]
            if not spoken[had].any():
                reason = ("no_history", "no item of the history has a vector or a text")
            else:
                found = nearest(vectors[1][row[at]], had, spoken, most)
                if not found:
                    reason = ("no_candidate", "every published item is in the history")
        if reason:
            rejected.append((name, *reason, 1))
        else:
            users.append(user)
            candidates.append([item for item, _ in found] + [PADDING] * (most - len(found)))
            retrieval.append([score for _, score in found] + [np.nan] * (most - len(found)))
    order = np.argsort(np.array(users, np.int64), kind="stable")
    return Users(
        np.array(users, np.int64)[order],
        np.array(candidates, np.int64).reshape(-1, most)[order],
        np.array(retrieval, np.float32).reshape(-1, most)[order],
        sorted(rejected),
    )


def rejected_rows(users: Users, run_id: str, refresh_date: object) -> pa.Table:
    """The rejected users as rows of schemas/rejected_rows.yaml."""
    names = ("key", "reason", "detail", "rows")
    columns = dict(zip(names, map(list, zip(*users.rejected, strict=True)), strict=True)) if users.rejected else {}
    n = len(users.rejected)
    return pa.table(
        {
            "refresh_date": pa.array([refresh_date] * n, pa.date32()),
            "table": pa.array(["users to recommend to"] * n, pa.string()),
            **{name: pa.array(columns.get(name, []), pa.int64() if name == "rows" else pa.string()) for name in names},
            "run_id": pa.array([run_id] * n, pa.string()),
        }
    )


def reasons(users: Users) -> dict[str, int]:
    """Reason -> rows of the list."""
    counted: Counter[str] = Counter()
    for _, reason, _, rows in users.rejected:
        counted[reason] += rows
    return dict(sorted(counted.items()))


def history_of(night: Night, users: Ints) -> pa.Table:
    """(user_id, item_id) of everything that these users had."""
    histories = night.histories.take(users)
    return pa.table(
        {
            "user_id": night.user_ids.take(pa.array(users[histories.rows])),
            "item_id": night.item_ids.take(pa.array(histories.items)),
        }
    )
