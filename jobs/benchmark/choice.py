"""Which rows of a benchmark are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.errors import ColdRefreshError

#: Of an option --rows.
HELP = "only these rows: a name as in the table for that row alone, or the beginning of several"


def chosen(asked: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of `known`, in their order, that are asked for by name, or else by the beginning of it; all of them by default.

    Raises:
        ColdRefreshError: nothing is called so.
    """
    if not asked:
        return list(known)
    found = {name: [name] if name in known else [one for one in known if one.startswith(name)] for name in asked}
    if unknown := [name for name, rows in found.items() if not rows]:
        raise ColdRefreshError(f"--rows {unknown}: there are {list(known)}")
    wanted = {row for rows in found.values() for row in rows}
    return [name for name in known if name in wanted]
