"""The command `python -m jobs.ingest`, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import ingest


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, dict[str, Any], str]:
    """Exit status, the summary's tables, stderr."""
    status = ingest.main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, json.loads(captured.out)["tables"] if status == 0 else {}, captured.err
