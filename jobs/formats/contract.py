"""What a format is: one file beside this one with `OPTIONS` and `open_source(request) -> {table: TableSource}`.

A format finds its files and yields raw Arrow batches under our column names, in whatever types the files have;
jobs/formats/clean.py turns them into the types of schemas/*.yaml, and jobs/ingest.py commits them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.formats.files import SourceFile
from schemas.errors import ColdRefreshError

_EXAMPLES = 3


class FormatError(ColdRefreshError):
    """The source cannot be read in this format: the message names the file, what was expected and the remedy."""


@dataclass
class Tally:
    """What became of the rows of one table: rows_in = rows_out + all rejected + all left out."""

    table: str
    rows_in: int = 0
    rows_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, reason: str, example: object = "", rows: int = 1) -> None:
        """Count `rows` rows that cannot be used; the first few examples of a reason are kept."""
        self.rejected[reason] += rows
        kept = self.examples.setdefault(reason, [])
        if len(kept) < _EXAMPLES:
            text = example if isinstance(example, str) else repr(example)
            kept.append(text if len(text) <= 160 else text[:157] + "...")

    def wants_example(self, reason: str) -> bool:
        """False once enough examples of `reason` are kept: making more would be wasted work."""
        return len(self.examples.get(reason, ())) < _EXAMPLES

    def balanced(self) -> bool:
        return self.rows_in == self.rows_out + self.rejected.total() + self.left_out.total()


@dataclass(frozen=True)
class TableSource:
    """One table of a source.

    `files` and `settings` are its identity: the same content read in the same way is never written twice. `read` yields
    raw batches and adds every row that it has read to `rows_in` of the tally, those that it rejects itself included.
    """

    files: tuple[SourceFile, ...]
    read: Callable[[Tally], Iterator[pa.RecordBatch]]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What the command line asked for; `OPTIONS` of a format names those it understands besides `source`."""

    source: Path | None = None
    interactions: Path | None = None
    items: Path | None = None
    split: Path | None = None
    map: tuple[str, ...] = ()
    delimiter: str | None = None
    time_unit: str | None = None

    def folder(self, what: str) -> Path:
        """`source`, which must be there.

        Raises:
            FormatError: no source given, or none at that place.
        """
        if self.source is None:
            raise FormatError(f"--source is missing: {what}")
        return existing(self.source, what)


def existing(path: Path, what: str) -> Path:
    """`path`, if there is something.

    Raises:
        FormatError: there is nothing.
    """
    if not path.exists():
        raise FormatError(f"no such source: {path} (expected {what})")
    return path


def need(name: str, held: list[str], wanted: Iterable[str]) -> None:
    """All of the columns `wanted` are among those `held` by the file `name`.

    Raises:
        FormatError: some are not.
    """
    absent = [column for column in wanted if column not in held]
    if absent:
        raise FormatError(f"{name} has no column {absent}; it has {held}")


def text_batch(rows: Iterable[Sequence[str | None]], names: list[str]) -> pa.RecordBatch:
    """Rows, one at least, as a batch with columns `names` of text."""
    return pa.record_batch([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names=names)
