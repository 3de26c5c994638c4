"""Which of a file's columns is which of ours: `--map interactions.event_time=ts`; the others must have our names."""

from __future__ import annotations

from jobs.formats.contract import FormatError
from jobs.run import log
from schemas.table import table as schema

TABLES = ("interactions", "items", "split")


def parse(options: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """table -> our column -> the file's column.

    Raises:
        FormatError: an option is not TABLE.COLUMN=NAME, or names no column of ours.
    """
    mapping: dict[str, dict[str, str]] = {name: {} for name in TABLES}
    for option in options:
        ours, separator, theirs = option.partition("=")
        table, dot, column = ours.partition(".")
        if not (separator and dot and theirs) or table not in mapping:
            raise FormatError(
                f"--map {option!r}: expected TABLE.COLUMN=NAME with a table of {list(TABLES)}, "
                "such as interactions.event_time=ts"
            )
        known = [c.name for c in schema(table).columns]
        if column not in known:
            raise FormatError(f"--map {option!r}: '{table}' has no column '{column}'; it has {known}")
        mapping[table][column] = theirs
    return mapping


def resolve(table: str, held: list[str], mapping: dict[str, str], file: str) -> dict[str, str]:
    """Our column -> the file's, for the columns that the file has; what is not read is logged.

    Raises:
        FormatError: a column that was mapped, or that we cannot do without, is missing.
    """
    wanted: dict[str, str] = {}
    for column in schema(table).columns:
        theirs = mapping.get(column.name, column.name)
        if theirs in held:
            wanted[column.name] = theirs
        elif column.name in mapping or not column.optional:
            text_instead = column.name == "title" and mapping.get("text", "text") in held
            if column.name in mapping or not text_instead:
                raise FormatError(
                    f"{file} has no column '{theirs}' for {table}.{column.name}; it has {held}. "
                    f"Name the right one: --map {table}.{column.name}=NAME"
                )
    twice = sorted({name for name in wanted.values() if held.count(name) > 1})
    if twice:
        raise FormatError(f"{file} has several columns called {twice}: rename all but one")
    unread = [name for name in held if name not in wanted.values()]
    if unread:
        log(f"[ingest] {table}: columns {unread} are not read (--map {table}.COLUMN=NAME reads one)")
    return wanted
