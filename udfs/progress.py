"""How far a long loop is: a bar where a person watches, a plain line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """Counts towards `total` units, under the name `label`. A context manager."""

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        seconds: float = 10.0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """`seconds`: how often a plain line is written, at most. With `log`, lines but for the last go there; there is no bar."""
        self._label, self._total, self._unit, self._every = label, total, unit, seconds
        self._log = log
        self._done, self._begun = 0, time.monotonic()
        self._last = self._begun
        self._bar = None
        if log is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done and self._log is None:
            self._line()

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= self._every and self._done != self._total:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        rate = self._done / max(self._last - self._begun, 1e-9)
        line = f"{self._done} of {self._total} {self._unit}, {rate:.1f}/s"
        if self._log is not None:
            self._log(f"{self._label}: {line}")
        else:
            print(f"[{self._label}] {line}", file=sys.stderr, flush=True)
