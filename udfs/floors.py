"""What any system must beat: random, popularity, and a text kNN without an LLM. Each is a Scorer of ranking_metrics."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from udfs.ranking_metrics import Ints, Scorer

# Numbers of dense profiles (users x terms) that exist at a time.
_DENSE = 8_000_000
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


def text_knn_scorer(rows: sparse.csr_array, history: sparse.csr_array, candidates: Ints) -> Scorer:
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
