"""udfs/splits.py: the rules of the papers' splits, and the counts of a real split."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from udfs.splits import PARTS, cold_users, leave_one_out, random_item

DATA = Path(os.environ.get("COLD_REFRESH_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pairs(users=120, items=200, n=1500, seed=5):
    rng = np.random.default_rng(seed)
    # Skewed, so that there are items with one pair and users with two.
    frame = pd.DataFrame(
        {"user_id": (users * rng.random(n) ** 2).astype(int), "item_id": (items * rng.random(n) ** 2).astype(int)}
    ).astype(str)
    return frame


def check_rules(split):
    """What every random-item split must satisfy."""
    part = {name: split[split["part"] == name] for name in PARTS}
    users, items = set(part["train"]["user_id"]), set(part["train"]["item_id"])
    cold = {name: set(part[name]["item_id"]) for name in ("cold_val", "cold_test")}
    assert not split.duplicated(["user_id", "item_id"]).any()
    assert all(set(rows["user_id"]) <= users for rows in part.values())
    assert set(part["warm_val"]["item_id"]) | set(part["warm_test"]["item_id"]) <= items
    assert not (cold["cold_val"] | cold["cold_test"]) & items
    assert not cold["cold_val"] & cold["cold_test"]
    assert abs(len(cold["cold_val"]) - len(cold["cold_test"])) <= 1


def test_random_item_follows_the_rules():
    given = pairs()
    split = random_item(given, seed=1)
    check_rules(split)
    distinct = given.drop_duplicates()
    warm_items = set(split.loc[~split["part"].str.startswith("cold"), "item_id"])
    assert len(warm_items) == int(0.8 * distinct["item_id"].nunique())
    warm = distinct[distinct["item_id"].isin(warm_items)]
    counts = split["part"].value_counts()
    assert counts["train"] + counts["warm_val"] + counts["warm_test"] == len(warm)
    # A tenth each, less the few that moved to train.
    moved = 2 * int(0.1 * len(warm)) - counts["warm_val"] - counts["warm_test"]
    assert 0 < moved < 0.05 * len(warm)
    dropped = distinct.merge(split, how="left")
    dropped = dropped[dropped["part"].isna()]
    assert not set(dropped["user_id"]) & set(split["user_id"])


def test_users_unknown_to_train_are_dropped():
    given = pd.concat(
        [pairs(), pd.DataFrame({"user_id": [f"new{i}" for i in range(50)], "item_id": [str(i) for i in range(50)]})]
    )
    split = random_item(given, seed=1)
    check_rules(split)
    lost = set(given["user_id"]) - set(split["user_id"])
    assert lost  # those whose only item is cold
    assert all(user.startswith("new") for user in lost)


def test_random_item_depends_on_the_seed_and_not_on_the_order_of_rows():
    given = pairs()
    split = random_item(given, seed=1)
    pd.testing.assert_frame_equal(split, random_item(given.sample(frac=1, random_state=2), seed=1))
    assert not split.equals(random_item(given, seed=2))


def test_a_real_split_has_the_counts_of_its_papers():
    path = DATA / "citeulike-a" / "split.parquet"
    if not path.exists():
        pytest.skip(f"no {path}: COLD_REFRESH_DATA names the folder of the benchmark data")
    given = pd.read_parquet(path)
    check_rules(given)
    assert given["part"].value_counts().to_dict() == {
        "train": 132_073, "cold_test": 20_158, "cold_val": 19_802, "warm_test": 16_482, "warm_val": 16_471,
    }  # fmt: skip
    ours = random_item(given, seed=7)
    check_rules(ours)
    items = ours.groupby("part")["item_id"].nunique()
    assert (items["cold_val"], items["cold_test"], items["train"]) == (1698, 1698, 13584)
    # The same shares of the same pairs; which item falls where is chance.
    shares = (ours["part"].value_counts() / given["part"].value_counts()).to_dict()
    assert all(0.9 < share < 1.1 for share in shares.values()), shares


def test_leave_one_out_takes_two_of_each_users_items():
    frame = pairs()
    split = leave_one_out(frame, 3)
    distinct = frame.drop_duplicates()
    assert len(split) == len(distinct)
    sizes = distinct.groupby("user_id").size()
    counts = split.groupby(["user_id", "part"]).size().unstack(fill_value=0)
    assert (counts.loc[sizes.index[sizes < 3], ["val", "test"]] == 0).all(axis=None)
    assert (counts.loc[sizes.index[sizes >= 3], ["val", "test"]] == 1).all(axis=None)
    shuffled = leave_one_out(frame.sample(frac=1, random_state=0), 3)
    pd.testing.assert_frame_equal(split, shuffled)
    assert not split.equals(leave_one_out(frame, 4))
    # Any of a user's items may be taken: over many seeds each about equally often.
    one = pd.DataFrame({"user_id": "u", "item_id": list("abcd")})
    taken = [leave_one_out(one, seed).set_index("part").loc["test", "item_id"] for seed in range(200)]
    assert min(taken.count(item) for item in "abcd") > 30


def test_cold_users_keep_one_interaction_or_half():
    split = leave_one_out(pairs(), 3)
    cold = cold_users(split, 3, share=0.2)
    tested = split.loc[split["part"] == "test", "user_id"].nunique()
    groups = cold.groupby("group")["user_id"].nunique()
    assert groups["single"] == groups["half"] == int(0.2 * tested)
    assert set(cold["part"]) == {"train", "val", "test", "removed"}
    before, after = (x[x["part"] == "train"].groupby("user_id").size() for x in (split, cold))
    group = cold.drop_duplicates("user_id").set_index("user_id")["group"]
    for name, expected in (("single", before * 0 + 1), ("half", np.ceil(before / 2)), ("rest", before)):
        users = group.index[group == name]
        assert (after[users] == expected[users]).all(), name
    # Nothing else is changed, and what is taken away can still be told from what a user never had.
    back = cold.assign(part=cold["part"].replace("removed", "train")).drop(columns="group")
    pd.testing.assert_frame_equal(back, split)
    pd.testing.assert_frame_equal(cold, cold_users(split, 3, share=0.2))
