"""Stage refresh: where each vector comes from, what stays bit for bit, who is left out."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs import allmrec_alignment, cf, cf_start, refresh, stranded
from jobs.run import OUTPUTS, Run, execute
from schemas.table import table as schema
from tests.staged_night import Pair, blocks, publish, refreshed, run_of, snapshot
from udfs.filterllm_items import held_out
from udfs.fold_in import fold_in, gram
from udfs.vectors import from_column

BPR = {"model": "bpr", "epochs": 30, "batch_size": 256, "learning_rate": 0.03}
DAY, NEXT = date(2026, 3, 1), date(2026, 3, 2)
SAMPLED = {
    "new-0": [("u0-0", 0.4), ("u0-1", 0.3), ("u0-2", 0.1)],
    "new-1": [("u1-5", 0.5), ("u1-4", 0.2), ("u2-0", 0.1)],
}


def _night(
    run: Run,
    pairs: dict[Pair, float],
    sampled: dict[str, list[tuple[str, float]]],
    cold: tuple[str, ...] = (),
    texts: dict[str, list[float]] | None = None,
) -> tuple[dict[str, Any], dict[str, pa.Table], cf.Space]:
    """Run cf and refresh on staged tables: facts, the output tables, and the night's space of stage cf."""
    facts, space = refreshed(run, pairs, sampled, cold, texts)
    tables = {name: run.staging("refresh").read(name) for name in OUTPUTS}
    for name, table in tables.items():
        assert table.schema == schema(name).arrow_schema, name
        assert facts["rows"][name] == table.num_rows
        assert table.num_rows == 0 or pc.unique(table["refresh_date"]).to_pylist() == [run.run_date]
        for column, value in (
            ("run_id", run.run_id),
            ("space_version", facts["space_version"]),
            ("model_version", "m1"),
        ):
            assert pc.all(pc.equal(table[column], value)).as_py() is not False
        key = [c for c in schema(name).key if c != "refresh_date"]
        assert list(zip(*(table[c].to_pylist() for c in key[:1]), strict=True)) == sorted(
            zip(*(table[c].to_pylist() for c in key[:1]), strict=True)
        )
    return facts, tables, space


def _by_id(table: pa.Table) -> dict[str, dict[str, Any]]:
    key = "item_id" if "item_id" in table.column_names else "user_id"
    vectors = from_column(table["embedding"])
    return {row[key]: {**row, "embedding": v} for row, v in zip(table.to_pylist(), vectors, strict=True)}


def _reference(
    space: cf.Space, shares: dict[str, float], *, side: str = "users", others: Any = None, weights: Any = None
) -> np.ndarray:
    """The closed form on the space's vectors (and on `others`: id -> vector), with the Gram matrix of the space alone."""
    ids, matrix = (space.user_ids, space.users) if side == "users" else (space.item_ids, space.items)
    vectors = {**dict(zip(ids, matrix, strict=True)), **(others or {})}
    return fold_in(
        np.stack([vectors[name] for name in shares]),
        np.array([0, len(shares)]),
        np.arange(len(shares)),
        np.ones(len(shares)) if weights is None else np.array(weights),
        shares=np.array(list(shares.values())),
        alpha=space.facts["alpha"],
        regularization=space.facts["regularization"],
        scale=space.facts["item_scale" if side == "users" else "user_scale"],
        gram_of_all=gram(matrix),
    )[0]


