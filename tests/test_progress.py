"""How far a loop is: lines on stderr, or where a training logs."""

from __future__ import annotations

import pytest

from udfs.progress import Progress


def test_lines_on_stderr_end_with_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 5, "texts", seconds=0.0) as progress:
        for count in (2, 1, 2):
            progress.advance(count)
    lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["[encode] 2 of 5 texts", "[encode] 3 of 5 texts", "[encode] 5 of 5 texts"]


def test_lines_in_a_log_leave_the_last_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with Progress("of this epoch", 4, "items", seconds=0.0, log=lines.append) as progress:
        progress.advance(3)
        progress.advance(1)
    assert [line.split(",")[0] for line in lines] == ["of this epoch: 3 of 4 items"]
    assert capsys.readouterr().err == ""


def test_not_more_often_than_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", None, "texts", seconds=3600.0) as progress:
        for _ in range(10):
            progress.advance(1)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["[encode] 10 texts"]
