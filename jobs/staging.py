"""A folder that is complete or does not count: files first, then a manifest with their rows and checksums.

Stages leave their results so (under `_staging/<run_id>/<stage>`), and so do artifacts, which are named by their content
(`_artifacts/spaces/<version>`, `_artifacts/models/<version>`).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from schemas.errors import ColdRefreshError
from udfs.filesystems import located

MANIFEST = "manifest.json"
_REFUSED = "refused.txt"
_ATTEMPT = ".attempt"  # no content: the manifest leaves it out
# Hashing lets other threads run, and a store answers several requests at once.
_THREADS = 8


class StagingError(ColdRefreshError):
    """A staged file is not what its manifest says, or is read before it is complete."""


def _facts(filesystem: fs.FileSystem, info: fs.FileInfo) -> dict[str, Any]:
    """What the manifest says of a file."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(info.path) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    facts = {"bytes": info.size, "sha256": digest.hexdigest()}
    if info.path.endswith(".parquet"):
        facts["rows"] = pq.read_metadata(info.path, filesystem=filesystem).num_rows
    return facts


@dataclass(frozen=True)
class Staging:
    """One folder, at `uri`, with a manifest when complete."""

    uri: str

    def path(self, name: str) -> str:
        """Where `name` is: a file, or the folder of a table that Spark writes."""
        return f"{self.uri}/{name}"

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole."""
        filesystem, root = located(self.uri)
        target = f"{root}/{name}"
        filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        with filesystem.open_output_stream(target) as stream:
            stream.write(content)

    def write(self, name: str, table: pa.Table) -> None:
        """Write `table` as `<name>/part-0.parquet`, so that a table is a folder whoever wrote it."""
        filesystem, root = located(self.uri)
        filesystem.create_dir(f"{root}/{name}", recursive=True)
        pq.write_table(table, f"{root}/{name}/part-0.parquet", filesystem=filesystem, compression="zstd")

    def _files(self) -> dict[str, dict[str, Any]]:
        filesystem, root = located(self.uri)
        listing = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        names = {
            info.path[len(root) + 1 :]: info
            for info in sorted(listing, key=lambda i: i.path)
            if info.type == fs.FileType.File and not info.base_name.startswith(("_SUCCESS", "."))
        }
        names.pop(MANIFEST, None)
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(partial(_facts, filesystem), names.values()), strict=True))

    def complete(self, facts: dict[str, Any]) -> None:
        """Write the manifest: from here on the folder counts. `facts` are kept in it (JSON)."""
        body = json.dumps({"facts": facts, "files": self._files()}, indent=1, sort_keys=True, default=str).encode()
        filesystem, root = located(self.uri)
        # Object stores write a file whole; a local file is moved into its name, so that a kill leaves all or nothing.
        self.write_bytes(MANIFEST + ".part", body)
        filesystem.move(f"{root}/{MANIFEST}.part", f"{root}/{MANIFEST}")

    def is_complete(self) -> bool:
        filesystem, root = located(self.uri)
        return filesystem.get_file_info(f"{root}/{MANIFEST}").type == fs.FileType.File

    def refuse(self, why: str) -> None:
        """Note that what the stage was given is not what it must be; `clear` takes the note back."""
        self.write_bytes(_REFUSED, why.encode())

    def is_refused(self) -> bool:
        filesystem, root = located(self.uri)
        return filesystem.get_file_info(f"{root}/{_REFUSED}").type == fs.FileType.File

    def _manifest(self) -> dict[str, Any]:
        if not self.is_complete():
            raise StagingError(f"{self.uri} is not complete: its stage has not run (or was killed); run it first")
        return json.loads(self.read_bytes(MANIFEST))

    def facts(self) -> dict[str, Any]:
        """What the stage said of itself.

        Raises:
            StagingError: the folder is not complete.
        """
        return self._manifest()["facts"]

    def verify(self) -> None:
        """Raises StagingError if a file is gone or differs from its checksum."""
        expected, found = self._manifest()["files"], self._files()
        for name, facts in expected.items():
            if found.get(name) != facts:
                raise StagingError(
                    f"{self.path(name)} is not what its manifest says ({found.get(name, 'absent')}); "
                    f"remove the folder {self.uri} and run again"
                )

    def read_bytes(self, name: str) -> bytes:
        filesystem, root = located(self.uri)
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            return stream.read()

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The staged table `name`."""
        filesystem, root = located(self.uri)
        return pq.read_table(f"{root}/{name}", columns=columns, filesystem=filesystem, partitioning=None)

    def batches(self, name: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The staged table `name` piece by piece, for one that need not fit into memory."""
        filesystem, root = located(self.uri)
        yield from ds.dataset(f"{root}/{name}", filesystem=filesystem, format="parquet").to_batches(columns=columns)

    def clear(self) -> None:
        """Remove what a killed stage may have left."""
        filesystem, root = located(self.uri)
        if filesystem.get_file_info(root).type == fs.FileType.Directory:
            # First what says that it is whole: killed half way, the rest is not.
            if filesystem.get_file_info(f"{root}/{MANIFEST}").type == fs.FileType.File:
                filesystem.delete_file(f"{root}/{MANIFEST}")
            filesystem.delete_dir(root)

    def claim(self) -> str:
        """Empty the folder for an attempt to fill it, whose name this is."""
        self.clear()
        attempt = uuid.uuid4().hex
        self.write_bytes(_ATTEMPT, attempt.encode())
        return attempt

    def is_claimed(self, attempt: str) -> bool:
        """Nobody has claimed the folder since `attempt` did."""
        filesystem, root = located(self.uri)
        there = filesystem.get_file_info(f"{root}/{_ATTEMPT}").type == fs.FileType.File
        return there and self.read_bytes(_ATTEMPT).decode() == attempt

    def changed(self) -> datetime:
        """When the newest file in it was written; a folder without files is as old as can be."""
        filesystem, root = located(self.uri)
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        times = [info.mtime for info in found if info.type == fs.FileType.File and info.mtime is not None]
        return max(times, default=datetime.min.replace(tzinfo=UTC))

    def children(self) -> list[str]:
        """Names of the folders in this one."""
        filesystem, root = located(self.uri)
        listing = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in listing if info.type == fs.FileType.Directory)