@pytest.mark.parametrize("by_probability", [True, False])
def test_cold_items_are_folded_in_and_the_space_stays_bit_for_bit(by_probability: bool, tmp_path: Path) -> None:
    settings = {"by_probability": by_probability, "scale": 3.0}  # of vectors without any real pair, such as new-1's
    run = run_of(tmp_path, DAY, cf=BPR, refresh=settings, snapshot={"warm_interactions": 2})
    pairs = {**blocks(), ("u0-1", "new-0"): 3.0, ("u0-7", "new-0"): 1.0}  # a cold item with two real pairs
    facts, tables, space = _night(run, pairs, SAMPLED, cold=("new-0", "new-1"))
    items, users = _by_id(tables["item_embeddings"]), _by_id(tables["user_embeddings"])

    assert facts["sources"] == {"cf": 18, "sampled": 2}
    assert facts["space_version"] == space.version
    for name, vector, count in zip(space.item_ids, space.items, space.interactions, strict=True):
        assert items[name]["embedding"].tobytes() == vector.tobytes()
        assert (items[name]["source"], items[name]["interactions"]) == ("cf", count)
    for name, vector in zip(space.user_ids, space.users, strict=True):
        assert users[name]["embedding"].tobytes() == vector.tobytes()
    assert list(items) == sorted([*space.item_ids, "new-0", "new-1"])
    # The sampled users count as 15 interactions together (the setting's default); united with real ones, which count 1 each.
    shares = [15 * 0.4 / 0.8, 15 * 0.3 / 0.8, 15 * 0.1 / 0.8] if by_probability else [1.0, 1.0, 1.0]
    expected = _reference(space, {"u0-0": shares[0], "u0-1": 1.0, "u0-2": shares[2], "u0-7": 1.0})
    np.testing.assert_allclose(items["new-0"]["embedding"], expected, rtol=1e-5)
    assert (items["new-0"]["source"], items["new-0"]["interactions"]) == ("sampled", 2)
    assert (items["new-1"]["source"], items["new-1"]["interactions"]) == ("sampled", 0)
    assert items["new-1"]["updated_at"] == datetime(2026, 3, 1, tzinfo=UTC)
    best = max(space.item_ids, key=lambda i: float(items[i]["embedding"] @ items["new-0"]["embedding"]))
    assert best.startswith("i0")
    kept = tables["sampled_interactions"].select(["item_id", "user_id", "rank", "probability", "propensity"])
    assert kept.equals(run.staging("filterllm_score").read("sampled").cast(kept.schema))


@pytest.mark.parametrize("held", [12, 9])
def test_lengths_are_measured_on_items_that_training_left_out(held: int, tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY)
    names = sorted({item for _, item in blocks()})[:held]
    told = {name: [(f"u{name[1]}-{k}", p) for k, p in ((0, 0.4), (1, 0.1))] for name in names}
    facts, space = refreshed(run, blocks(), {**SAMPLED, **told}, ("new-0", "new-1"), held_out=tuple(names))
    items = _by_id(run.staging("refresh").read("item_embeddings"))

    def folded(users: list[tuple[str, float]]) -> np.ndarray:
        whole = sum(p for _, p in users)
        return _reference(space, {user: 15 * p / whole for user, p in users})

    trained = [np.linalg.norm(space.items[space.item_ids.index(name)]) for name in names]
    expected = np.median(trained) / np.median([np.linalg.norm(folded(told[name])) for name in names])
    assert facts["scale"] == pytest.approx(expected if held >= 10 else 1.0, rel=1e-5)
    assert abs(expected - 1) > 0.05
    np.testing.assert_allclose(items["new-1"]["embedding"], facts["scale"] * folded(SAMPLED["new-1"]), rtol=1e-4)
    assert facts["sources"] == {"cf": 18, "sampled": 2}
    assert run.staging("refresh").read("sampled_interactions")["item_id"].unique().to_pylist() == ["new-0", "new-1"]


