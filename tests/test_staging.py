"""A folder with a manifest."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import staging
from jobs.staging import MANIFEST, Staging, StagingError


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
