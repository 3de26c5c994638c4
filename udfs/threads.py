"""Work in torch's threads, a part each: none waits for another before its part is done.

torch itself shares out every operation and waits for its slowest thread each time. For many short operations that costs more
than it gains, most of all on a machine that does other things too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_threads(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`work` of each part, in their order, without gradients; the operations of one part run in one thread.

    In as many threads as torch may use (`torch.get_num_threads()`); with one, the parts are worked on here.
    """
    threads = torch.get_num_threads()

    def alone(part: Part) -> Result:
        with torch.no_grad():
            return work(part)

    if threads == 1 or len(parts) == 1:
        return [alone(part) for part in parts]
    try:
        return list(_pool(threads).map(alone, parts))
    finally:
        torch.set_num_threads(threads)  # what a thread that is yet to come begins with


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept, since a new thread's first matrix product costs milliseconds."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