@pytest.mark.parametrize("way", ["sampled", "llminit"])
def test_a_cold_item_s_start_is_what_is_left_or_the_way(way: str, tmp_path: Path) -> None:
    pairs = {**blocks(), ("u0-1", "new-0"): 1.0}
    cold = ("new-0", "new-1", "no-text")
    # A text says whose item it is.
    texts = {item: np.eye(5)[int(item[1])].tolist() for item in sorted({i for _, i in blocks()})}
    texts |= {"new-0": np.eye(5)[0].tolist(), "new-1": np.eye(5)[1].tolist()}
    began = {**BPR, "init": "llminit", "llminit": {"select": "pca", "scale": "raw"}}
    run = run_of(tmp_path, DAY, cf=began, refresh={"cold": way}, snapshot={"warm_interactions": 2})
    sampled = {"new-0": SAMPLED["new-0"]}
    facts, tables, space = _night(run, pairs, sampled, cold, texts)
    items, users = _by_id(tables["item_embeddings"]), _by_id(tables["user_embeddings"])
    assert facts["sources"] == (
        {"cf": 18, "llminit": 1, "sampled": 1} if way == "sampled" else {"cf": 18, "llminit": 2}
    )
    assert facts["items_left_out"] == 1
    assert (items["new-1"]["source"], items["new-1"]["interactions"]) == ("llminit", 0)
    shas = ["sha-new-0", "sha-new-1"]
    starts = cf_start.vectors(run, space.version, space.facts, shas)
    np.testing.assert_array_equal(items["new-1"]["embedding"], starts[1])
    if way == "llminit":
        np.testing.assert_array_equal(items["new-0"]["embedding"], starts[0])
    best = sorted(users, key=lambda u: -float(users[u]["embedding"] @ items["new-1"]["embedding"]))[:5]
    assert all(user.startswith("u1") for user in best)
    assert tables["sampled_interactions"].num_rows == 3


def test_an_item_that_cooled_down_and_has_no_text_keeps_its_vector(tmp_path: Path) -> None:
    began = {**BPR, "init": "llminit", "llminit": {"select": "pca", "scale": "raw"}}
    texts = {item: np.eye(5)[int(item[1])].tolist() for item in sorted({i for _, i in blocks()} - {"i0-0"})}
    snapshot(first := run_of(tmp_path, DAY, cf=began), blocks(), texts=texts)
    execute(first, "cf", cf.run)
    run = run_of(tmp_path, NEXT, 2, cf=began, refresh={"cold": "llminit"})
    facts, tables, _ = _night(run, blocks(), {}, cold=("i0-0", "i0-1"), texts=texts)
    items = _by_id(tables["item_embeddings"])
    assert (items["i0-0"]["source"], items["i0-1"]["source"], facts["items_left_out"]) == ("cf", "llminit", 0)


ALIGNED = {"alignment": {"epochs": 40, "patience": 40, "learning_rate": 1e-2, "stop_by": "loss"}}


def test_a_cold_item_is_where_its_text_is_decoded_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {**blocks(), ("u0-1", "new-0"): 1.0}
    texts = {item: np.eye(5)[int(item[1])].tolist() for item in sorted({i for _, i in blocks()})}
    texts |= {"new-0": np.eye(5)[0].tolist(), "new-1": np.eye(5)[1].tolist()}
    settings: dict[str, Any] = {"cf": BPR, "refresh": {"cold": "allmrec"}, "allmrec": ALIGNED}
    settings |= {"snapshot": {"warm_interactions": 2}}
    cold, sampled = ("new-0", "new-1", "no-text"), {"new-0": SAMPLED["new-0"]}
    run = run_of(tmp_path, DAY, **settings)
    facts, tables, space = _night(run, pairs, sampled, cold, texts)
    items, users = _by_id(tables["item_embeddings"]), _by_id(tables["user_embeddings"])
    assert (facts["sources"], facts["items_left_out"]) == ({"cf": 18, "allmrec": 2}, 1)
    version = facts["alignment_version"]
    decoded = allmrec_alignment.vectors(run, version, ["sha-new-0", "sha-new-1"])
    for at, name in enumerate(("new-0", "new-1")):
        np.testing.assert_array_equal(items[name]["embedding"], decoded[at])
        assert (items[name]["source"], items[name]["interactions"]) == ("allmrec", 0)
        best = sorted(users, key=lambda u: -float(users[u]["embedding"] @ items[name]["embedding"]))[:5]
        assert all(user.startswith(f"u{at}") for user in best)
    artifact = run.artifact("alignments", version)
    assert artifact.facts()["cf_version"] == space.version
    assert artifact.facts()["best_epoch"] > 4
    assert not run.artifact("checkpoints", version).children()
    assert tables["sampled_interactions"].num_rows == 3

    # The next night keeps the space and takes the alignment that is there.
    following = run_of(tmp_path, NEXT, 2, **settings)
    assert _night(following, pairs, sampled, cold, texts)[0]["alignment_version"] == version
    # Killed while it trained: another run of it goes on, and ends with the same bytes.
    files = artifact.read_bytes("model.safetensors")
    artifact.clear()
    train, epochs = allmrec_alignment.allmrec_alignment_training.train, []

    def killed(*arguments: Any, **options: Any) -> Any:
        def log(line: str) -> None:
            epochs.append(line)
            if line.startswith("epoch 4/"):
                raise KeyboardInterrupt

        return train(*arguments[:6], log, **options)

    monkeypatch.setattr(allmrec_alignment.allmrec_alignment_training, "train", killed)
    run.staging("refresh").clear()
    with pytest.raises(KeyboardInterrupt):
        execute(run, "refresh", refresh.run)
    assert not artifact.is_complete()
    monkeypatch.undo()
    assert execute(run, "refresh", refresh.run)["alignment_version"] == version
    assert artifact.read_bytes("model.safetensors") == files
    assert len(epochs) == 2 * 4


