"""The gates: a good night passes, and each rule, broken alone, is named by the gate that stops it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from jobs import gates
from jobs.expectations import GateError, View, check, evaluate
from jobs.lake import Lake
from jobs.run import OUTPUTS, Run, execute
from jobs.staging import Staging, StagingError
from schemas.errors import ContractError
from tests import gated_night as night
from tests.gated_night import COLD_IDS, K, again, where, without

SAMPLED, ITEMS, USERS = "sampled_interactions", "item_embeddings", "user_embeddings"
Break = Callable[[pa.Table], pa.Table]


def _each(column: str, value: Any) -> Break:
    """A break: `column` is `value` in every row."""

    def change(table: pa.Table) -> pa.Table:
        field = table.schema.field(column)
        values = pa.array([value] * table.num_rows, field.type)
        return table.set_column(table.schema.get_field_index(column), field, values)

    return change


def _then(*changes: Break) -> Break:
    def change(table: pa.Table) -> pa.Table:
        for one in changes:
            table = one(table)
        return table

    return change


def _item(name: str) -> int:
    return [*COLD_IDS, *night.WARM_IDS].index(name)


# (table, what is done to it, the rule that must be named, a word of the example or count that must be shown)
OUTPUT_BREAKS: list[tuple[str, str, Break, str, str]] = [
    ("item without an id", SAMPLED, where("item_id", None), "every row names its item", "item_id=None"),
    ("warm item sampled", SAMPLED, where("item_id", "warm-03"), "only tonight's cold items", "'warm-03'"),
    ("a row too few", SAMPLED, without(K - 1), "every item has its K users", "item_id='cold-00', rows=4"),
    ("a row twice", SAMPLED, again(0), "every item has its K users", "item_id='cold-00', rows=6"),
    ("user null", SAMPLED, where("user_id", None), "no row has a null id, rank or probability", "incomplete=1"),
    ("rank null", SAMPLED, where("rank", None), "no row has a null id, rank or probability", "incomplete=1"),
    ("probability NaN", SAMPLED, where("probability", float("nan")), "no row has a null id", "incomplete=1"),
    ("a user twice", SAMPLED, where("user_id", night.USER_IDS[1], 1), "an item has a user once", "repeated=1"),
    ("unknown user", SAMPLED, where("user_id", "gone"), "among tonight's users", "unknown_users=1"),
    ("ranks from 0", SAMPLED, where("rank", 0), "ranks begin at 1", "first_rank=0"),
    ("ranks past K", SAMPLED, where("rank", K + 1, K - 1), "ranks end at K", "last_rank=6"),
    ("a rank twice", SAMPLED, where("rank", 2, 2), "every rank stands once", "ranks=4"),
    ("probability 0", SAMPLED, where("probability", 0.0, K - 1), "probabilities are above 0", "lowest=0"),
    ("probability above 1", SAMPLED, where("probability", 1.5), "probabilities are 1 at most", "highest=1.5"),
    ("probability infinite", SAMPLED, where("probability", float("inf")), "probabilities are 1 at most", "highest"),
    ("rising", SAMPLED, where("probability", 0.3, 2), "do not grow with the rank", "item_id='cold-00'"),
    ("mass above 1", SAMPLED, where("probability", 0.9), "add up to 1 at most", "mass=1.36875"),
    (
        "an item is missing",
        SAMPLED,
        lambda t: t.slice(K),
        "every cold item with text is sampled",
        "1 of 6 rows fail; such as: item_id='cold-00', sampled=False",
    ),
    ("fewer items", SAMPLED, lambda t: t.slice(K), "as many items are sampled as are cold and have text", "found 5"),
    ("propensity", SAMPLED, where("propensity", "guess"), "drawn as top_k or sampled", "propensity='guess'"),
    ("propensity null", SAMPLED, where("propensity", None), "says how it was drawn", "propensity=None"),
    ("item embedded twice", ITEMS, again(0), "an item has one vector", "item_id='cold-00'"),
    ("vector without id", ITEMS, where("item_id", None), "every row names its item", "item_id=None"),
    ("unknown item", ITEMS, where("item_id", "ghost"), "every item is among tonight's items", "item_id='ghost'"),
    ("too few vectors", ITEMS, lambda t: t.slice(3), "every item of tonight has a vector, or", "found 23"),
    (
        "cold item not covered",
        ITEMS,
        without(_item("cold-02")),
        "every cold item with text, and every item with interactions in the space, has a vector",
        "item_id='cold-02', label='cold'",
    ),
    ("warm item not covered", ITEMS, without(_item("warm-07")), "has a vector", "item_id='warm-07', label='warm'"),
    ("item NaN", ITEMS, where("embedding", [1.0, float("nan"), 0.0, 0.0]), "holds a NaN", "finite=False"),
    ("item infinite", ITEMS, where("embedding", [1.0, float("inf"), 0.0, 0.0]), "or an infinity", "finite=False"),
    ("item null vector", ITEMS, where("embedding", None), "no vector is null", "finite=False"),
    ("item zero", ITEMS, where("embedding", [0.0] * 4), "no vector is zero", "norm=0.0"),
    ("item dimension", ITEMS, where("embedding", [1.0] * 3), "the space's dimension", "dimension=3"),
    ("item too long", ITEMS, where("embedding", [50.0] * 4), "within a band", "1 of 26 rows fail"),
    ("item too short", ITEMS, where("embedding", [1e-4] * 4), "within a band", "item_id='cold-00'"),
    ("source", ITEMS, where("source", "luck"), "a vector's source is one that is known", "source='luck'"),
    ("source null", ITEMS, where("source", None), "every vector says where it comes from", "source=None"),
    ("interactions below 0", ITEMS, where("interactions", -1), "interactions are counted", "interactions=-1"),
    ("interactions null", ITEMS, where("interactions", None), "how many interactions", "interactions=None"),
    (
        "computed tomorrow",
        ITEMS,
        where("updated_at", night.run_of(Path("-")).midnight + timedelta(days=1)),
        "no vector was computed after the run date",
        "days_ahead=1.0",
    ),
    ("updated_at null", ITEMS, where("updated_at", None), "every vector says when it was computed", "days_ahead=None"),
    ("user embedded twice", USERS, again(0), "a user has one vector", "user_id='user-00'"),
    ("user without id", USERS, where("user_id", None), "every row names its user", "user_id=None"),
    ("unknown user embedded", USERS, where("user_id", "gone"), "every user is among tonight's users", "user_id='gone'"),
    ("user not covered", USERS, without(4), "every user of the space who is still there", "user_id='user-04'"),
    ("too few users", USERS, without(4), "every user of tonight has a vector, or", "found 11"),
    ("user NaN", USERS, where("embedding", [float("nan")] * 4), "holds a NaN", "finite=False"),
    ("user zero", USERS, where("embedding", [0.0] * 4), "no vector is zero", "user_id='user-00'"),
    ("user dimension", USERS, where("embedding", [1.0] * 5), "the space's dimension", "dimension=5"),
    ("no users", USERS, lambda t: t.slice(0, 0), "the table is not empty", "found 0"),
    *[
        (f"{column} of {table}", table, where(column, value), rule, f"{column}={str(value)!r}")
        for table in (SAMPLED, ITEMS, USERS)
        for column, value, rule in (
            ("run_id", "20260228-00000000000a", "every row carries this run's id"),
            ("model_version", "m0", "every row carries the model that scored tonight"),
            ("space_version", "s0", "every row is in tonight's embedding space"),
            ("refresh_date", night.RUN_DATE - timedelta(days=1), "every row is of the run date"),
        )
    ],
    *[
        (f"{column} null in {table}", table, where(column, None), f"every row names its {column}", f"{column}=None")
        for table in (SAMPLED, ITEMS, USERS)
        for column in ("run_id", "model_version", "space_version", "refresh_date")
    ],
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


def _failures(table: str, views: list[View], parameters: dict[str, Any], run: Run) -> list[str]:
    """The failures in the views of one table, without Data Docs; the whole gate is run by other tests."""
    some = [view for view in views if view.table == table]
    return evaluate(some, parameters, name="test", at=run.midnight)[1]


def _output_failures(run: Run, *tables: str) -> str:
    views, parameters = gates.output_views(run)
    return "\n".join(line for table in tables for line in _failures(table, views, parameters, run))


def test_a_good_night_passes_and_its_data_docs_are_written(tmp_path: Path) -> None:
    run = night.run_of(tmp_path)
    night.stage(run)
    facts = execute(run, "gates", gates.run)
    assert facts["expectations"] == facts["succeeded"] > 60
    assert facts["rows"] == {SAMPLED: 30, ITEMS: 26, USERS: 12}
    assert "item_embeddings" in Path(facts["data_docs"]).read_text()
    pages = list(Path(facts["data_docs"]).parent.glob("validations/**/*.html"))
    assert len(pages) == 10, "one page a view"


def test_a_night_without_cold_items_is_a_good_night(tmp_path: Path) -> None:
    run = night.run_of(tmp_path)
    night.stage(run, cold=0)
    assert gates.run(run, run.staging("gates"))["rows"][SAMPLED] == 0


@pytest.mark.parametrize(("table", "change", "rule", "shown"), [pytest.param(*b[1:], id=b[0]) for b in OUTPUT_BREAKS])
def test_each_broken_rule_is_named(lake: Path, table: str, change: Break, rule: str, shown: str) -> None:
    run = night.run_of(lake)
    night.stage(run, breaks={table: change})
    failures = _failures(table, *gates.output_views(run), run)
    lines = [line for line in failures if line.startswith(f"{table}.") and rule in line]
    assert any(shown in line and "[expect_" in line for line in lines), failures


def test_a_failure_says_how_many_rows_shows_three_and_leaves_docs_and_no_table(tmp_path: Path) -> None:
    run = night.run_of(tmp_path)
    night.stage(run, breaks={ITEMS: _then(*[where("embedding", [0.0] * 4, row) for row in range(5)])})
    with pytest.raises(GateError) as failed:
        execute(run, "gates", gates.run)
    line = next(text for text in str(failed.value).splitlines() if "no vector is zero" in text)
    assert "5 of 26 rows fail" in line
    assert line.count("item_id=") == 3
    assert "Nothing was published" in str(failed.value)
    docs = re.search(r"Data Docs: (\S+)", str(failed.value))
    assert docs is not None
    assert Path(docs[1]).is_file()
    assert not run.staging("gates").is_complete()
    assert not any(Lake(str(tmp_path)).exists(name) for name in (SAMPLED, ITEMS, USERS, "runs"))


@pytest.mark.parametrize(
    ("residual", "aligned_to", "passes"),
    [(0.2, "s0", True), (0.95, "s0", False), (None, "s0", False), (float("nan"), "s0", False), (None, None, True)],
)
def test_an_aligned_space_lies_close_to_the_one_before(
    lake: Path, residual: float | None, aligned_to: str | None, passes: bool
) -> None:
    run = night.run_of(lake)
    night.stage(run, cf={"residual": residual, "aligned_to": aligned_to})
    failures = _output_failures(run, "space")
    assert (failures == "") == passes
    assert re.search(r"space\.alignment.*aligned_to='s0'", failures) or passes


def test_only_a_retraining_refresh_may_leave_the_space_of_the_night(tmp_path: Path) -> None:
    moved = {name: _each("space_version", "s2") for name in (SAMPLED, ITEMS, USERS)}
    run = night.run_of(tmp_path, refresh={"method": "retrain"})
    night.stage(run, breaks=moved, refresh={"space_version": "s2", "aligned_to": "s1", "residual": 0.3})
    assert _output_failures(run, *OUTPUTS, "space") == ""
    assert "every row is in tonight's embedding space" in _output_failures(night.run_of(tmp_path), ITEMS)


def test_the_band_of_norms_is_a_setting_and_some_may_lie_outside(lake: Path) -> None:
    run = night.run_of(lake, gates={"norm_mostly": 0.95})
    long = [where("embedding", [50.0] * 4, _item(name)) for name in ("warm-00", "warm-01", "cold-00")]
    night.stage(run, breaks={ITEMS: long[0]})
    assert _output_failures(run, ITEMS) == ""  # 1 of 26 outside
    night.stage(run, breaks={ITEMS: _then(*long[:2])})
    assert "2 of 26 rows fail" in _output_failures(run, ITEMS)
    night.stage(run, breaks={ITEMS: long[2]})
    # Of 6, whom the warm ones do not outvote.
    assert re.search(r"whose source is not cf.*1 of", _output_failures(run, ITEMS))


def test_k_is_all_users_where_there_are_fewer(lake: Path) -> None:
    run = night.run_of(lake, sampling={"k": 50})
    night.stage(run)
    assert "min_value=12" in _output_failures(run, SAMPLED)  # 13 in the vocabulary, one of them gone


def test_a_changed_file_or_a_missing_column_is_no_pass(lake: Path) -> None:
    run = night.run_of(lake)
    night.stage(run)
    refreshed = run.staging("refresh")
    refreshed.write(ITEMS, refreshed.read(ITEMS).slice(1))
    with pytest.raises(StagingError, match="item_embeddings"):
        gates.run(run, run.staging("gates"))
    night.stage(run, breaks={ITEMS: lambda t: t.drop_columns(["source"])})
    with pytest.raises(ContractError, match="lacks columns \\['source'\\]"):
        gates.run(run, run.staging("gates"))
    night.stage(run, breaks={USERS: lambda t: t.set_column(2, "embedding", pa.array(["x"] * t.num_rows))})
    with pytest.raises(ContractError, match=r"does not fit schemas/user_embeddings\.yaml"):
        gates.run(run, run.staging("gates"))


def test_an_expectation_that_cannot_be_evaluated_fails(tmp_path: Path) -> None:
    run = night.run_of(tmp_path)
    frame = pa.table({"space_version": ["s1"], "aligned_to": ["s0"]}).to_pandas()  # no column residual
    view = View("space", "alignment", frame, ("space_version",))
    with pytest.raises(GateError, match=r'could not be evaluated: .*"residual"'):
        check([view], {"procrustes_residual": 1.0}, run.staging("x"), name="x", at=run.midnight, consequence="")


def test_a_view_that_was_forgotten_is_an_error(tmp_path: Path) -> None:
    run = night.run_of(tmp_path)
    view = View("users", "elsewhere", pa.table({"user_id": ["a"]}).to_pandas(), ("user_id",))
    with pytest.raises(GateError, match=r"schemas/users\.yaml states expectations on \['rows'\]"):
        check([view], {}, run.staging("x"), name="x", at=run.midnight, consequence="")


INPUT_BREAKS: list[tuple[str, str, Break, str, str]] = [
    ("pair without item", "training_interactions", where("item_id", None), "every pair names its item", "1 of"),
    ("pair of unknown item", "training_interactions", where("item_id", "x"), "item is among the items", "item_id='x'"),
    ("pair without user", "training_interactions", where("user_id", None), "no pair has a null id", "incomplete=1"),
    ("pair of unknown user", "training_interactions", where("user_id", "x"), "user is among the users", "users=1"),
    ("weight NaN", "training_interactions", where("weight", float("nan")), "no pair has a null id", "incomplete=1"),
    ("weight 0", "training_interactions", where("weight", 0.0), "weights are above 0", "lowest_weight=0.0"),
    (
        "pair twice",
        "training_interactions",
        lambda t: pa.concat_tables([t.slice(1), t.slice(1, 1)]),
        "stands once",
        "repeated=1",
    ),
    ("row not staged", "training_interactions", without(0), "every row used is staged", "table='interactions'"),
    ("no users", "users", lambda t: t.slice(0, 0), "at least one user", "found 0"),
    ("user without id", "users", where("user_id", None), "every user has an id", "user_id=None"),
    ("user twice", "users", where("user_id", "user-01"), "user ids are unique", "user_id='user-01'"),
    ("user not numbered", "users", where("user_idx", None), "every user is numbered", "user_id='user-00'"),
    ("user number twice", "users", where("user_idx", 3), "user numbers are unique", "user_idx=3"),
    ("a gap in user numbers", "users", where("user_idx", 99), "from 0 without a gap", "user_idx=99"),
    ("user without interactions", "users", where("interactions", 0), "every user has an interaction", "user-00"),
    ("item without id", "items_labelled", where("item_id", None), "every item has an id", "item_id=None"),
    ("item twice", "items_labelled", where("item_id", "cold-01"), "item ids are unique", "item_id='cold-01'"),
    ("item not numbered", "items_labelled", where("item_idx", None), "every item is numbered", "item_id='cold-00'"),
    ("item number twice", "items_labelled", where("item_idx", 3), "item numbers are unique", "item_idx=3"),
    ("a gap in item numbers", "items_labelled", where("item_idx", -1), "from 0 without a gap", "item_idx=-1"),
    ("label", "items_labelled", where("label", "tepid"), "an item is warm or cold", "label='tepid'"),
    ("label null", "items_labelled", where("label", None), "every item is labelled", "label=None"),
    ("item count below 0", "items_labelled", where("interactions", -2), "interactions are counted", "interactions=-2"),
    ("no warm item", "items_labelled", _each("label", "cold"), "at least one item is warm", "warm=0"),
    ("item not staged", "items_labelled", without(0), "every row used is staged", "table='items'"),
    ("reason lost", "rejected_rows", without(1), "recorded with its reason", "unrecorded=4"),
    ("reason null", "rejected_rows", where("reason", None), "every rejected row has a reason", "reason=None"),
    ("rejected of no table", "rejected_rows", where("table", None), "names its table", "table=None"),
    ("rejected of another table", "rejected_rows", where("table", "x"), "is of an input table", "table='x'"),
]


@pytest.fixture(scope="module")
def good_pairs(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What Spark makes of the pairs of a good snapshot."""
    run, out, facts = _snapshot(tmp_path_factory.mktemp("good"), {})
    views, _ = gates.input_views(run, out, facts)
    return next(view.frame for view in views if view.table == "training_interactions")


