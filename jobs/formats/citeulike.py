"""Format `citeulike`: citeulike-a as Parquet (interactions, items and, if there, split) or as released (users.dat, raw-data.csv).

Tags are never read: readers gave them after a paper was posted, so they would leak the answer into the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from jobs.formats import delimited, parquet_files
from jobs.formats.contract import FormatError, Request, TableSource, Tally, need, text_batch
from jobs.formats.files import SourceFile, decoded, lines

OPTIONS = ()
_ROWS = 65_536
_DIGITS = 18  # of a number that fits into int64


def open_source(request: Request) -> dict[str, TableSource]:
    """Raises FormatError if the folder holds neither layout."""
    source = request.folder("a folder with citeulike-a")
    if (source / "interactions.parquet").is_file():
        return parquet_files.open_source(Request(source=source))
    users, papers = source / "users.dat", source / "raw-data.csv"
    if users.is_file() and papers.is_file():
        return _released(users, papers)
    raise FormatError(
        f"{source} holds no citeulike-a: expected interactions.parquet and items.parquet (and split.parquet), or users.dat "
        "and raw-data.csv as released"
    )


def _released(users: Path, papers: Path) -> dict[str, TableSource]:
    libraries, texts = SourceFile(users), SourceFile(papers)
    names = delimited.header(texts, ",")
    need(texts.name, names, ("doc.id", "raw.title", "raw.abstract"))
    return {
        "interactions": TableSource((libraries,), partial(_libraries, libraries)),
        "items": TableSource((texts,), partial(_papers, texts, names)),
    }


def _libraries(file: SourceFile, tally: Tally) -> Iterator[pa.RecordBatch]:
    """A line a user, numbered from 0: how many papers, then their numbers (from 0)."""
    users: list[str] = []
    papers: list[str] = []
    for user, line in enumerate(lines(file)):
        count, *numbers = line.split()
        if not all(n.isdigit() for n in numbers) or count != str(len(numbers)).encode():
            tally.rows_in += 1
            tally.reject("unparseable_line", line.decode("utf-8", "backslashreplace"))
            continue
        tally.rows_in += len(numbers)
        users += [str(user)] * len(numbers)
        papers += [n.decode() for n in numbers]
        if len(users) >= _ROWS:
            yield pa.record_batch([pa.array(users), pa.array(papers)], names=["user_id", "item_id"])
            users, papers = [], []
    if users:
        yield pa.record_batch([pa.array(users), pa.array(papers)], names=["user_id", "item_id"])


def _papers(file: SourceFile, names: list[str], tally: Tally) -> Iterator[pa.RecordBatch]:
    """Papers; `doc.id` counts from 1 and users.dat from 0."""
    wanted = {"item_id": "doc.id", "title": "raw.title", "text": "raw.abstract"}
    for batch in delimited.read(file, names, wanted, tally):
        rows: list[tuple[str | None, ...]] = []
        for number, *texts in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if not (number or b"").isdigit() or len(number) > _DIGITS:
                tally.reject("unparseable_line", f"doc.id {number!r}")
                continue
            rows.append((str(int(number) - 1), *(None if text is None else decoded(text) for text in texts)))
        if rows:
            yield text_batch(rows, list(wanted))
