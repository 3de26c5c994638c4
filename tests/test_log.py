"""What is said to a person."""

from __future__ import annotations

import pytest

from jobs import cli
from jobs.run import log
from schemas.errors import ColdRefreshError


def test_what_came_from_outside_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> dict[str, str]:
        raise ColdRefreshError("item \x1b]0;owned\x07 is none\nsay\tmore")

    log("item \x1b[2J\r\x9b")
    assert cli.main(job) == 1
    assert capsys.readouterr().err == ("item \\x1b[2J\\x0d\\x9b\nerror: item \\x1b]0;owned\\x07 is none\nsay\tmore\n")
