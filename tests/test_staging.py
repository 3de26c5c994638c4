"""A folder with a manifest."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import staging
from jobs.run import Run, execute
from jobs.staging import MANIFEST, Staging, StagingError
from tests.staged_night import run_of


def test_of_two_attempts_the_later_one_owns_the_folder(tmp_path: Path) -> None:
    folder = Staging(str(tmp_path / "stage"))
    first = folder.claim()
    folder.write("a", pa.table({"n": [1]}))
    assert folder.is_claimed(first)
    second = folder.claim()
    assert (folder.is_claimed(first), folder.is_claimed(second)) == (False, True)
    assert folder.children() == []
    folder.clear()
    assert not folder.is_claimed(second)


def test_a_stage_that_another_process_has_begun_again_does_not_complete(tmp_path: Path) -> None:
    """What the other removed would be missing, and the stage would count as complete."""
    run = run_of(tmp_path, date(2026, 3, 1))

    def stage(run: Run, out: Staging) -> dict[str, int]:
        out.write("first", pa.table({"n": [1]}))
        out.claim()  # as the other process does
        out.write("second", pa.table({"n": [1]}))
        return {}

    with pytest.raises(StagingError, match="another process has begun this stage of run 20260301-"):
        execute(run, "cf", stage)
    assert not run.staging("cf").is_complete()
    assert run.recorded() == {}


def test_the_manifest_is_of_every_file_and_files_are_hashed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Staging(str(tmp_path / "stage"))
    folder.write("b", pa.table({"n": range(5)}))
    folder.write_bytes("a/body", b"some bytes")
    folder.write_bytes("b/_SUCCESS", b"")
    folder.write_bytes("b/.part.crc", b"x")
    both, sha256 = threading.Barrier(2, timeout=60), hashlib.sha256

    class Hashlib:
        @staticmethod
        def sha256() -> object:
            both.wait()
            return sha256()

    monkeypatch.setattr(staging, "hashlib", Hashlib)
    folder.complete({"rows": 5})
    part = (tmp_path / "stage/b/part-0.parquet").read_bytes()
    expected = {
        "a/body": {"bytes": 10, "sha256": sha256(b"some bytes").hexdigest()},
        "b/part-0.parquet": {"bytes": len(part), "rows": 5, "sha256": sha256(part).hexdigest()},
    }
    manifest = json.loads((tmp_path / "stage" / MANIFEST).read_text())
    assert manifest == {"facts": {"rows": 5}, "files": expected}
    folder.verify()
    folder.write_bytes("a/body", b"other byte")
    with pytest.raises(StagingError, match="a/body is not what its manifest says"):
        folder.verify()
