"""What the A-LLMRec benchmark trains on and asks: the last item of each history among 20, by groups of users and items."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from jobs.benchmark.datasets import SPLIT_SEED, data_folder
from schemas.errors import ColdRefreshError
from udfs.allmrec_examples import Examples
from udfs.backbone import Backbone
from udfs.fingerprint import fingerprint
from udfs.sampled_ranking import candidates
from udfs.sequences import PADDING, Ints, Sequences, Split, leave_one_out

_NEGATIVES = 19
# The paper's: cold and warm are the bottom and the top 35 % of the items.
_SHARE = 0.35
#: The group of the items with the fewest of all events: those of validation and test count too.
SELDOM = "cold items by all events"
# Users whose validation items say which epoch of a training is kept.
_VALIDATION = 2000


@dataclass(frozen=True)
class Corpus:
    """Users' whole histories of items 0 .. I - 1; their titles, which prompts name, and texts, which are encoded."""

    name: str
    titles: list[str]
    texts: list[str]
    histories: Sequences

    @cached_property
    def digest(self) -> str:
        return fingerprint([self.titles, self.texts], self.histories.indptr, self.histories.items)


@dataclass(frozen=True)
class Questions:
    """n questions: users (numbers), what each had before, candidates [n, 20] (the true item first), and groups [n] of them."""

    users: Ints
    histories: Sequences
    candidates: Ints
    groups: dict[str, NDArray[np.bool_]]

    def of(self, groups: list[str]) -> Questions:
        """The questions of these groups alone."""
        rows = np.flatnonzero(np.any([self.groups[name] for name in groups], axis=0))
        kept = {name: self.groups[name][rows] for name in groups}
        return Questions(self.users[rows], self.histories.take(rows), self.candidates[rows], kept)


@dataclass(frozen=True)
class Division:
    """split: what is trained on (histories of users that are left out are empty). counts [I]: an item's training events.

    text_side [I]: items whose text stands in place of their CF vector.
    """

    split: Split
    counts: Ints
    text_side: NDArray[np.bool_]
    asked: Questions


def read(name: str) -> Corpus:
    """The data set of the data folder, in the order of `seq` or else of `event_time`.

    An item without a text is encoded by its title, which the texts of the Amazon sets begin with.

    Raises:
        ColdRefreshError: it is not there, or says nothing of the events' order.
    """
    folder = data_folder(name)
    items = (
        pd.read_parquet(folder / "items.parquet")
        .drop_duplicates("item_id")
        .reindex(columns=["item_id", "title", "text"])
    )
    items = items.astype({"item_id": str}).fillna({"title": "", "text": ""}).sort_values("item_id")
    texts = items["text"].where(items["text"] != "", items["title"])
    events = pd.read_parquet(folder / "interactions.parquet")
    order = next((column for column in ("seq", "event_time") if column in events), None)
    if order is None:
        raise ColdRefreshError(f"{folder}/interactions.parquet has neither seq nor event_time: histories have an order")
    events = events.astype({"user_id": str, "item_id": str})
    item = pd.Index(items["item_id"]).get_indexer(events["item_id"])
    events, item = events[item >= 0], item[item >= 0].astype(np.int64)
    user, users = pd.factorize(events["user_id"], sort=True)
    histories = Sequences.of(user.astype(np.int64), item, events[order].to_numpy(), len(users))
    return Corpus(name, items["title"].tolist(), texts.tolist(), histories)


