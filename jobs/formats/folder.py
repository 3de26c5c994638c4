"""What the formats `parquet` and `csv` share: a folder with a file (or folder of parts) a table, or files that are named."""

from __future__ import annotations

from pathlib import Path

from jobs.formats.columns import TABLES
from jobs.formats.contract import FormatError, Request, existing
from jobs.formats.files import SourceFile, table_files, within


def find(request: Request, endings: tuple[str, ...]) -> dict[str, tuple[SourceFile, ...]]:
    """Table -> its files. A file or folder that is named wins over what lies in `--source`.

    Raises:
        FormatError: nothing there.
        jobs.formats.files.FileError: several candidates for one table.
    """
    found: dict[str, tuple[SourceFile, ...]] = {}
    folder = None
    if request.source is not None:
        folder = existing(request.source, f"a folder with interactions{endings[0]} and items{endings[0]}")
        if not folder.is_dir():
            raise FormatError(f"--source {folder} is a file; name files with --interactions, --items and --split")
    for table in TABLES:
        named: Path | None = getattr(request, table)
        if named is not None:
            existing(named, f"the {table}: a file, or a folder of {endings[0]} files")
            found[table] = within(named, endings) if named.is_dir() else (SourceFile(named),)
        elif folder is not None:
            found[table] = table_files(folder, table, endings)
    found = {table: files for table, files in found.items() if files}
    if not found:
        where = f"in {folder}" if folder else "named"
        raise FormatError(
            f"no table {where}: expected interactions{endings[0]} and items{endings[0]} (endings {list(endings)}) in the "
            "folder --source, or --interactions FILE --items FILE"
        )
    return found
