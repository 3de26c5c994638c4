"""How far a loop is: lines on stderr, or where a training logs."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest

from tests.test_filterllm import _options
from tests.test_filterllm_resume import _frozen
from udfs import progress as module
from udfs.progress import Progress


def test_lines_on_stderr_end_with_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 5, "texts", seconds=0.0) as progress:
        for texts in (2, 1, 2):
            progress.advance(texts)
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
    with Progress("encode", 10, "texts", seconds=3600.0) as progress:
        for _ in range(10):
            progress.advance(1)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["[encode] 10 of 10 texts"]


def test_a_long_epoch_says_each_minute_how_far_it_is(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """With a clock on which every step takes 40 seconds; what is trained does not look at it."""
    plain, lines = _frozen(_options(epochs=1, batch_size=16))[0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=count(0, 40).__next__))
    timed = _frozen(_options(epochs=1, batch_size=16), log=lines.append)[0]
    within = [line for line in lines if line.startswith("of this epoch: ")]
    assert within
    assert lines.index(within[0]) < next(n for n, line in enumerate(lines) if line.startswith("epoch 1/1"))
    assert timed == plain