@pytest.fixture
def pairs_are_good(good_pairs: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Spark has made of good pairs is taken again."""
    found = SimpleNamespace(toPandas=lambda: good_pairs)
    monkeypatch.setattr(gates.gate_views, "training_by_item", lambda *tables: found)


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize(("table", "change", "rule", "shown"), [pytest.param(*b[1:], id=b[0]) for b in INPUT_BREAKS])
def test_each_broken_rule_of_the_inputs_is_named(
    tmp_path: Path, table: str, change: Break, rule: str, shown: str, request: pytest.FixtureRequest
) -> None:
    run, out, facts = _snapshot(tmp_path, {table: change})
    if table != "training_interactions":
        request.getfixturevalue("pairs_are_good")
    views = gates.input_views(run, out, facts)
    failures = [line for name in {table, "rejected_rows"} for line in _failures(name, *views, run) if rule in line]
    assert any(shown in line for line in failures), failures


def _snapshot(
    folder: Path, breaks: dict[str, Break], **facts: dict[str, int]
) -> tuple[Run, Staging, dict[str, dict[str, int]]]:
    """A staged snapshot, its tables broken by `breaks`, and its facts."""
    run = night.run_of(folder)
    out, tables = run.staging("snapshot"), night.snapshot_tables()
    for name, table in tables.items():
        out.write(name, breaks[name](table) if name in breaks else table)
    return run, out, {**night.snapshot_facts(tables), **facts}


def _inputs(folder: Path, **facts: dict[str, int]) -> str:
    """Stage a snapshot and check it, without Data Docs; the failures."""
    run, out, body = _snapshot(folder, {}, **facts)
    views, parameters = gates.input_views(run, out, body)
    return "\n".join(evaluate(views, parameters, name="test", at=run.midnight)[1])


def test_good_inputs_pass(tmp_path: Path) -> None:
    # 900 of 976 events lie after the run date: that is no sign of bad data.
    assert Path(gates.check_inputs(*_snapshot(tmp_path, {}))["data_docs"]).is_file()


@pytest.mark.usefixtures("pairs_are_good")
def test_rows_of_the_inputs_reconcile(tmp_path: Path) -> None:
    message = _inputs(tmp_path, rows_in={"interactions": 980, "items": 27})
    assert "rows in = rows used + rows rejected" in message
    assert "table='interactions', rows_in=980" in message
    assert "an input table has rows" in _inputs(tmp_path, rows_in={"interactions": 0, "items": 27})


@pytest.mark.usefixtures("pairs_are_good")
@pytest.mark.parametrize(("times", "stops"), [(1.9, False), (2.1, True)])
@pytest.mark.parametrize("lost", ["rows", "texts"])
def test_an_input_that_lost_half_of_its_rows_or_texts_stops_the_night(
    tmp_path: Path, lost: str, times: float, stops: bool
) -> None:
    before = night.run_of(tmp_path, run_date=night.RUN_DATE - timedelta(days=3))
    used = night.snapshot_facts(night.snapshot_tables())["rows_used"]
    were = int(times * used["items"])
    counts = {"rows_used": {**used, "items": were}} if lost == "rows" else {"rows_used": used, "with_text": were}
    before.record("snapshot", counts, 1.0, {})
    assert _inputs(tmp_path) == ""  # it has published nothing
    before.record("publish", {"space_version": "s1"}, 1.0, dict.fromkeys(OUTPUTS, 0))
    message = _inputs(tmp_path)
    rule = "an input has not shrunk" if lost == "rows" else "items with a text have not become fewer"
    assert (rule in message) == stops
    assert ("table='items'" in message) == stops


def test_too_many_bad_rows_stop_the_night(tmp_path: Path) -> None:
    def more(table: pa.Table) -> pa.Table:
        return where("rows", 400, 1)(table)

    used = night.snapshot_facts(night.snapshot_tables())["rows_used"]["interactions"]
    counts = {"interactions": used + 1300, "items": 27}
    refused = {"interactions": 1300, "items": 1}
    with pytest.raises(GateError) as failed:
        gates.check_inputs(*_snapshot(tmp_path, {"rejected_rows": more}, rows_in=counts, rows_rejected=refused))
    message = str(failed.value)
    assert "not too many rows are bad (gates.rejected_share)" in message
    assert "1 of 2 rows fail" in message
    assert "Nothing was computed from these inputs" in message
    assert "unaccounted" not in message
