"""How the speed benchmark measures: interleaved repetitions, peak memory in a process of its own, the machine's ceilings.

`python -m jobs.benchmark.measure <module> <function> <arguments as JSON>` is that process (see `fresh`).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from schemas.errors import ColdRefreshError

#: Columns of what `shares` gives.
SHARES = ("share of the matmul ceiling", "share of the memory ceiling")


def device() -> str:
    """Where everything is measured: cuda if torch finds a GPU, otherwise cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def interleaved(methods: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of each method, taken in turns, after one call of each to warm up.

    In turns, so that what else the machine does meets all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(repeats + 1):
        for name, method in methods.items():
            begun = time.perf_counter()
            method()
            _synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def peak_memory(work: Callable[[], Any], where: str | None = None) -> int:
    """Bytes that a call of `work` needs at its peak beyond what was there before: on a GPU of its memory, else resident.

    where: the device that it runs on; `device()` by default.

    Call it once in a process (see `fresh`): what an earlier call freed may be used again unseen.

    Raises:
        ColdRefreshError: there is neither a GPU nor Linux's /proc.
    """
    gc.collect()
    if torch.device(where or device()).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = work()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    try:
        # The peak of a process counts from here on; getrusage()'s would begin with the parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError as error:
        raise ColdRefreshError(f"peak memory is read from Linux's /proc: {error}") from error
    kept = work()
    peak = _status("VmHWM")
    del kept
    return max(peak - before, 0)


def fresh(module: str, function: str, **arguments: Any) -> Any:
    """The result (JSON-able) of a function of jobs/benchmark/<module>.py that is called in a new process.

    Raises:
        ColdRefreshError: the process failed, for example for want of memory.
    """
    command = [sys.executable, "-m", "jobs.benchmark.measure", module, function, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ColdRefreshError(
            f"{module}.{function} {arguments} ended with status {done.returncode}"
            + ("; killed, perhaps for want of memory: measure fewer users" if done.returncode < 0 else "")
        )
    return json.loads(done.stdout.splitlines()[-1])


def ceilings(where: str) -> dict[str, float]:
    """What a device reaches at most, measured: float32 and bfloat16 matrix products (FLOP/s), memory read + written (bytes/s)."""
    size = 2048 if where == "cpu" else 8192
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        product = {"mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}
        found[f"{str(dtype).removeprefix('torch.')} FLOP/s"] = 2 * size**3 / min(interleaved(product, 5)["mm"])
    source = torch.ones(2**26, device=where)
    target = torch.empty_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]
    found["memory bytes/s"] = 2 * source.nbytes / min(copy)
    return found


def shares(ceilings: Mapping[str, float], seconds: float, flop: float, moved: float, dtype: str) -> list[float]:
    """The shares of the matmul ceiling of `dtype` and of the memory ceiling that work reaches.

    Args:
        ceilings: of `ceilings`.
        flop: of the work's matrix products. moved: bytes that it must read and write at the least, however it is done
            (Williams et al. 2009, "Roofline"): what is given once, or once a pass that has to wait for the one before, and
            what comes out once. What lies between them might stay in a cache and does not count.
    """
    return [flop / seconds / ceilings[f"{dtype} FLOP/s"], moved / seconds / ceilings["memory bytes/s"]]


def layer_weights(model: torch.nn.Module) -> int:
    """Weights of a language model that every token is multiplied with: all but the tables of embeddings."""
    tables = {id(p) for part in model.modules() if isinstance(part, torch.nn.Embedding) for p in part.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


if __name__ == "__main__":
    _, module, function, arguments = sys.argv
    print(json.dumps(getattr(import_module(f"jobs.benchmark.{module}"), function)(**json.loads(arguments))))