def test_a_decoded_text_is_as_long_as_cf_makes_items(tmp_path: Path) -> None:
    texts = {item: np.eye(5)[int(item[1])].tolist() for item in sorted({i for _, i in blocks()})} | {"new-0": [1.0] * 5}
    aligned = {"alignment": {**ALIGNED["alignment"], "validation_share": 0.6}}
    run = run_of(tmp_path, DAY, cf=BPR, refresh={"cold": "allmrec"}, allmrec=aligned)
    facts, tables, space = _night(run, blocks(), {}, ("new-0",), texts)
    version = facts["alignment_version"]
    names = [name for name, out in zip(space.item_ids, held_out(space.item_ids, 0.6, 7), strict=True) if out]
    assert len(names) >= 10
    trained = np.median(np.linalg.norm(space.items[[space.item_ids.index(name) for name in names]], axis=1))
    decoded = np.linalg.norm(allmrec_alignment.vectors(run, version, [f"sha-{name}" for name in names]), axis=1)
    assert np.median(decoded) == pytest.approx(trained, rel=1e-5)
    assert run.artifact("alignments", version).facts()["length"] != pytest.approx(1.0, rel=1e-2)
    (mine,) = allmrec_alignment.vectors(run, version, ["sha-new-0"])
    np.testing.assert_array_equal(_by_id(tables["item_embeddings"])["new-0"]["embedding"], mine)


def test_refresh_users_cuts_what_is_used_not_what_is_published(tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY, cf=BPR, refresh={"users": 1, "scale": 1.5})
    _, tables, space = _night(run, blocks(), SAMPLED, cold=("new-0", "new-1"))
    assert tables["sampled_interactions"].num_rows == 6
    items = _by_id(tables["item_embeddings"])
    np.testing.assert_allclose(items["new-1"]["embedding"], 1.5 * _reference(space, {"u1-5": 15.0}), rtol=1e-5)


