"""Whom jobs/recommend.py can serve, what it weighs the reader by, and its gate: each rule, broken alone, is named."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import (
    allmrec_alignment,
    allmrec_backbone,
    allmrec_night,
    allmrec_reader,
    cf,
    item_index,
    recommend,
    recommend_users,
    recommend_weights,
)
from jobs.allmrec_night import Night
from jobs.expectations import evaluate
from jobs.recommend import Request
from jobs.recommend_users import Users
from jobs.run import Run
from schemas.table import table as schema
from tests import recommended_night, staged_night
from tests.gated_night import again, where, without
from tests.recommended_night import DAY, PAIRS
from udfs.vectors import from_column

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Night, allmrec_backbone.SpaceSide]:
    """A published night, and its users and items by the published vectors."""
    folder = tmp_path_factory.mktemp("recommend")
    run = recommended_night.night(folder / "lake", recommended_night.language_model(folder))
    night, of = allmrec_night.read(run.staging("snapshot")), {}
    for name in ("user", "item"):
        rows = run.staging("refresh").read(f"{name}_embeddings")
        of[f"{name}s"] = rows[f"{name}_id"].to_pylist(), from_column(rows["embedding"])
    space = cf.load_space(run, run.staging("refresh").facts()["space_version"])
    return run, night, allmrec_backbone.SpaceSide(night, space, of)


def test_without_a_history_or_a_candidate_a_user_is_rejected_with_the_reason(published: Any) -> None:
    run, night, side = published
    rows = run.staging("refresh").read("user_embeddings")
    vectors = rows["user_id"].to_pylist(), from_column(rows["embedding"])
    nearest = recommend_users.Nearest(item_index.load(run.lake, run.run_id), night)
    own = np.isin(night.item_ids.to_pylist(), [item for user, item in PAIRS if user == "u0-0"])

    def reasons(spoken: Any) -> list[tuple[str, str]]:
        found = recommend_users.choose(night, ["u0-0", "u1-1"], side.users_known, spoken, vectors, nearest, 3)
        assert len(found.users) + len(found.rejected) == 2
        return [(name, reason) for name, reason, _, _ in found.rejected]

    assert reasons(side.known) == []
    # What one of them had is all that a prompt can name: there is nothing else for that user, and nothing of the other.
    assert reasons(own) == [("u0-0", "no_candidate"), ("u1-1", "no_history")]


def test_the_weights_are_measured_without_what_they_are_to_find(
    published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, night, side = published
    alignment = allmrec_alignment.find(run, night, "encoder", side)
    spoken = allmrec_reader.spoken(run, night, alignment, side)
    nearest = recommend_users.Nearest(item_index.load(run.lake, run.run_id), night)
    seen: dict[str, Any] = {}
    without_last = allmrec_reader.without_last

    def rows_of(night: Night, items: Any, rows: Any) -> Any:
        seen["rows"] = rows
        return without_last(night, items, rows)

    def measured(*given: Any) -> dict[str, Any]:
        seen["asked"], seen["retrieval"] = given[-2:]
        return {"likelihood": 1.0, "retrieval": 0.5}

    monkeypatch.setattr(allmrec_reader, "without_last", rows_of)
    monkeypatch.setattr(recommend_weights, "_measured", measured)
    weights, _ = recommend_weights.find(run, night, side, side, spoken, "a reader", nearest, 6)
    assert weights.retrieval == 0.5
    rows, asked = seen["rows"], seen["asked"]
    assert len(rows) >= 10
    histories = night.histories
    last = histories.items[histories.indptr[rows + 1] - 1]
    np.testing.assert_array_equal(asked.candidates[:, 0], last)
    before = side.before(rows, histories.lengths[rows] - 1)
    assert not np.allclose(before, side.before(rows, histories.lengths[rows]), atol=1e-3)
    np.testing.assert_allclose(asked.users, before, rtol=1e-5)
    np.testing.assert_allclose(seen["retrieval"][:, 0], (before * side.items[last]).sum(1), rtol=1e-4, atol=1e-5)


# --- The gate

Break = Callable[[pa.Table], pa.Table]
TOP = 3
ITEMS = [f"i{n}" for n in range(8)]
USERS = ["u0", "u1", "u2"]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Night]:
    """Three users who had an item each, of eight."""
    run = staged_night.run_of(tmp_path_factory.mktemp("gate"), DAY)
    had = {(user, ITEMS[n]): 1.0 for n, user in enumerate(USERS)}
    staged_night.snapshot(run, had, tuple(ITEMS[3:]))
    return run, allmrec_night.read(run.staging("snapshot"))


def _rows(run: Run) -> pa.Table:
    rows = [
        {
            "refresh_date": run.run_date, "user_id": user, "item_id": ITEMS[3 + rank], "rank": rank, "score": -float(rank),
            "likelihood": -1.0, "candidate_rank": rank, "retrieval_score": 0.5, "source": "cf", "run_id": run.run_id,
            "published_run_id": "night", "model_version": "m1", "space_version": "s1",
        }
        for user in USERS
        for rank in range(1, TOP + 1)
    ]  # fmt: skip
    fields = [pa.field(f.name, f.type) for f in schema("recommendations").arrow_schema]
    return pa.Table.from_pylist(rows, pa.schema(fields))


def _failures(
    gated: tuple[Run, Night], monkeypatch: pytest.MonkeyPatch, change: Break = lambda rows: rows, asked: int = 4
) -> list[str]:
    """What the gate finds in the rows that `change` has broken, without Data Docs."""
    run, night = gated
    lineage = {"refresh_date": run.run_date, "run_id": run.run_id, "published_run_id": "night"}
    lineage |= {"model_version": "m1", "space_version": "s1"}
    work: Any = recommend.Work(night, *[None] * 4, {}, lineage, TOP, False)  # type: ignore[arg-type]
    nobody = [("nobody", "unknown_user", "no interaction of before the run date is used", 1)]
    users = Users(np.arange(3), np.zeros((3, TOP), np.int64), np.zeros((3, TOP), np.float32), nobody)
    found: list[str] = []

    def check(views: Any, parameters: Any, out: Any, **given: Any) -> dict[str, Any]:
        found.extend(evaluate(views, parameters, name="test", at=run.midnight)[1])
        return {"expectations": 0, "succeeded": 0, "data_docs": ""}

    monkeypatch.setattr(recommend, "check", check)
    names = pa.chunked_array([pa.array(ITEMS)])
    question = Request(["nobody"] * asked, TOP, TOP)
    recommend._gate(run, run.staging("x"), work, users, question, change(_rows(run)), names, run.staging("shards"))
    return found


BREAKS: list[tuple[str, Break, str, str]] = [
    ("user missing", lambda rows: rows.slice(TOP), "every user who can be served is", "found 2"),
    ("no user", where("user_id", None), "every row names its user", "user_id=None"),
    ("stranger", where("user_id", "zed"), "asked for and can be served", "user_id='zed'"),
    ("a row too many", again(0), "as many items as were asked for", "rows=4"),
    ("score null", where("score", None), "null id, rank, score or likelihood", "incomplete=1"),
    ("likelihood null", where("likelihood", None), "null id, rank, score or likelihood", "incomplete=1"),
    ("rank null", where("rank", None), "null id, rank, score or likelihood", "incomplete=1"),
    ("item null", where("item_id", None), "null id, rank, score or likelihood", "incomplete=1"),
    ("an item twice", where("item_id", ITEMS[4], 1), "a user has an item once", "repeated=1"),
    ("unknown item", where("item_id", "ghost"), "every item is a published one", "unknown_items=1"),
    ("had before", where("item_id", ITEMS[0]), "what is in the history", "had_before=1"),
    ("ranks from 2", without(0), "ranks begin at 1", "first_rank=2"),
    ("a hole", without(1), "ranks have no holes", "holes=1"),
    ("a rank twice", where("rank", 2, 2), "ranks have no holes", "holes=1"),
    ("score infinite", where("score", float("inf")), "are finite", "not_finite=1"),
    ("likelihood NaN", where("likelihood", float("nan")), "are finite", "not_finite=1"),
    ("rising", where("score", 0.0, 2), "do not grow with the rank", "rises=1"),
    ("another run's row", where("run_id", "20260228-00000000000a"), "all rows have one lineage", "found 2"),
    *[
        (f"{column}", where(column, value), rule, f"{column}={str(value)!r}")
        for column, value, rule in (
            ("refresh_date", DAY - timedelta(days=1), "every row is of the run date"),
            ("run_id", "20260228-00000000000a", "every row carries this run's id"),
            ("published_run_id", "another night", "every row names the night that it is from"),
            ("model_version", "m0", "every row carries the reader that scored it"),
            ("space_version", "s0", "every row is in the published space"),
        )
    ],
]


@pytest.mark.parametrize(("change", "rule", "shown"), [pytest.param(*b[1:], id=b[0]) for b in BREAKS])
def test_each_broken_rule_of_the_recommendations_is_named(
    gated: Any, monkeypatch: pytest.MonkeyPatch, change: Break, rule: str, shown: str
) -> None:
    failures = _failures(gated, monkeypatch, change)
    assert any(rule in line and shown in line for line in failures), failures


def test_good_recommendations_pass_and_users_who_vanished_are_named(
    gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _failures(gated, monkeypatch) == []
    (lost,) = _failures(gated, monkeypatch, asked=6)
    assert "users asked for = users served + users rejected with a reason" in lost
    assert "unaccounted=2" in lost


def test_every_rule_of_the_recommendations_is_broken_by_a_test() -> None:
    said = {one["meta"]["says"] for one in schema("recommendations").expectations}
    broken = {rule for rule in said if any(part in rule for _, _, part, _ in BREAKS)}
    # Of the users who were asked for there is one row, whatever is staged.
    assert said - broken == {
        "the users who were asked for are counted",
        "users asked for = users served + users rejected with a reason",
    }
