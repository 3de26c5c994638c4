"""What any system must beat: random, popularity, and texts without an LLM, by their words. Each is a Scorer of ranking_metrics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from udfs.ranking_metrics import Ints, Scorer

# Numbers of dense profiles (users x terms) that exist at a time.
_DENSE = 8_000_000
# Cosines (texts x items) that exist at a time.
_COSINES = 4_000_000
#: Neighbours of an item in the text kNN, and the power to which their cosines are raised: of 10, 20, 50, 100 and 200, and of 1
#: and 2, those with the best NDCG@20 of cold items in the validation parts of CiteULike, Beauty and Games (the mean of what they
#: reach of each one's best). In all three, weights divided by the root of their sum did better than as they are or by the sum.
NEIGHBOURS, POWER = 200, 1
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def id_hashes(ids: Sequence[str], seed: int) -> NDArray[np.uint64]:
    """[n] uint64: a hash of (seed, id), the same whatever else is in `ids`."""
    key = seed.to_bytes(8, "little")
    digests = b"".join(blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for i in ids)
    return np.frombuffer(digests, np.uint64)


def random_scorer(user_hashes: NDArray[np.uint64], item_hashes: NDArray[np.uint64], candidates: Ints) -> Scorer:
    """Uniform scores in [0, 1), each a function of the hashes (`id_hashes`) of its user [U] and item [I] alone."""
    items = item_hashes[candidates]

    def scores(users: Ints) -> NDArray[np.float32]:
        # The finaliser of SplitMix64 (Steele et al. 2014) over the two hashes.
        bits = user_hashes[users][:, None] ^ items[None, :]
        for shift, factor in zip((np.uint64(30), np.uint64(27)), _MIX, strict=True):
            bits ^= bits >> shift
            bits *= factor
        bits ^= bits >> np.uint64(31)
        return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)

    return scores


def popularity_scorer(interactions: NDArray[np.int64], candidates: Ints) -> Scorer:
    """An item's training interactions [I], for every user. Items without any tie, in the task's order of candidates."""
    row = interactions[candidates].astype(np.float32)
    return lambda users: np.broadcast_to(row, (len(users), len(row)))


def text_neighbours(rows: sparse.csr_array, known: Ints) -> sparse.csr_array:
    """[I, I] float32: what each item's NEIGHBOURS nearest items of `known` weigh for it, by the cosine of their words.

    Item kNN (Sarwar et al. 2001) on texts in place of interactions, so that cold items have neighbours too. One weighs
    cosine ** POWER, divided by the root of the sum over the item's neighbours: halfway from the cosines as they are, by which
    an item in a crowd of like texts is above all others, to an average (as in Deshpande and Karypis 2004). An item is no
    neighbour of its own, nor is one that shares no word with it.

    Args:
        rows: [I, terms] float32, as udfs.tfidf gives them.
        known: [n] items with training pairs; of those with equal cosines the first in this order are taken.
    """
    text, distinct = _distinct(rows)
    held, at = np.unique(text[known], return_inverse=True)
    # Catalogs repeat their texts: a text is compared once, for all of its items.
    items, places = _Members(text, distinct.shape[0]), _Members(at, len(held))
    columns = sparse.csr_array(distinct[held].T)
    step = max(1, _COSINES // max(1, len(known)))
    parts = [sparse.csr_array((0, len(text)), dtype=np.float32)]
    for start in range(0, distinct.shape[0], step):
        # One more than NEIGHBOURS, since an item may be among those that are nearest to its own text.
        cosines = sparse.csr_array(distinct[start : start + step] @ columns)
        of, texts, cosines = _largest(cosines, places.n, NEIGHBOURS + 1)
        cell, place = places.of(texts)
        of, cosines = of[cell], cosines[cell]
        best = np.lexsort((place, -cosines, of))
        best = best[_is_among_first(of[best], NEIGHBOURS + 1)]
        of, near, cosines = of[best], known[place[best]], cosines[best]
        numbers = np.arange(start, min(start + step, distinct.shape[0]))
        owner, item = items.of(numbers)
        row, entry = _Members(of, len(numbers)).of(owner)
        other = near[entry] != item[row]
        row, entry = row[other], entry[other]
        kept = _is_among_first(row, NEIGHBOURS)
        row, entry = row[kept], entry[kept]
        weights = cosines[entry] ** POWER
        weights /= np.sqrt(np.bincount(row, weights, minlength=len(item)))[row].astype(np.float32)
        ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(item)))])
        parts.append(sparse.csr_array((weights, near[entry], ends), shape=(len(item), len(text))))
    return sparse.csr_array(sparse.vstack(parts, format="csr")[np.argsort(items.order)])


class _Members:
    """What is in which of `groups` groups: `group` [n] holds the number of each one's."""

    def __init__(self, group: Ints, groups: int) -> None:
        self.order = np.argsort(group, kind="stable")
        self.n = np.bincount(group, minlength=groups)
        self.first = np.cumsum(self.n) - self.n

    def of(self, asked: Ints) -> tuple[Ints, Ints]:
        """Where in `asked` its group is, and the member itself: of all members of the groups `asked`, one group after the other."""
        n = self.n[asked]
        place = np.repeat(np.arange(len(asked)), n)
        return place, self.order[np.arange(len(place)) + (self.first[asked] - np.cumsum(n) + n)[place]]


