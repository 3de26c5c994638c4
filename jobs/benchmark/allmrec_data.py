"""What the A-LLMRec benchmark trains on and asks: the last item of each history among 20, by groups of users and items."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from jobs.benchmark.datasets import SPLIT_SEED, data_folder
from udfs.allmrec_examples import Examples
from udfs.backbone import Backbone
from udfs.sampled_ranking import candidates
from udfs.sequences import PADDING, Ints, Sequences, Split, leave_one_out

_NEGATIVES = 19
# The paper's: cold and warm are the bottom and the top 35 % of the items.
_SHARE = 0.35
# Users whose validation items say which epoch of a training is kept.
_VALIDATION = 2000


@dataclass(frozen=True)
class Corpus:
    """Users' whole histories of items 0 .. I - 1, their titles, and a hash of both."""

    name: str
    titles: list[str]
    histories: Sequences
    digest: str


@dataclass(frozen=True)
class Asked:
    """n questions: users (numbers), what each had before, candidates [n, 20] (the true item first), and groups [n] of them."""

    users: Ints
    histories: Sequences
    candidates: Ints
    groups: dict[str, NDArray[np.bool_]]

    def of(self, groups: list[str]) -> Asked:
        """The questions of these groups alone."""
        rows = np.flatnonzero(np.any([self.groups[name] for name in groups], axis=0))
        kept = {name: self.groups[name][rows] for name in groups}
        return Asked(self.users[rows], self.histories.take(rows), self.candidates[rows], kept)


@dataclass(frozen=True)
class Division:
    """split: what is trained on (histories of users that are left out are empty). counts [I]: an item's training events.

    text_side [I]: items whose text stands in place of their CF vector.
    """

    split: Split
    counts: Ints
    text_side: NDArray[np.bool_]
    asked: Asked


def read(name: str) -> Corpus:
    """The data set of the data folder, in the order of `seq`; raises ColdRefreshError if it is not there."""
    folder = data_folder(name)
    items = pd.read_parquet(folder / "items.parquet", columns=["item_id", "title"]).drop_duplicates("item_id")
    items = items.astype({"item_id": str}).sort_values("item_id")
    events = pd.read_parquet(folder / "interactions.parquet", columns=["user_id", "item_id", "seq"])
    events = events.astype({"user_id": str, "item_id": str})
    item = pd.Index(items["item_id"]).get_indexer(events["item_id"])
    events, item = events[item >= 0], item[item >= 0].astype(np.int64)
    user, users = pd.factorize(events["user_id"], sort=True)
    histories = Sequences.of(user.astype(np.int64), item, events["seq"].to_numpy(), len(users))
    return corpus(name, items["title"].fillna("").tolist(), histories)


def corpus(name: str, titles: list[str], histories: Sequences) -> Corpus:
    digest = hashlib.sha256("\n".join(titles).encode("utf-8", "surrogatepass"))
    for part in (histories.indptr, histories.items):
        digest.update(part.tobytes())
    return Corpus(name, titles, histories, digest.hexdigest())


