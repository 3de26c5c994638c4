"""The files of a source: plain, compressed or a member of a zip, read as a stream, block by block of whole lines."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from schemas.errors import ColdRefreshError

# The Delta writer queues some tens of batches, and a batch is a block: small blocks keep the memory small.
BLOCK_BYTES = 2 << 20
# A longer line is no line of text: it would be held in memory whole.
MAX_LINE_BYTES = 64 << 20


class FileError(ColdRefreshError):
    """A file is damaged or no file of its kind: the message names it."""


@dataclass(frozen=True)
class SourceFile:
    """A file, or the member `member` of the zip file `path`."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    @contextmanager
    def open(self, *, decompress: bool = True) -> Iterator[IO[bytes]]:
        """The content as a stream of bytes; `.gz` and `.bz2` are decompressed.

        Raises:
            FileError: the file is truncated, damaged, encrypted or unreadable.
        """
        suffix = Path(self.member or self.path).suffix
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                    yield stream
            elif decompress and suffix == ".gz":
                with gzip.open(self.path, "rb") as stream:
                    yield stream  # type: ignore[misc]
            elif decompress and suffix == ".bz2":
                with bz2.open(self.path, "rb") as stream:
                    yield stream  # type: ignore[misc]
            else:
                with self.path.open("rb") as stream:
                    yield stream
        except ColdRefreshError:
            raise
        # RuntimeError and NotImplementedError are what zipfile says of encrypted and of oddly compressed members.
        except (EOFError, OSError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise FileError(
                f"{self.name} cannot be read to its end ({error}): it may be truncated or damaged; fetch it again. "
                "Its table has not been written"
            ) from error

    def sha256(self) -> str:
        """Hash of the content; of a zip's member, decompressed, so that a zip and its folder are the same source."""
        with self.open(decompress=False) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def line_blocks(file: SourceFile, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Blocks of about `size` bytes that end with a line's end (the last one may lack it).

    Raises:
        FileError: the file is damaged, or a line is longer than MAX_LINE_BYTES.
    """
    with file.open() as stream:
        parts: list[bytes] = []
        held = 0
        while chunk := stream.read(size):
            end = chunk.rfind(b"\n") + 1
            if end:
                yield b"".join([*parts, chunk[:end]])
                parts, held = [], 0
            if chunk[end:]:
                parts.append(chunk[end:])
                held += len(chunk) - end
            if held > MAX_LINE_BYTES:
                raise FileError(
                    f"{file.name} has a line of more than {MAX_LINE_BYTES >> 20} MB: it is no file of lines"
                )
        if parts:
            yield b"".join(parts)


def lines(file: SourceFile) -> Iterator[bytes]:
    """Lines without their ends; blank ones are left out."""
    for block in line_blocks(file):
        for line in block.split(b"\n"):
            stripped = line.rstrip(b"\r")
            if stripped.strip():
                yield stripped


def decoded(text: bytes) -> str:
    """Of UTF-8, or else of Latin-1, in which every byte is a letter: some releases mix the two."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def table_files(folder: Path, table: str, endings: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """The files of `table` in `folder`: `<table><ending>`, or those with such an ending in the folder `<table>/`.

    Returns:
        The files in the order of their names; none if there is no such table.

    Raises:
        FileError: there are several candidates.
    """
    single = [folder / f"{table}{ending}" for ending in endings if (folder / f"{table}{ending}").is_file()]
    parts = within(folder / table, endings) if (folder / table).is_dir() else ()
    if len(single) + bool(parts) > 1:
        found = sorted([p.name for p in single] + ([f"{table}/"] if parts else []))
        raise FileError(f"{folder} has several candidates for table '{table}': {found}; name one with --{table}")
    return (SourceFile(single[0]),) if single else parts


def within(folder: Path, endings: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """The files right in `folder` with one of `endings`, by name; hidden ones and those of `_...` are left out."""
    found = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith((".", "_")))
    return tuple(SourceFile(p) for p in found if p.name.endswith(endings))
