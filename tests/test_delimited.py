"""CSV that is none: an error or rejected lines, never hours."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from jobs.formats import delimited
from jobs.formats.contract import FormatError, Tally
from jobs.formats.files import SourceFile


def _read(path: Path, names: list[str]) -> tuple[list[dict[str, bytes]], Tally]:
    tally = Tally("interactions")
    batches = delimited.read(SourceFile(path), names, {"user_id": "u", "item_id": "i"}, tally)
    return [row for batch in batches for row in batch.to_pylist()], tally


def test_some_quotes_that_are_never_closed_cost_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text("u,i\n" + 'a","x\n' * 99 + "u1,i1\n")
    rows, tally = _read(file, ["u", "i"])
    assert rows == [{"user_id": b"u1", "item_id": b"i1"}]
    assert (tally.rows_in, tally.rejected["unparseable_line"]) == (100, 99)


def test_many_quotes_that_are_never_closed_are_an_error_at_once(tmp_path: Path) -> None:
    """Each of them would have the rest of the file read again."""
    file = tmp_path / "many.csv"
    file.write_text("u,i\n" + 'a","x\n' * 200_000)
    with pytest.raises(FormatError, match=r"many\.csv: more than 100 quotes are opened and never closed"):
        _read(file, ["u", "i"])


def test_a_first_line_may_be_as_long_as_any(tmp_path: Path) -> None:
    csv.field_size_limit(2**17)  # Python's own limit
    file = tmp_path / "header.csv"
    file.write_text("u" * 200_000 + ",i\n")
    assert delimited.header(SourceFile(file), ",") == ["u" * 200_000, "i"]
