"""Stage `publish`: the gated tables become what rankers read, all or nothing.

Each table's partition of the run date is replaced in one Delta commit that carries the transaction (table/date, sequence of
the run) and the lineage. The `runs` row that follows names the four versions: readers go by it, so a night whose publishing
was killed half way is not seen, and publishing again commits only what is missing.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from jobs import gates, item_index
from jobs.run import OUTPUTS, Run, code_version, log
from jobs.staging import Staging
from schemas.errors import ColdRefreshError
from schemas.table import table as schema

TABLES = ("rejected_rows", *OUTPUTS)
# What a stage leaves of rejected_rows; the rest is lineage.
_STAGED = ("table", "key", "reason", "detail", "rows")


class PublishError(ColdRefreshError):
    """The night cannot be published: what was gated has changed, or a later run of the date was published before."""


def _rejected(run: Run) -> pa.Table:
    # Spark says of a constant column that it has no nulls, Arrow does not.
    types = pa.schema([pa.field(c.name, c.arrow_type) for c in schema("rejected_rows").columns if c.name in _STAGED])
    staged = [run.staging(stage).read("rejected_rows").select(types.names) for stage in ("snapshot", "refresh")]
    table = pa.concat_tables(part.cast(types) for part in staged)
    for name, value in (("refresh_date", run.run_date), ("run_id", run.run_id)):
        table = table.append_column(name, pa.repeat(value, table.num_rows))
    return table


def _app(table: str, run: Run) -> str:
    return f"{table}/{run.run_date}"


def _stop_if_overtaken(run: Run, table: str, version: int | None = None) -> None:
    """A later run of the same date has published: committing would change nothing, and saying so would be false."""
    if not run.lake.exists(table):
        return
    there = run.lake.table(table, version).transaction_version(_app(table, run))
    if there is not None and there > run.sequence:
        raise PublishError(
            f"table '{table}' holds {run.run_date} as published by run number {there} of that date, and this is number "
            f"{run.sequence} ({run.run_id}): it is not put back. Nothing to do, unless the older settings or inputs are "
            "wanted: then start a new run with them"
        )


def _lineage(run: Run, checked: dict[str, Any]) -> dict[str, Any]:
    refreshed = run.staging("refresh").facts()
    return {
        "run_id": run.run_id,
        "refresh_date": run.run_date.isoformat(),
        "sequence": run.sequence,
        "input_versions": run.input_versions,
        "conf_hash": run.conf_hash,
        "code_version": code_version(),
        "model_version": refreshed["model_version"],
        "space_version": refreshed["space_version"],
        "rows": checked["rows"],
    }


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Commit rejected_rows and the three output tables; export the item index.

    Returns:
        output_versions: table -> Delta version; rows: table -> rows; model_version, space_version; index: its facts.

    Raises:
        jobs.staging.StagingError: the gates have not passed, or a staged file is not what its manifest says.
        PublishError: what was gated is not what is staged now, or a later run of the date was published.
        jobs.lake.LakeError: an output table has a feature that delta-rs cannot write.
    """
    checked = run.staging("gates").facts()
    refreshed = run.staging("refresh")
    refreshed.verify()
    run.staging("snapshot").verify()
    if checked["refresh_digest"] != gates.refresh_digest(run):
        raise PublishError(
            f"{refreshed.uri} was computed again after the gates had passed; remove {run.staging('gates').uri} and run again"
        )
    for name in TABLES:
        _stop_if_overtaken(run, name)
    tables = {"rejected_rows": _rejected(run), **{name: refreshed.read(name) for name in OUTPUTS}}
    # First what readers do not see: should the export fail, the tables are as they were.
    index = item_index.export(run, tables["item_embeddings"], tables["user_embeddings"])
    recall = f"recall@{item_index.RECALL_AT}"
    log(f"[publish] {index['type']} of {index['items']} items, {recall} {index[recall]}: {index['path']}")
    lineage = _lineage(run, checked)
    inputs = sorted(run.staging("snapshot").facts()["rows_in"])
    versions = {}
    for name, rows in tables.items():
        replace: dict[str, Any] = {"refresh_date": run.run_date}
        if name == "rejected_rows":  # jobs.recommend has rows of this date too
            replace["table"] = [*inputs, *OUTPUTS]
        versions[name] = run.lake.commit(
            name, rows, app=_app(name, run), sequence=run.sequence, replace=replace, lineage=lineage
        )
        _stop_if_overtaken(run, name, versions[name])
        log(f"[publish] {name}: {rows.num_rows} rows, version {versions[name]}")
    return {
        "output_versions": versions,
        "rows": {name: rows.num_rows for name, rows in tables.items()},
        "model_version": lineage["model_version"],
        "space_version": lineage["space_version"],
        "index": index,
    }
