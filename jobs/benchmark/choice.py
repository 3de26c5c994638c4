"""The rows of a benchmark: what each changes, which are asked for, and which text encoders they are measured with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.errors import ColdRefreshError

#: Of an option --rows.
HELP = "only these rows: a name as in the table for that row alone, or the beginning of several"

#: Of an option --encoder.
ENCODER_HELP = "another text encoder to compare, from any folder: its rows are called after NAME"

# What a benchmark itself decides.
_OWN = ("lake", "seed", "evaluate.part")


@dataclass(frozen=True)
class Row:
    """What a row changes, as key=value. overrides: what makes it this row; usual: what it is tuned to, which --set may change."""

    name: str
    overrides: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()

    def settings(self, given: Sequence[str] = ()) -> list[str]:
        """The row's settings with what --set says (`given`).

        Raises:
            ColdRefreshError: --set says something that makes the row what it is, or that the benchmark decides.
        """
        fixed = {one.partition("=")[0]: one for one in self.overrides}
        for one in given:
            key = one.partition("=")[0]
            if key in _OWN:
                raise ColdRefreshError(f"--set {one}: the benchmark decides {key} itself")
            if key in fixed:
                raise ColdRefreshError(
                    f"--set {one}: the row {self.name!r} is the one with {fixed[key]}; name other --rows"
                )
        return [*self.usual, *given, *self.overrides]

    def at(self, dimension: int) -> Row:
        """The row in a space of so many dimensions."""
        return Row(f"{self.name}, d = {dimension}", (*self.overrides, f"cf.dimension={dimension}"), self.usual)


def chosen(asked: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of `known`, in their order, that are asked for by name, or else by the beginning of it; all of them by default.

    Raises:
        ColdRefreshError: nothing is called so, or two rows are called the same.
    """
    if twice := sorted(name for name, times in Counter(known).items() if times > 1):
        raise ColdRefreshError(f"there are two rows each called {twice}: give --encoder another NAME")
    if not asked:
        return list(known)
    found = {name: [name] if name in known else [one for one in known if one.startswith(name)] for name in asked}
    if unknown := [name for name, rows in found.items() if not rows]:
        raise ColdRefreshError(f"--rows {unknown}: there are {list(known)}")
    wanted = {row for rows in found.values() for row in rows}
    return [name for name in known if name in wanted]


def encoders(given: Sequence[str]) -> dict[str, str]:
    """NAME -> FOLDER of the options --encoder NAME=FOLDER.

    Raises:
        ColdRefreshError: an option is not of this form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for pair in given:
        name, _, folder = pair.partition("=")
        if not name or not folder:
            raise ColdRefreshError(f"--encoder {pair!r}: give NAME=FOLDER, such as mpnet=./all-mpnet-base-v2")
        if name in found:
            raise ColdRefreshError(f"--encoder: {name} is given twice, as {found[name]} and as {folder}")
        found[name] = folder
    return found