def test_the_next_night(tmp_path: Path) -> None:
    first = run_of(tmp_path, DAY, cf=BPR)
    _night(first, blocks(), SAMPLED, cold=("new-0", "new-1"))
    publish(first)
    published = _by_id(first.lake.read("item_embeddings"))

    pairs = {pair: w for pair, w in blocks().items() if pair[0] != "u2-7"}  # a user is deleted
    newcomer = {("zed", "i1-0"): 1.0, ("zed", "i1-3"): 1.0}  # a new user of known items
    warm = {("u0-0", "new-0"): 2.0, ("u0-4", "new-0"): 1.0}  # cold yesterday
    fresh = {("u1-1", "fresh"): 1.0, ("zed", "fresh"): 5.0}  # never seen before; a new user among its users
    lost = {("alone", "unknown"): 1.0}  # a new user of a new item: nothing ties them to the space
    pairs = {**pairs, **newcomer, **warm, **fresh, **lost}
    second = run_of(tmp_path, NEXT, 2, cf=BPR)
    sampled = {"new-1": [("u2-7", 0.5), ("u1-4", 0.2), ("u1-5", 0.1)]}
    facts, tables, space = _night(second, pairs, sampled, cold=("new-1",))
    items, users = _by_id(tables["item_embeddings"]), _by_id(tables["user_embeddings"])

    assert facts["sources"] == {"carried_over": 1, "cf": 19, "sampled": 1}
    assert (facts["users_folded_in"], facts["users_left_out"], facts["items_left_out"]) == (1, 1, 1)
    assert facts["sampled_dropped"] == 1
    assert items["i0-0"]["embedding"].tobytes() == published["i0-0"]["embedding"].tobytes()
    assert items["i0-0"]["updated_at"] == datetime(2026, 3, 1, tzinfo=UTC)  # when the space was trained
    carried = items["new-0"]
    assert (carried["source"], carried["embedding"].tobytes()) == (
        "carried_over",
        published["new-0"]["embedding"].tobytes(),
    )
    assert (carried["updated_at"], carried["interactions"]) == (datetime(2026, 3, 1, tzinfo=UTC), 0)
    zed = _reference(space, {"i1-0": 1.0, "i1-3": 1.0}, side="items")
    np.testing.assert_allclose(users["zed"]["embedding"], zed, rtol=1e-5)
    expected = _reference(space, {"u1-1": 1.0, "zed": 1.0}, others={"zed": users["zed"]["embedding"]})
    np.testing.assert_allclose(items["fresh"]["embedding"], expected, rtol=1e-5)
    assert (items["fresh"]["source"], items["fresh"]["interactions"]) == ("cf", 2)
    assert items["fresh"]["updated_at"] == datetime(2026, 3, 2, tzinfo=UTC)
    assert not {"unknown"} & set(items)
    assert not {"u2-7", "alone"} & set(users)
    left_out = second.staging("refresh").read("rejected_rows").to_pylist()
    assert {(r["table"], r["key"], r["reason"], r["detail"], r["rows"]) for r in left_out} == {
        ("user_embeddings", "alone", "no_vector", "no item of the user's has a vector in the space", 1),
        ("item_embeddings", "unknown", "no_vector", "no user of the item's has a vector", 1),
    }
    # The deleted user is neither published nor used; those who are left share what an item's users count together.
    assert tables["sampled_interactions"]["user_id"].to_pylist() == ["u1-4", "u1-5"]
    np.testing.assert_allclose(items["new-1"]["embedding"], _reference(space, {"u1-4": 10.0, "u1-5": 5.0}), rtol=1e-5)


def test_an_item_that_only_strangers_have_is_read_as_a_cold_one(tmp_path: Path) -> None:
    first, pairs = run_of(tmp_path, DAY, cf=BPR), blocks()
    _night(first, pairs, {})
    new = {("stranger", "fresh"): 1.0, ("stranger", "bare"): 1.0, ("new", "i0-0"): 1.0, ("new", "reached"): 1.0}
    texts = {item: [1.0, 0.0] for item in ("fresh", "reached", "i0-0")}
    run = run_of(tmp_path, NEXT, cf=BPR)
    sampled = {"fresh": [("u0-0", 0.5), ("u0-1", 0.25)]}
    facts, tables, _ = _night(run, {**pairs, **new}, sampled, texts=texts)
    assert stranded.items(run).to_pylist() == ["fresh"]
    found = _by_id(tables["item_embeddings"])
    assert {name: found[name]["source"] for name in ("fresh", "reached", "i0-0")} == {
        "fresh": "sampled", "reached": "cf", "i0-0": "cf"
    }  # fmt: skip
    assert facts["items_left_out"] == 1  # without a text nothing can be said of it
    publish(run)
    # The next night its vector stays, and it is still one of those that are read.
    later = run_of(tmp_path, date(2026, 3, 3), cf=BPR)
    _, tables, _ = _night(later, {**pairs, **new}, sampled, texts=texts)
    assert stranded.items(later).to_pylist() == ["fresh"]
    again = _by_id(tables["item_embeddings"])["fresh"]
    assert again["source"] == "carried_over"
    np.testing.assert_array_equal(again["embedding"], found["fresh"]["embedding"])