def _is_among_first(owner: Ints, k: int) -> NDArray[np.bool_]:
    """Which of some entries, sorted by their owner, are among the first k of it."""
    n = np.bincount(owner)
    return np.asarray(np.arange(len(owner)) - (np.cumsum(n) - n)[owner] < k)


def _distinct(rows: sparse.csr_array) -> tuple[Ints, sparse.csr_array]:
    """The number [I] of each row among the distinct rows, and these."""
    seen: dict[tuple[bytes, bytes], int] = {}
    numbers = np.empty(rows.shape[0], np.int64)
    for row, (start, stop) in enumerate(itertools.pairwise(rows.indptr)):
        key = rows.indices[start:stop].tobytes(), rows.data[start:stop].tobytes()
        numbers[row] = seen.setdefault(key, len(seen))
    return numbers, sparse.csr_array(rows[np.unique(numbers, return_index=True)[1]])


def _largest(cosines: sparse.csr_array, sizes: Ints, k: int) -> tuple[Ints, Ints, NDArray[np.float32]]:
    """Rows, columns and values: of each row the largest whose columns' `sizes` come to k, and all that equal the least of them."""
    keep = np.ones(cosines.nnz, np.bool_)
    for start, stop in itertools.pairwise(cosines.indptr):
        if stop - start > k:
            values = cosines.data[start:stop]
            keep[start:stop] = values >= np.partition(values, stop - start - k)[stop - start - k]
    rows = np.repeat(np.arange(cosines.shape[0]), np.diff(cosines.indptr))[keep]
    columns, values = cosines.indices[keep], cosines.data[keep]
    order = np.lexsort((-values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    # What lies before the row, and before the equals of a value: neither ever falls.
    before = np.cumsum(sizes[columns]) - sizes[columns]
    begins = np.diff(rows, prepend=-1) != 0
    of_row = np.maximum.accumulate(np.where(begins, before, 0))
    of_equals = np.maximum.accumulate(np.where(begins | (np.diff(values, prepend=-1) != 0), before, 0))
    short = of_equals - of_row < k
    return rows[short], columns[short], values[short]


def text_knn_scorer(neighbours: sparse.csr_array, history: sparse.csr_array, candidates: Ints) -> Scorer:
    """The sum, over a candidate's neighbours that are in the user's history, of what they weigh; 0 without any.

    Args:
        neighbours: [I, I] float32, of text_neighbours.
        history: [U, I] of bool, the training pairs.
    """
    weights = sparse.csr_array(neighbours[candidates].T)
    return lambda users: np.asarray((history[users].astype(np.float32) @ weights).toarray(), np.float32)


def text_profile_scorer(rows: sparse.csr_array, history: sparse.csr_array, candidates: Ints) -> Scorer:
    """Cosine of a candidate's text to the user's profile, the mean of its training items' texts.

    Args:
        rows: [I, terms] float32, as udfs.tfidf gives them.
        history: [U, I] of bool, the training pairs.
    """
    texts = sparse.csr_array(rows[candidates])
    step = max(1, _DENSE // max(1, rows.shape[1]))

    def some(users: Ints) -> NDArray[np.float32]:
        profiles = sparse.csr_array(history[users].astype(np.float32) @ rows).toarray()
        norms = np.linalg.norm(profiles, axis=1, keepdims=True)
        profiles /= np.where(norms > 0, norms, 1)
        # Sparse texts by dense profiles: the cost does not depend on how common the words are.
        return np.ascontiguousarray((texts @ profiles.T).T, np.float32)

    def scores(users: Ints) -> NDArray[np.float32]:
        parts = [some(users[start : start + step]) for start in range(0, len(users), step)]
        return np.concatenate([np.zeros((0, len(candidates)), np.float32), *parts])

    return scores
