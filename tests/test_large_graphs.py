"""Spaces of more users and pairs than tests have: what is done in pieces, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from jobs import cf
from udfs import lightgcn
from udfs.cf_inputs import CfError


def test_a_graph_that_32_bits_cannot_number_is_refused_before_it_is_built() -> None:
    # As many pairs as it takes, without their memory.
    ids = np.broadcast_to(np.int64(0), 1 << 30)
    with pytest.raises(CfError, match=r"graph of 1073741824 pairs .* set cf\.model to als, als_cg or bpr"):
        lightgcn.normalized_adjacency(ids, ids, 1, 1)


def test_a_space_is_aligned_piece_by_piece_over_what_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(n, 3)).astype(np.float32) for n in (9, 5))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32)
    old_users = [*(f"u{n}" for n in (8, 3, 2, 7, 0)), "gone"]
    old = np.concatenate([users[[8, 3, 2, 7, 0]] @ turn, np.full((1, 3), 9, np.float32)])
    earlier = cf.Space("s0", old_users, old, ["i4", "i1"], items[[4, 1]] @ turn, {})
    monkeypatch.setattr(cf, "_PIECE", 2)
    seen, align = [], cf.procrustes.align

    def counted(pieces):
        return align((seen.append(len(new)) or new, old) for new, old in pieces)

    monkeypatch.setattr(cf.procrustes, "align", counted)
    ids = [pa.chunked_array([[f"{kind}{n}" for n in range(len(of))]]) for kind, of in (("u", users), ("i", items))]
    rotation, residual = cf._alignment(ids[0], users, ids[1], items, earlier)
    np.testing.assert_allclose(rotation, turn, atol=1e-5)
    assert residual < 1e-6
    assert seen == [2, 2, 1, 2]
    nothing = cf.Space("s0", ["a"], old[:1], ["b"], old[:1], {})
    assert cf._alignment(ids[0], users, ids[1], items, nothing)[1] is None