def divide(data: Corpus, few: int | None, seed: int, test_users: int, cold_users: int) -> Division:
    """Leave-one-out, with cold users left out and, for few-shot, all but `few` users (drawn by `seed`).

    Questions and cold users are the same for every seed. Cold users are those with the fewest events, three at least; of
    each the first three count, two of them as the history. Few-shot asks the same questions as `all`, and knows all items by
    their texts.
    """
    rng = np.random.Generator(np.random.Philox(SPLIT_SEED))
    lengths, n_items = data.histories.lengths, len(data.titles)
    order = rng.permutation(len(lengths))
    by_length = order[np.argsort(lengths[order], kind="stable")]
    by_length = by_length[lengths[by_length] >= 3]
    left_out = by_length[: min(cold_users, len(lengths) // 10)]
    stay = np.ones(len(lengths), np.bool_)
    stay[left_out] = False
    split = leave_one_out(data.histories.where(stay))
    counts = np.bincount(split.train.items, minlength=n_items)
    # Of items with equally many events it is drawn which are cold.
    ascending = np.lexsort((rng.permutation(n_items), counts))
    bottom, top = (np.zeros(n_items, np.bool_) for _ in range(2))
    bottom[ascending[: int(_SHARE * n_items)]] = True
    top[ascending[n_items - int(_SHARE * n_items) :]] = True

    most = test_users or len(lengths)
    tested = order[split.test[order] != PADDING]
    truth = split.test[tested]
    groups = {"all": np.ones(len(tested), np.bool_), "warm items": top[truth], "cold items": bottom[truth]}
    groups = {name: held & (held.cumsum() <= most) for name, held in groups.items()}
    if few is not None:
        groups = {f"few-shot {few}": groups["all"]}
    rows = np.flatnonzero(np.any(list(groups.values()), axis=0))
    groups = {name: held[rows] for name, held in groups.items()}

    def questions(users: Ints, truth: Ints, seed: int) -> Ints:
        # Neither what a user has had nor what the user gets later is a wrong answer.
        return candidates(truth, data.histories.take(users), n_items, _NEGATIVES, seed)

    # Drawn for all, so that a question is the same however many are asked.
    choice = questions(tested, truth, SPLIT_SEED)[rows]
    users, known = tested[rows], split.before_test().take(tested[rows])
    if few is None:
        first = data.histories.indptr[left_out]
        choice_of_cold = questions(left_out, data.histories.items[first + 2], SPLIT_SEED + 1)[:most]
        users, choice = np.concatenate([users, left_out[:most]]), np.concatenate([choice, choice_of_cold])
        behind = np.arange(len(users)) >= len(rows)
        groups = {name: np.concatenate([held, behind[len(rows) :] & False]) for name, held in groups.items()}
        groups["cold users"] = behind
        two = data.histories.items[first[:most, None] + np.arange(2)].reshape(-1)
        ends = known.indptr[-1] + 2 * np.arange(1, len(first[:most]) + 1)
        known = Sequences(np.concatenate([known.indptr, ends]), np.concatenate([known.items, two]))
    text_side = bottom
    if few is not None:
        chosen = np.random.Generator(np.random.Philox(seed)).permutation(np.flatnonzero(split.test != PADDING))[:few]
        keep = np.zeros(len(lengths), np.bool_)
        keep[chosen] = True
        split = Split(split.train.where(keep), np.where(keep, split.validation, PADDING), split.test)
        text_side, counts = np.ones(n_items, np.bool_), np.bincount(split.train.items, minlength=n_items)
    return Division(split, counts, text_side, Asked(users, known, choice, groups))


def examples(division: Division, backbone: Backbone) -> Examples:
    """One a user: the last item of the training history, which the others come before."""
    train = division.split.train
    users = np.flatnonzero(train.lengths >= 2)
    whole = train.take(users)
    last = np.zeros(len(whole.items), np.bool_)
    last[whole.indptr[1:] - 1] = True
    before = Sequences(whole.indptr - np.arange(len(whole.indptr)), whole.items[~last])
    return Examples(backbone.users(users, before), before, whole.items[last], whole)


def validation(division: Division, backbone: Backbone) -> Examples:
    """The validation items of 2,000 users at most."""
    users = np.flatnonzero(division.split.validation != PADDING)
    users = np.sort(np.random.Generator(np.random.Philox(SPLIT_SEED)).permutation(users)[:_VALIDATION])
    before = division.split.train.take(users)
    return Examples(backbone.users(users, before), before, division.split.validation[users])


def some(data: Examples, most: int, seed: int) -> Examples:
    """At most so many of them, drawn by `seed`; all for 0."""
    if not 0 < most < len(data):
        return data
    rows = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(len(data))[:most])
    return Examples(
        data.users[rows], data.histories.take(rows), data.positives[rows], data.seen.take(rows) if data.seen else None
    )