def test_nothing_is_carried_over_from_another_space_or_a_later_night(tmp_path: Path) -> None:
    later = run_of(tmp_path, date(2026, 3, 5), 1, cf=BPR)
    _night(later, blocks(), SAMPLED, cold=("new-0", "new-1"))
    publish(later)
    earlier = run_of(tmp_path, date(2026, 2, 1), 2, cf={**BPR, "weight_decay": 0.01})
    _night(earlier, blocks(), SAMPLED, cold=("new-0", "new-1"))
    publish(earlier)
    run = run_of(tmp_path, DAY, 3, cf=BPR)
    snapshot(run, blocks())
    execute(run, "cf", cf.run)  # the space of this night does not know new-0, which has become warm since
    run.staging("snapshot").clear()
    facts, tables, space = _night(run, {**blocks(), ("u0-0", "new-0"): 2.0}, {})
    items = _by_id(tables["item_embeddings"])
    assert facts["sources"] == {"cf": 19}
    np.testing.assert_allclose(items["new-0"]["embedding"], _reference(space, {"u0-0": 1.0}), rtol=1e-5)
    assert tables["sampled_interactions"].num_rows == 0
    assert tables["sampled_interactions"].schema == schema("sampled_interactions").arrow_schema


def test_weights_of_real_pairs_are_the_space_s(tmp_path: Path) -> None:
    settings = {**BPR, "binary": False}
    snapshot(first := run_of(tmp_path, DAY, cf=settings), blocks())
    execute(first, "cf", cf.run)
    run = run_of(tmp_path, NEXT, 2, cf=settings)
    _, tables, space = _night(run, {**blocks(), ("u0-0", "new-0"): 5.0, ("u0-1", "new-0"): 1.0}, {})
    expected = _reference(space, {"u0-0": 1.0, "u0-1": 1.0}, weights=[np.log1p(5.0), np.log1p(1.0)])
    np.testing.assert_allclose(_by_id(tables["item_embeddings"])["new-0"]["embedding"], expected, rtol=1e-5)


def test_again_it_leaves_the_same_bytes(tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY, cf=BPR)
    _night(run, blocks(), SAMPLED, cold=("new-0", "new-1"))
    files = [json.loads(run.staging("refresh").read_bytes("manifest.json"))["files"]]
    run.staging("refresh").clear()
    execute(run, "refresh", refresh.run)
    files.append(json.loads(run.staging("refresh").read_bytes("manifest.json"))["files"])
    assert files[0] == files[1]


def test_vectors_that_are_not_finite_are_not_staged(tmp_path: Path) -> None:
    run = run_of(tmp_path, DAY, cf=BPR)
    snapshot(run, blocks())
    version = execute(run, "cf", cf.run)["space_version"]
    artifact = run.artifact("spaces", version)
    facts, users = artifact.facts(), artifact.read("users")
    broken = from_column(users["embedding"]).copy()
    broken[3, 1] = np.nan
    artifact.write("users", users.set_column(1, "embedding", refresh.to_column(broken)))
    artifact.complete(facts)
    run.staging("snapshot").clear()
    with pytest.raises(refresh.RefreshError, match=f"vectors of space {version} are not finite"):
        _night(run, blocks(), {})
