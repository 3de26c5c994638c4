"""Where a path or URI points: the local file system, or what pyarrow knows by the scheme (s3, gs, abfss)."""

from __future__ import annotations

from pyarrow import fs


def located(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of `uri`, and the path in it."""
    return fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
