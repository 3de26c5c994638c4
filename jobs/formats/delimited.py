"""Delimited text as raw batches of bytes: CSV with quotes, or lines with a separator such as tab, `|` or `::`.

A block without quotes is parsed by Arrow at full speed; one that has quotes, or in which a line does not fit, goes
record by record, so that a bad line costs that line only. A quote that is never closed costs the line it is on, not
the rest of the file; many of them are no CSV with quotes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv as pa_csv

from jobs.formats.contract import FormatError, Tally
from jobs.formats.files import BLOCK_BYTES, MAX_LINE_BYTES, SourceFile, line_blocks

_ROWS = 8192
# A quoted field that runs over more lines than this holds is a quote that was never closed.
_RECORD_BYTES = 16 << 20
# Quotes of a block that are never closed. To find each of them the rest of the block is read.
_UNCLOSED = 100
# Stands for a separator of several characters; no text holds the "unit separator".
_STAND_IN = "\x1f"


def header(file: SourceFile, delimiter: str) -> list[str]:
    """The column names in the first line of `file`.

    Raises:
        FormatError: the file is empty, or its first line is no UTF-8.
    """
    for block in line_blocks(file, 1 << 16):
        line = block.lstrip(b"\r\n").split(b"\n", 1)[0]
        if line.strip():
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise FormatError(f"{file.name}: the first line, with the column names, is no UTF-8") from error
            csv.field_size_limit(MAX_LINE_BYTES)
            return [name.strip() for name in next(csv.reader([text.rstrip("\r")], delimiter=delimiter))]
    raise FormatError(f"{file.name} is empty: it has not even a line of column names")


def read(
    file: SourceFile,
    names: list[str],
    wanted: dict[str, str],
    tally: Tally,
    *,
    delimiter: str = ",",
    has_header: bool = True,
    quoted: bool = True,
) -> Iterator[pa.RecordBatch]:
    """Raw batches of binary columns, one for each of our names in `wanted` (our name -> name in `names`).

    Args:
        names: all the file's columns, in its order; a line with another number of fields is rejected.
        delimiter: a character; or a string such as `::`, where `quoted` is False.

    Raises:
        FormatError: many quotes are opened and never closed.
    """
    joined = delimiter if len(delimiter) == 1 else _STAND_IN
    positions = [names.index(theirs) for theirs in wanted.values()]
    ours = list(wanted)
    carry = b""
    skip_header = has_header
    blocks = line_blocks(file)
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        if skip_header:
            block = block.lstrip(b"\r\n").split(b"\n", 1)[-1] if b"\n" in block.lstrip(b"\r\n") else b""
            skip_header = False
        if joined != delimiter:
            block = block.replace(delimiter.encode(), joined.encode())
        block = carry + block.replace(b"\r\n", b"\n")
        carry = b""
        batch = _fast(block, len(names), positions, ours, joined, quoted)
        if batch is not None:
            for chunk in batch.to_batches(max_chunksize=_ROWS * 8):
                tally.rows_in += chunk.num_rows
                yield chunk
        else:
            records = _Records(file.name, block, joined, quoted, last=following is None)
            yield from _slow(records, len(names), positions, ours, tally)
            carry = records.rest
        block = following


def _fast(
    block: bytes, width: int, positions: list[int], ours: list[str], delimiter: str, quoted: bool
) -> pa.Table | None:
    """The block as Arrow parses it; None if that is not sure to be right."""
    if (quoted and b'"' in block) or b"\r" in block:
        return None
    names = [str(i) for i in range(width)]
    include = list(dict.fromkeys(names[p] for p in positions))
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(block),
            read_options=pa_csv.ReadOptions(
                column_names=names, use_threads=False, block_size=max(BLOCK_BYTES, len(block) + 1)
            ),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(include, pa.binary()),
                include_columns=include,
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        return None
    return pa.table([table.column(names[p]) for p in positions], names=ours)


class _Records:
    """The records of a block, each a list of fields, or the bytes of a line that is none.

    After the iteration, `rest` holds a record that the block began and did not end.
    """

    def __init__(self, name: str, block: bytes, delimiter: str, quoted: bool, *, last: bool) -> None:
        # Broken UTF-8 survives as surrogates and is turned back into the same bytes.
        self._lines = block.decode("utf-8", "surrogateescape").split("\n")
        if self._lines[-1] == "":
            self._lines.pop()
        self._name, self._delimiter, self._quoted, self._last = name, delimiter, quoted, last
        self.rest = b""

    def __iter__(self) -> Iterator[list[str] | str]:
        csv.field_size_limit(MAX_LINE_BYTES)
        at, unclosed = 0, 0
        while at < len(self._lines):
            # The reader is made anew after each bad line: it starts at the line after it.
            feed = _Feed(self._lines, at)
            if self._quoted:
                reader = csv.reader(feed, delimiter=self._delimiter, strict=True)
            else:
                reader = csv.reader(feed, delimiter=self._delimiter, quoting=csv.QUOTE_NONE, strict=True)
            try:
                for record in reader:
                    at = feed.next
                    if record:
                        yield record
                at = len(self._lines)
            except csv.Error as error:
                if "unexpected end" in str(error) and not self._last:
                    tail = "\n".join(self._lines[at:])
                    if len(tail) < _RECORD_BYTES:
                        self.rest = (tail + "\n").encode("utf-8", "surrogateescape")
                        return
                unclosed += "unexpected end" in str(error)
                if unclosed > _UNCLOSED:
                    raise FormatError(
                        f"{self._name}: more than {_UNCLOSED} quotes are opened and never closed, the last of them in the line "
                        f"{self._lines[at][:80]!r}: it is no CSV with quotes; export it anew"
                    ) from error
                yield self._lines[at]
                at += 1


class _Feed:
    """Lines from `start` on, and which one comes next."""

    def __init__(self, lines: list[str], start: int) -> None:
        self._lines, self.next = lines, start

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        if self.next >= len(self._lines):
            raise StopIteration
        self.next += 1
        return self._lines[self.next - 1] + "\n"


def _slow(
    records: _Records, width: int, positions: list[int], ours: list[str], tally: Tally
) -> Iterator[pa.RecordBatch]:
    columns: list[list[bytes | None]] = [[] for _ in positions]
    for record in records:
        tally.rows_in += 1
        if isinstance(record, str) or len(record) != width:
            text = record if isinstance(record, str) else " | ".join(record)
            tally.reject(
                "unparseable_line", text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            )
            continue
        for column, position in zip(columns, positions, strict=True):
            column.append(record[position].encode("utf-8", "surrogateescape") or None)
        if len(columns[0]) == _ROWS:
            yield _batch(columns, ours)
            columns = [[] for _ in positions]
    if columns[0]:
        yield _batch(columns, ours)


def _batch(columns: list[list[bytes | None]], ours: list[str]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(column, pa.binary()) for column in columns], names=ours)
