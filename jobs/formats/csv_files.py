"""Format `csv`: a folder with interactions.csv, items.csv and perhaps split.csv (also .tsv, and either with .gz or .bz2)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from jobs.formats import columns, delimited, folder
from jobs.formats.contract import FormatError, Request, TableSource, Tally
from jobs.formats.files import SourceFile

OPTIONS = ("interactions", "items", "split", "map", "delimiter", "time_unit")
_ENDINGS = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv") for packed in ("", ".gz", ".bz2"))


def open_source(request: Request) -> dict[str, TableSource]:
    """Raises FormatError if a file or column is missing, or the delimiter is no single character."""
    mapping = columns.parse(request.map)
    if request.delimiter is not None and len(request.delimiter.encode()) != 1:
        raise FormatError(
            f"--delimiter {request.delimiter!r} must be one character, such as ',' or ';' (or \\t for tab)"
        )
    tables = {}
    for table, files in folder.find(request, _ENDINGS).items():
        parts = []
        for file in files:
            delimiter = request.delimiter or ("\t" if ".tsv" in file.path.suffixes else ",")
            names = delimited.header(file, delimiter)
            parts.append((file, names, columns.resolve(table, names, mapping[table], file.name), delimiter))
        settings = {"map": mapping[table], "delimiter": request.delimiter}
        tables[table] = TableSource(files, partial(_read, parts), settings)
    return tables


def _read(parts: list[tuple[SourceFile, list[str], dict[str, str], str]], tally: Tally) -> Iterator[pa.RecordBatch]:
    for file, names, wanted, delimiter in parts:
        yield from delimited.read(file, names, wanted, tally, delimiter=delimiter)