def divide(data: Corpus, few: int | None, seed: int, test_users: int, cold_users: int) -> Division:
    """Leave-one-out, with cold users left out and, for few-shot, all but `few` users (drawn by `seed`).

    Questions and cold users are the same for every seed. Cold users are those with the fewest events, three at least; of
    each the first three count, two of them as the history. Few-shot asks the same questions as `all`, and knows all items by
    their texts.
    """
    rng = np.random.Generator(np.random.Philox(SPLIT_SEED))
    lengths = data.histories.lengths
    order = rng.permutation(len(lengths))
    by_length = order[np.argsort(lengths[order], kind="stable")]
    left_out = by_length[lengths[by_length] >= 3][: min(cold_users, len(lengths) // 10)]
    stay = np.ones(len(lengths), np.bool_)
    stay[left_out] = False
    split = leave_one_out(data.histories.where(stay))
    counts = np.bincount(split.train.items, minlength=len(data.titles))
    # Of items with equally many events it is drawn which are cold.
    ascending = np.lexsort((rng.permutation(len(counts)), counts))
    share = int(_SHARE * len(counts))
    bottom, top = (
        np.isin(np.arange(len(counts)), ascending[:share]),
        np.isin(np.arange(len(counts)), ascending[-share:]),
    )
    # By what is trained on, whose cold items are also some that many had afterwards; and by all events.
    of_all = np.bincount(data.histories.items, minlength=len(counts))
    seldom = np.isin(np.arange(len(counts)), np.lexsort((rng.permutation(len(counts)), of_all))[:share])
    items = {"warm items": top, "cold items": bottom, SELDOM: seldom}
    known = _known(data, split, order[split.test[order] != PADDING], items, test_users)
    if few is None:
        return Division(split, counts, bottom, _behind(known, _cold(data, left_out, test_users)))
    users = np.random.Generator(np.random.Philox(seed)).permutation(np.flatnonzero(split.test != PADDING))[:few]
    keep = np.isin(np.arange(len(lengths)), users)
    split = Split(split.train.where(keep), np.where(keep, split.validation, PADDING), split.test)
    asked = known.of(["all"])
    asked = Questions(asked.users, asked.histories, asked.candidates, {f"few-shot {few}": asked.groups["all"]})
    return Division(split, np.bincount(split.train.items, minlength=len(counts)), np.ones(len(counts), np.bool_), asked)


def _known(data: Corpus, split: Split, users: Ints, items: dict[str, NDArray[np.bool_]], most: int) -> Questions:
    """The test items of users that are trained on: all, and of each group of `items` [I]; the first `most` of `users` [n] each."""
    truth = split.test[users]
    groups = {"all": np.ones(len(users), np.bool_), **{name: held[truth] for name, held in items.items()}}
    first = {name: held & (held.cumsum() <= (most or len(users))) for name, held in groups.items()}
    asked = Questions(users, split.before_test().take(users), _candidates(data, users, truth, SPLIT_SEED), first)
    return asked.of(list(groups))


def _cold(data: Corpus, users: Ints, most: int) -> Questions:
    """The third event of users that are left out."""
    first = data.histories.indptr[users]
    before = Sequences(2 * np.arange(len(users) + 1), data.histories.items[first[:, None] + np.arange(2)].reshape(-1))
    asked = _candidates(data, users, data.histories.items[first + 2], SPLIT_SEED + 1)
    groups = {"cold users": np.arange(len(users)) < (most or len(users))}
    return Questions(users, before, asked, groups).of(list(groups))


def _candidates(data: Corpus, users: Ints, truth: Ints, seed: int) -> Ints:
    """[n, 20]. Neither what a user has had nor what the user gets later is a wrong answer.

    Drawn for all users, so that a question is the same however many are asked.
    """
    return candidates(truth, data.histories.take(users), len(data.titles), _NEGATIVES, seed)


def _behind(a: Questions, b: Questions) -> Questions:
    """The questions of both."""
    histories = Sequences(
        np.concatenate([a.histories.indptr, a.histories.indptr[-1] + b.histories.indptr[1:]]),
        np.concatenate([a.histories.items, b.histories.items]),
    )
    of_a = {name: np.concatenate([held, np.zeros(len(b.users), np.bool_)]) for name, held in a.groups.items()}
    of_b = {name: np.concatenate([np.zeros(len(a.users), np.bool_), held]) for name, held in b.groups.items()}
    users, choice = np.concatenate([a.users, b.users]), np.concatenate([a.candidates, b.candidates])
    return Questions(users, histories, choice, of_a | of_b)


def examples(division: Division, backbone: Backbone) -> Examples:
    """One a user: the last item of the training history, which the others come before."""
    train = division.split.train
    users = np.flatnonzero(train.lengths >= 2)
    whole = train.take(users)
    before, _ = whole.prefixes(np.arange(len(users)), whole.lengths - 1)
    return Examples(backbone.users(users, before), before, whole.items[whole.indptr[1:] - 1], whole)


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
    return data.take(rows)
