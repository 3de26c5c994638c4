"""The lake: Delta tables of this project, read and committed with delta-rs, exactly once.

A user's own tables are read by Spark only (jobs/inputs.py); what is here is for the project's own plain tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from schemas.errors import ColdRefreshError
from schemas.table import Table
from schemas.table import table as schema

_ATTEMPTS = 5
# `runs` names versions: by default Delta's log forgets those of before a checkpoint after 30 days.
_PROPERTIES = {"delta.logRetentionDuration": "interval 3650 days"}
# Of caches, where a shard is a commit: for each transaction that is asked for, all files since the last checkpoint are read, by
# default up to 100. A checkpoint holds every transaction, so they would fill the store; but nobody names a cache's old versions.
_CACHE_PROPERTIES = {"delta.checkpointInterval": "10"}
# What tells where a store is, and who asks.
_OF_THE_ENVIRONMENT = re.compile("endpoint|region|key|secret|token|account|credential|profile|http", re.IGNORECASE)
# Spark reads a path with one of these as a pattern.
_PATTERN = re.compile(r"[{}\[\]*?\\]")
# Of tables that another engine made. The last one delta-rs writes, but readers would then find nulls.
_UNWRITABLE = {"clustering", "rowTracking", "identityColumns", "inCommitTimestamp", "columnMapping"}


class LakeError(ColdRefreshError):
    """A table is missing or cannot be written: the message names it."""


@dataclass(frozen=True)
class Lake:
    """A folder or URI of Delta tables. `options` are delta-rs storage options: how it commits and how often it tries.

    Raises:
        LakeError: an option says where the store is or who asks (Spark, Ray's workers and pyarrow must know that too); the URI
            is empty, or has a character by which Spark would look for many paths.
    """

    uri: str
    options: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.uri.strip() or _PATTERN.search(self.uri):
            raise LakeError(f"lake {self.uri!r}: a folder or a URI, without any of the characters {{}}[]*?\\")
        if known := sorted(filter(_OF_THE_ENVIRONMENT.search, self.options)):
            raise LakeError(
                f"storage options {known} would reach delta-rs only, and not Spark, Ray's workers and the index: put them into "
                "the environment of all of them (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...)"
            )

    def path(self, name: str) -> str:
        """The URI of `name` in the lake, or `name` itself if it is a URI or a path (that begins with / or .)."""
        return name if "://" in name or name.startswith(("/", ".")) else f"{self.uri.rstrip('/')}/{name}"

    def table(self, name: str, version: int | None = None) -> DeltaTable:
        """The Delta table `name`.

        Raises:
            LakeError: there is none, or not that version.
        """
        try:
            return DeltaTable(self.path(name), version=version, storage_options=self.options or None)
        except TableNotFoundError:
            if version is not None and self.exists(name):
                raise LakeError(f"table '{name}' at {self.path(name)} has no version {version} any more") from None
            raise LakeError(
                f"no Delta table '{name}' at {self.path(name)}: check the setting lake (a table of another name or place goes into "
                f"inputs.<interactions or items>.table); `python -m jobs.ingest` makes one of files"
            ) from None
        except Exception as error:
            if version is None:
                raise self._unreadable(name, error) from error
            raise LakeError(
                f"table '{name}' at {self.path(name)} has no readable version {version}: {error}"
            ) from error

    def exists(self, name: str) -> bool:
        """There is a Delta table `name`. Raises LakeError where nobody can tell."""
        try:
            return DeltaTable.is_deltatable(self.path(name), self.options or None)
        except (OSError, DeltaError) as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> LakeError:
        return LakeError(
            f"{self.path(name)} cannot be read: {' '.join(str(error).split())[:300]}. An object store wants its place and "
            "credentials in the environment (S3: AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )

    def version(self, name: str) -> int:
        return self.table(name).version()

    def pin(self, name: str, version: int | None = None) -> tuple[int, str]:
        """The newest version, or the given one, and the table's id at it: a table that was made anew begins at version 0 again.

        Raises:
            LakeError: as `table`.
        """
        delta = self.table(name, version)
        return delta.version(), str(delta.metadata().id)

    def read(
        self, name: str, *, columns: list[str] | None = None, version: int | None = None, **partition: Any
    ) -> pa.Table:
        """Rows of one of the project's own tables, of the given partition values only; no rows if there is no table yet.

        Of all columns: those of the contract that the table has. One that another release gave it is left out.
        """
        parts = list(self.batches(name, columns=columns, version=version, **partition))
        if parts:
            return pa.concat_tables(parts)
        empty = schema(name).arrow_schema.empty_table()
        return empty.select(columns) if columns else empty

    def batches(
        self, name: str, *, columns: list[str] | None = None, version: int | None = None, **partition: Any
    ) -> Iterator[pa.Table]:
        """What `read` gives, one batch of it after another."""
        if not self.exists(name):
            return
        types, delta = schema(name).arrow_schema, self.table(name, version)
        wanted = columns or [column.name for column in delta.schema().fields if column.name in types.names]
        predicate = " AND ".join(where(key, value) for key, value in partition.items()) or None
        try:
            for batch in pa.RecordBatchReader.from_stream(delta.scan(columns=wanted, predicate=predicate)):
                # scan() gives string_view, which other engines do not know: cast at once to what the contract says.
                yield pa.table(batch).cast(pa.schema([types.field(column) for column in batch.schema.names]))
        except (pa.ArrowException, OSError, DeltaError) as error:
            raise LakeError(
                f"table '{name}' at {self.path(name)}, version {delta.version()}, cannot be read (vacuumed?): {error}"
            ) from error

    def read_date(self, name: str, refresh_date: date, version: int, *, columns: list[str] | None = None) -> pa.Table:
        """A date's rows of an output table as they were at `version`; where that is gone, as they are now.

        Raises:
            LakeError: as `read`, of the newest version.
        """
        try:
            return self.read(name, columns=columns, version=version, refresh_date=refresh_date)
        except LakeError:
            return self.read(name, columns=columns, refresh_date=refresh_date)

    def commit(
        self,
        name: str,
        rows: pa.Table,
        *,
        app: str,
        sequence: int = 0,
        replace: dict[str, str | date | list[str]] | None = None,
        lineage: dict[str, Any] | None = None,
    ) -> int:
        """Append `rows`, or put them in place of those with the values `replace` (of a list: with one of them); returns the table's
        version that holds them.

        The commit carries the transaction (app, sequence): a second commit of it, or one with a lower sequence, changes
        nothing, whichever engine made the first. In columns that the contract does not know the rows are null.

        Raises:
            schemas.errors.ContractError: `rows` do not fit the table's schema.
            LakeError: other writers won every attempt, the table has a feature that delta-rs cannot write, or a column that the
                contract does not know and that may not be null.
        """
        contract = schema(name)
        rows = contract.conform(rows)
        properties = CommitProperties(
            custom_metadata={"lineage": json.dumps(lineage or {}, sort_keys=True, default=str)},
            app_transactions=[Transaction(app, sequence)],
        )
        if not self.exists(name):
            partitions = list(contract.partition_by)
            dated = "refresh_date" in partitions
            try:
                DeltaTable.create(
                    self.path(name),
                    contract.arrow_schema,
                    mode="error",
                    partition_by=partitions,
                    configuration=_PROPERTIES if dated else _CACHE_PROPERTIES,
                    description=contract.doc[:500],
                    storage_options=self.options or None,
                )
            except Exception:
                if not self.exists(name):  # otherwise another writer made it first
                    raise
        for _ in range(_ATTEMPTS):
            delta = self.table(name)
            before = delta.version()
            done = delta.transaction_version(app)
            if done is not None and done >= sequence:
                return delta.version()
            features = sorted(_UNWRITABLE & set(delta.protocol().writer_features or []))
            if features:
                raise LakeError(
                    f"table '{name}' at {self.path(name)} has features that delta-rs cannot write: {features}. The "
                    "project's own tables are plain: move this one away, or name another lake, and run again"
                )
            mode, predicate = "append", None
            if replace:
                mode, predicate = "overwrite", " AND ".join(where(k, v) for k, v in replace.items())
            try:
                if rows.num_rows or not replace:
                    write_deltalake(
                        delta,
                        rows,
                        mode=mode,
                        predicate=predicate,
                        schema_mode=_gains(delta, contract),
                        commit_properties=properties,
                    )
                else:
                    delta.delete(predicate, commit_properties=properties)
                return delta.version()
            except DeltaError as error:
                if isinstance(error, CommitFailedError) and self.version(name) > before:
                    continue  # another writer was first
                raise LakeError(f"table '{name}' at {self.path(name)} cannot be written: {error}") from error
        raise LakeError(f"table '{name}': other writers won {_ATTEMPTS} times; run again")

    def sequences(self, name: str, apps: list[str], version: int | None = None) -> list[int]:
        """The number that each of the transactions `apps` may use next, by the table at `version`.

        Usually 0. What was committed and is not in the table any more (rows were deleted) gets a higher one, so that it is
        written again; what another run commits meanwhile is not.
        """
        if not self.exists(name):
            return [0] * len(apps)
        delta = self.table(name, version)
        done = [delta.transaction_version(app) for app in apps]
        return [0 if number is None else number + 1 for number in done]


def where(column: str, value: str | date | list[str]) -> str:
    """A predicate of delta-rs: the column is this value, or one of these."""
    values = ", ".join(
        "'" + str(one).replace("'", "''") + "'" for one in (value if isinstance(value, list) else [value])
    )
    return f'"{column}" IN ({values})'


def _gains(delta: DeltaTable, contract: Table) -> Literal["merge"] | None:
    """merge, so that the table gets what its contract gained since it was made (columns that may be null), and rows get nulls in
    what the contract does not know: columns that a newer release gave the table. None where neither is needed, or columns are
    missing that may not be null.

    Raises:
        LakeError: of what the contract does not know, something may not be null.
    """
    known, there = {column.name for column in contract.columns}, delta.schema().fields
    unknown = [column for column in there if column.name not in known]
    if required := [column.name for column in unknown if not column.nullable]:
        raise LakeError(
            f"table '{contract.name}' at {delta.table_uri} has columns that may not be null and that this release does not know: "
            f"{required}. Write it with the release that they are of, or let them be null (deltalake: alter.drop_column_not_null)"
        )
    gained = [column for column in contract.columns if column.name not in {one.name for one in there}]
    return "merge" if (gained or unknown) and all(column.nullable for column in gained) else None
