"""Stage `gates`: Great Expectations on what is staged; a failed gate publishes nothing.

The rules stand in schemas/*.yaml. Here the frames that they are about are derived, and the values of the run that they name
are collected. `check_inputs` is the same for the tables of the snapshot, before any compute is spent on them.
"""

from __future__ import annotations

import hashlib
import json
import math
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import published, stranded
from jobs.expectations import View, check
from jobs.run import OUTPUTS, Run, log
from jobs.spark_session import session, spark_path
from jobs.staging import MANIFEST, Staging
from schemas.errors import ContractError
from schemas.table import table as schema
from udfs import gate_views
from udfs.cleaning import SET_ASIDE
from udfs.ids import large

if TYPE_CHECKING:
    import pandas as pd

_LINEAGE = ["refresh_date", "run_id", "model_version", "space_version"]


def _staged(stage: Staging, name: str, columns: list[str] | None = None) -> pa.Table:
    """A staged table in its contract's types; nulls are left to the expectations.

    Raises:
        ContractError: a column is missing or of another type.
    """
    table, contract = stage.read(name, columns), schema(name)
    wanted = columns or [c.name for c in contract.columns]
    absent = [column for column in wanted if column not in table.column_names]
    if absent:
        raise ContractError(f"staged table {stage.path(name)} lacks columns {absent}; it has {table.column_names}")
    try:
        return table.select(wanted).cast(pa.schema([pa.field(c, contract.column(c).arrow_type) for c in wanted]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ContractError(f"staged table {stage.path(name)} does not fit schemas/{name}.yaml: {error}") from error


def _labels(items: pa.Table) -> pd.DataFrame:
    cold = pc.equal(items["label"], "cold")
    counts = {"items": items.num_rows, "warm": pc.sum(pc.equal(items["label"], "warm")), "cold": pc.sum(cold)}
    return pa.table({k: [v if isinstance(v, int) else v.as_py() or 0] for k, v in counts.items()}).to_pandas()


def _snapshot_before(run: Run) -> dict[str, Any]:
    """What the night published before this date said of its snapshot; nothing if there is none."""
    before = published.previous(run.lake, run.run_date)
    rows = run.lake.read("runs", refresh_date=before.refresh_date).to_pylist() if before else []
    own = (row for row in rows if before and (row["run_id"], row["stage"]) == (before.run_id, "snapshot"))
    return next((json.loads(row["counts"]) for row in own), {})


def _share(now: int, before: int | None) -> float | None:
    return now / before if before else None


def _days_old(run: Run, newest_event: str | None) -> float:
    """Days from the newest event to the run's midnight; endless where no event has a time: what cannot be seen meets no limit."""
    if newest_event is None:
        return math.inf
    return (run.midnight - datetime.fromisoformat(newest_event)) / timedelta(days=1)


def _input_counts(
    facts: dict[str, Any], rejected: pa.Table, staged: dict[str, int], before: dict[str, Any], days_old: float
) -> pd.DataFrame:
    """One row an input table: its rows in, used and rejected, what each way of counting leaves over, the share of the facts
    `before`; of the items those with a text, too, and of the interactions `days_old`."""
    aside = pc.is_in(rejected["reason"], value_set=pa.array(SET_ASIDE))
    rows = []
    for name, rows_in in facts["rows_in"].items():
        mine = pc.fill_null(pc.equal(rejected["table"], name), False)
        recorded = pc.sum(rejected.filter(mine)["rows"]).as_py() or 0
        set_aside = pc.sum(rejected.filter(pc.and_(mine, aside))["rows"]).as_py() or 0
        used, refused = facts["rows_used"][name], facts["rows_rejected"][name]
        rows.append(
            {
                "table": name,
                "rows_in": rows_in,
                "unaccounted": rows_in - used - refused,
                "unrecorded": refused - recorded,
                "unstaged": used - staged[name],
                # What lies outside the run's dates, split or k-core is no sign of bad data.
                "bad_share": (recorded - set_aside) / max(rows_in - set_aside, 1),
                "used_share": _share(used, before.get("rows_used", {}).get(name)),
                "text_share": _share(facts["with_text"], before.get("with_text")) if name == "items" else None,
                "days_old": days_old if name == "interactions" else None,
            }
        )
    shares = ("used_share", "text_share", "days_old")
    return pa.Table.from_pylist(rows).to_pandas().astype(dict.fromkeys(shares, float))


def input_views(run: Run, out: Staging, facts: dict[str, Any]) -> tuple[list[View], dict[str, Any]]:
    """The views of the snapshot's tables in `out`, and the values that their expectations name."""
    users, items = _staged(out, "users"), _staged(out, "items_labelled")
    spark = session(run.settings.spark)
    names = ("training_interactions", "items_labelled", "users")
    by_item = gate_views.training_by_item(
        *(spark.read.parquet(spark_path(out.path(name))) for name in names)
    ).toPandas()
    rejected = _staged(out, "rejected_rows", ["table", "key", "reason", "detail", "rows"])
    staged = {"interactions": int(by_item["events"].sum()), "items": items.num_rows}
    reasons = gate_views.lineage(rejected, ["table", "reason"])
    item_rows = items.select(["item_id", "item_idx", "label", "interactions"])
    days_old = _days_old(run, facts["newest_event"])
    counts = _input_counts(facts, rejected, staged, _snapshot_before(run), days_old)
    views = [
        View("training_interactions", "items", by_item, ("item_id",)),
        View("users", "rows", users.to_pandas(), ("user_id",)),
        View("items_labelled", "rows", item_rows.to_pandas(), ("item_id",)),
        View("items_labelled", "labels", _labels(items), ("items",)),
        View("rejected_rows", "inputs", counts, ("table", "rows_in")),
        View("rejected_rows", "reasons", reasons, ("table", "reason")),
    ]
    return views, {
        "rejected_share": run.settings.gates.rejected_share,
        "kept_share": run.settings.gates.kept_share,
        "stale_days": run.settings.gates.stale_days or math.inf,
        "input_tables": sorted(facts["rows_in"]),
        "n_inputs": len(facts["rows_in"]),
        "last_user": users.num_rows - 1,
        "last_item": items.num_rows - 1,
    }


def check_inputs(run: Run, out: Staging, facts: dict[str, Any]) -> dict[str, Any]:
    """The gate of the inputs, at the end of stage snapshot, on the tables that it left in `out` and on its facts.

    Args:
        facts: rows_in, rows_used, rows_rejected: input table -> rows; with_text, newest_event.

    Returns:
        expectations, succeeded, data_docs.

    Raises:
        jobs.expectations.GateError: rows are unaccounted for, too many are bad or too few are left, the newest event is stale,
            there is no warm item, an id is null, ...
    """
    views, parameters = input_views(run, out, facts)
    return check(
        views,
        parameters,
        out,
        name=f"{run.run_id}-inputs",
        at=run.midnight,
        consequence="Nothing was computed from these inputs and nothing is published. Mend the input tables (rejected "
        f"rows with their reasons: {out.path('rejected_rows')}) or the settings named above, and run again.",
    )


def refresh_digest(run: Run) -> str:
    """Hash of the manifest of stage refresh: which staged tables a gate has seen."""
    return hashlib.sha256(run.staging("refresh").read_bytes(MANIFEST)).hexdigest()


def _sampled_views(run: Run, items: pa.Table, users: pa.Table, of_strangers: pa.Array) -> list[View]:
    sampled = _staged(run.staging("refresh"), "sampled_interactions")
    cold = _cold_with_text(items)
    cold = pa.chunked_array([*cold.chunks, of_strangers], cold.type)
    expected = pa.table({"item_id": cold, "sampled": gate_views.known(cold, sampled["item_id"])}).to_pandas()
    lineage = gate_views.lineage(sampled, ["propensity", *_LINEAGE])
    by_item = gate_views.sampled_by_item(sampled, cold, users["user_id"])
    return [
        View("sampled_interactions", "items", by_item, ("item_id", "rows")),
        View("sampled_interactions", "expected", expected, ("item_id",)),
        View("sampled_interactions", "lineage", lineage, ("run_id", "rows")),
    ]


def _cold_with_text(items: pa.Table) -> pa.ChunkedArray:
    return items.filter(pc.and_(pc.equal(items["label"], "cold"), pc.is_valid(items["text_sha256"])))["item_id"]


def _item_views(run: Run, items: pa.Table, placed: np.ndarray, of_strangers: pa.Array) -> list[View]:
    """`placed` bool, one a row of `items`: the space or a fold-in can place it by real interactions; of_strangers: ids."""
    embedded = _staged(run.staging("refresh"), "item_embeddings")
    rows = gate_views.vectors(embedded, "item_id", items)
    warm = rows.loc[rows["finite"] & (rows["label"] == "warm"), "norm"]
    rows["norm_share"] = rows["norm"] / (warm.median() if len(warm) else np.nan)
    # They may be few beside the warm ones, which would outvote them.
    rows["new_norm_share"] = rows["norm_share"].where(rows["source"] != "cf")
    rows["known"] = rows.pop("label").notna()
    rows["days_ahead"] = (rows["updated_at"] - run.midnight).dt.total_seconds() / 86400
    must = np.asarray(pc.is_valid(items["text_sha256"]).to_numpy(), dtype=bool) | placed
    must &= placed | np.asarray(pc.equal(items["label"], "cold")) | gate_views.known(items["item_id"], of_strangers)
    expected = items.select(["item_id", "label"]).filter(pa.array(must))
    expected = expected.append_column("embedded", pa.array(gate_views.known(expected["item_id"], embedded["item_id"])))
    return [
        View("item_embeddings", "rows", rows, ("item_id", "source")),
        View("item_embeddings", "expected", expected.to_pandas(), ("item_id", "label")),
        View("item_embeddings", "lineage", gate_views.lineage(embedded, _LINEAGE), ("run_id", "rows")),
    ]


def _user_views(run: Run, users: pa.Table, in_space: np.ndarray) -> list[View]:
    """`in_space` bool, one a row of `users`."""
    embedded = _staged(run.staging("refresh"), "user_embeddings")
    rows = gate_views.vectors(embedded, "user_id")
    rows["known"] = gate_views.known(embedded["user_id"], users["user_id"])
    expected = users.select(["user_id"]).filter(pa.array(in_space))
    expected = expected.append_column("embedded", pa.array(gate_views.known(expected["user_id"], embedded["user_id"])))
    return [
        View("user_embeddings", "rows", rows, ("user_id",)),
        View("user_embeddings", "expected", expected.to_pandas(), ("user_id",)),
        View("user_embeddings", "lineage", gate_views.lineage(embedded, _LINEAGE), ("run_id", "rows")),
    ]


def _space_view(space: dict[str, Any]) -> View:
    residual = space.get("residual") if space.get("aligned_to") else 0.0
    row = {"space_version": space["space_version"], "aligned_to": space.get("aligned_to"), "residual": residual}
    frame = pa.Table.from_pylist([row]).to_pandas()
    return View("space", "alignment", frame.astype({"residual": float}), ("space_version", "aligned_to"))


def output_views(run: Run) -> tuple[list[View], dict[str, Any]]:
    """The views of what stage refresh left, and the values of the run that their expectations name."""
    snapshot, settings = run.staging("snapshot"), run.settings
    scored = run.staging("filterllm_score").facts()
    # Method retrain makes a space of its own; otherwise the vectors must be in the space that stage cf named.
    space = run.staging("refresh" if settings.refresh.method == "retrain" else "cf").facts()
    users = _staged(snapshot, "users")
    items = _staged(snapshot, "items_labelled", ["item_id", "item_idx", "label", "text_sha256"])
    items, users = large(items).sort_by("item_idx"), large(users).sort_by("user_idx")
    trained = run.artifact("spaces", space["space_version"]).read("users", ["user_id"])
    in_space = gate_views.known(users["user_id"], trained["user_id"])
    placed = np.zeros(items.num_rows, dtype=bool)
    for user, item in stranded.pairs(run):
        placed[item[in_space[user]]] = True

    of_strangers = stranded.items(run)
    views = [
        *_sampled_views(run, items, users, of_strangers),
        *_item_views(run, items, placed, of_strangers),
        *_user_views(run, users, in_space),
        _space_view(space),
    ]
    rows = {view.title: len(view.frame) for view in views}
    without_vector = _staged(run.staging("refresh"), "rejected_rows", ["table"])["table"].to_pylist()
    return views, {
        "run_id": [run.run_id],
        "refresh_date": [run.run_date.isoformat()],
        "model_version": [scored["model_version"]],
        "space_version": [space["space_version"]],
        "users_per_item": min(settings.sampling.k, _scorable(run, scored, users)),
        "items_scored": scored["items"],
        "items_to_sample": rows["sampled_interactions.expected"],
        "items_to_embed": items.num_rows - without_vector.count("item_embeddings"),
        "users_to_embed": users.num_rows - without_vector.count("user_embeddings"),
        "dimension": space["dimension"],
        "norm_low": settings.gates.norm_low,
        "norm_high": settings.gates.norm_high,
        "norm_mostly": settings.gates.norm_mostly,
        "procrustes_residual": settings.gates.procrustes_residual,
    }


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Check the tables that stage refresh left.

    Returns:
        expectations, succeeded; data_docs: where index.html is; rows: output table -> rows; refresh_digest.

    Raises:
        jobs.expectations.GateError: an expectation is not met; nothing will be published.
    """
    refreshed = run.staging("refresh")
    refreshed.verify()
    views, parameters = output_views(run)
    facts = check(
        views,
        parameters,
        out,
        name=run.run_id,
        at=run.midnight,
        consequence="Nothing was published: the output tables are as they were. What was gated lies in "
        f"{refreshed.uri}; mend its cause (input tables that have changed are read anew) or change the limit in the "
        "settings (section gates), and run again.",
    )
    log(
        f"[gates] {facts['succeeded']} of {facts['expectations']} expectations are met; Data Docs: {facts['data_docs']}"
    )
    rows = {name: _rows(refreshed, name) for name in OUTPUTS}
    return {**facts, "rows": rows, "refresh_digest": refresh_digest(run)}


def _rows(stage: Staging, name: str) -> int:
    """How many rows a staged table has."""
    return stage.read(name, [schema(name).columns[0].name]).num_rows


def _scorable(run: Run, scored: dict[str, Any], users: pa.Table) -> int:
    """How many users can be drawn: those of the model's vocabulary who are still among tonight's users."""
    vocabulary = run.artifact("models", scored["model_version"]).read("users", ["user_id"])
    return int(gate_views.known(vocabulary["user_id"], users["user_id"]).sum())
