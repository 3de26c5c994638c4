"""Format `parquet`: a folder with interactions.parquet, items.parquet and perhaps split.parquet (or folders of parts)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.formats import columns, folder
from jobs.formats.contract import FormatError, Request, TableSource, Tally
from jobs.formats.files import SourceFile

OPTIONS = ("interactions", "items", "split", "map", "time_unit")
# Texts may be long: few rows at a time keep the memory small.
_ROWS = {"interactions": 65_536, "items": 1_024, "split": 65_536}


def open_source(request: Request) -> dict[str, TableSource]:
    """Raises FormatError if a file or column is missing, or a file is no Parquet."""
    mapping = columns.parse(request.map)
    tables = {}
    for table, files in folder.find(request, (".parquet", ".pq")).items():
        wanted = [(file, columns.resolve(table, columns_of(file), mapping[table], file.name)) for file in files]
        tables[table] = TableSource(files, partial(_read, table, wanted), {"map": mapping[table]})
    return tables


def columns_of(file: SourceFile) -> list[str]:
    """The names of the columns of a Parquet file. Raises FormatError if it is none."""
    try:
        return list(pq.read_schema(file.path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{file.name} is no readable Parquet file: {error}") from error


def _read(table: str, wanted: list[tuple[SourceFile, dict[str, str]]], tally: Tally) -> Iterator[pa.RecordBatch]:
    for file, ours in wanted:
        yield from read(file, ours, tally, _ROWS[table])


def read(file: SourceFile, wanted: dict[str, str], tally: Tally, rows: int = 65_536) -> Iterator[pa.RecordBatch]:
    """Batches of at most `rows` rows with the columns `wanted` (our name -> the file's).

    Raises:
        FormatError: the file is damaged.
    """
    try:
        with pq.ParquetFile(file.path, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(batch_size=rows, columns=list(dict.fromkeys(wanted.values()))):
                tally.rows_in += batch.num_rows
                yield pa.record_batch([batch.column(theirs) for theirs in wanted.values()], names=list(wanted))
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{file.name} is no readable Parquet file: {error}") from error
