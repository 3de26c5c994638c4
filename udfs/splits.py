"""How interactions are divided into training and test pairs: the papers' `random-item` split, and the leave-one-out split
of LLMInit with its cold users.

Parts of the first are named as in schemas/split.yaml: train, warm_val, warm_test, cold_val, cold_test.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

PARTS = ("train", "warm_val", "warm_test", "cold_val", "cold_test")
_WARM_SHARE, _HELD_OUT_SHARE = 0.8, 0.1  # of items; of the warm ones' pairs, twice


def random_item(pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The split of ALDI, ColdLLM, USIM, ColdRec and FilterLLM (arXiv 2502.16924), with a seed of our own.

    Of the shuffled items the first 80 % are warm. Their pairs are shuffled and 10 % of them become warm_val, as many
    warm_test, the rest train; a held-out pair whose user or item is not in train moves there. Pairs of cold items with users
    who are not in train are dropped, and the cold items that are left are cut into halves.

    Args:
        pairs: columns user_id, item_id; duplicates count once. The order of rows does not matter.

    Returns:
        user_id, item_id, part; sorted by user and item.
    """
    pairs = pairs[["user_id", "item_id"]].drop_duplicates().sort_values(["user_id", "item_id"], ignore_index=True)
    generator = np.random.Generator(np.random.Philox(seed))
    items = generator.permutation(np.sort(pairs["item_id"].unique()))
    warm_items = items[: int(_WARM_SHARE * len(items))]
    is_warm = pairs["item_id"].isin(warm_items).to_numpy()
    part = np.full(len(pairs), "", dtype=object)

    warm = generator.permutation(np.flatnonzero(is_warm))
    held_out = int(_HELD_OUT_SHARE * len(warm))
    part[warm] = "train"
    part[warm[:held_out]] = "warm_val"
    part[warm[held_out : 2 * held_out]] = "warm_test"
    train = pairs[part == "train"]
    unseen = ~(pairs["user_id"].isin(train["user_id"]) & pairs["item_id"].isin(train["item_id"])).to_numpy()
    part[is_warm & unseen] = "train"

    known = pairs["user_id"].isin(pairs.loc[part == "train", "user_id"]).to_numpy()
    cold = ~is_warm & known
    left = set(pairs.loc[cold, "item_id"])
    cold_items = [item for item in items[len(warm_items) :] if item in left]
    in_first_half = pairs["item_id"].isin(cold_items[: len(cold_items) // 2]).to_numpy()
    part[cold] = np.where(in_first_half[cold], "cold_val", "cold_test")
    return pairs.assign(part=part)[part != ""].reset_index(drop=True)


def leave_one_out(pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The split of LLMInit (arXiv 2503.01814): of each user's items in random order one becomes `val`, one `test`.

    Users with fewer than three items stay in `train` as they are.

    Args:
        pairs: columns user_id, item_id; duplicates count once. The order of rows does not matter.

    Returns:
        user_id, item_id, part; sorted by user and item.
    """
    pairs = pairs[["user_id", "item_id"]].drop_duplicates().sort_values(["user_id", "item_id"], ignore_index=True)
    drawn = pd.Series(np.random.Generator(np.random.Philox(seed)).random(len(pairs)))
    place = drawn.groupby(pairs["user_id"]).rank(method="first").to_numpy()
    enough = pairs.groupby("user_id")["item_id"].transform("size").to_numpy() >= 3
    part = np.select([enough & (place == 1), enough & (place == 2)], ["val", "test"], "train")
    return pairs.assign(part=part)


def cold_users(split: pd.DataFrame, seed: int, share: float = 0.1) -> pd.DataFrame:
    """Make some users of a `leave_one_out` split cold: two groups of `share` of its users each, drawn apart.

    Users of the group `single` keep one training pair, users of `half` keep half of theirs, rounded up; which ones is random.

    Returns:
        `split` with a column `group`: single, half or rest; the training pairs that are taken away have the part `removed`.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    tested = np.sort(split.loc[split["part"] == "test", "user_id"].unique())
    users, count = generator.permutation(tested), int(share * len(tested))
    group = np.full(len(split), "rest", dtype=object)
    for name, members in (("single", users[:count]), ("half", users[count : 2 * count])):
        group[split["user_id"].isin(members)] = name
    split = split.assign(group=group)
    training = split[split["part"] == "train"]
    drawn = pd.Series(generator.random(len(training)), index=training.index)
    place = drawn.groupby(training["user_id"]).rank(method="first")
    size = training.groupby("user_id")["item_id"].transform("size")
    keep = np.select([training["group"] == "single", training["group"] == "half"], [1, np.ceil(size / 2)], np.inf)
    split.loc[training.index[place > keep], "part"] = "removed"
    return split
