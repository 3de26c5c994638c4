"""Results that are computed once: one JSON file each, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """The result of `name` (what it was computed from, in full or as a digest, is part of it) in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / ("".join(c if c.isalnum() else "-" for c in name) + ".json")

    def once(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept, or else what `make` gives (it must be JSON-able), which is kept from then on."""
        if not self._path.exists():
            found = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1))
            part.rename(self._path)
        return json.loads(self._path.read_text())
