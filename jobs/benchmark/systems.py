"""The systems that place cold items, side by side: quality, seconds and peak memory of a whole night each.

    python -m jobs.benchmark systems --dataset citeulike-a --seeds 7

Each has a lake of its own, so nothing is taken from another's cache, and each stage runs in a process of its own, as a
scheduler runs it. Memory is that of the stage's processes together (Spark's and Ray's too), shared pages counted once. Run
it alone: what else the machine does is in the seconds. What is done is kept under --work.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jobs import settings as conf
from jobs.benchmark import datasets
from jobs.benchmark.choice import HELP, chosen
from jobs.benchmark.datasets import DataSet, lake_of
from jobs.benchmark.kept import Kept
from jobs.benchmark.measure import fresh
from jobs.benchmark.measured import measure
from jobs.benchmark.quality_rows import ROWS
from jobs.benchmark.table import mean_and_spread, table
from jobs.run import execute, log, open_run, parse_run_date

_SHARED = ("snapshot", "text_embeddings", "cf")
_SAMPLING = ("filterllm_train", "filterllm_score", "refresh")
_GIB = 2**30
#: System -> the row of the quality benchmark that it is, and the stages that place the cold items.
SYSTEMS = {
    "FilterLLM": ("FilterLLM", _SAMPLING),
    "LLMInit": ("cold items where LLMInit puts them", ("refresh",)),
    "FilterLLM on LLMInit's space": ("CF: LightGCN from LLMInit", _SAMPLING),
    "A-LLMRec": ("cold items where A-LLMRec's alignment puts them", ("refresh",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    datasets.add_arguments(parser, "citeulike-a")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--rows", nargs="+", help=HELP)
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="for all systems"
    )
    parser.add_argument("--work", default=".cache/benchmark/systems", help="lakes and results (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    tables, results = [], {}
    chosen_sets = datasets.chosen(args)
    for data in chosen_sets:
        found = {
            system: [_system(data, system, seed, args.overrides, Path(args.work)) for seed in args.seeds]
            for system in chosen(args.rows, list(SYSTEMS))
        }
        results[data.name] = found
        tables.append(_table(data, found, args))
    seeds = {data.name: data.split_seed for data in chosen_sets}
    return {"tables": tables, "split_seeds": seeds, "results": results}


def stage(settings_file: str, given: list[str], run_date: str, name: str) -> float:
    """Run one stage of the night (its lake is among the settings); its seconds. Called in a new process."""
    night = open_run(conf.load(settings_file, given), parse_run_date(run_date))
    facts = execute(night, name)
    return float(facts["seconds"])


def _system(data: DataSet, system: str, seed: int, given: list[str], work: Path) -> dict[str, Any]:
    """{seed, seconds: {stage: ...}, gib: {stage: ...}, test, val}."""
    row, _ = SYSTEMS[system]
    changed = next(one for one in ROWS if one.name == row).settings(given)
    digest = conf.load(data.conf, [*changed, f"seed={seed}"]).digest()

    def make() -> dict[str, Any]:
        log(f"[benchmark] {data.name}, {system}, seed {seed}")
        lakes = work / "lakes"  # a folder of its own: --work may be one that holds others of the data set's name
        shutil.rmtree(lakes / data.name, ignore_errors=True)
        lake = lake_of(data, lakes)
        one: dict[str, Any] = {"seed": seed, "seconds": {}, "gib": {}}
        for name in (*_SHARED, *_SAMPLING):  # a night samples users whatever places the items
            with PeakOfChildren() as peak:
                one["seconds"][name] = fresh(
                    "systems",
                    "stage",
                    settings_file=data.conf,
                    given=[*changed, f"seed={seed}", f"lake={lake}"],
                    run_date=f"{data.run_date}",
                    name=name,
                )
            one["gib"][name] = peak.bytes / _GIB
        night = measure(data, lake, seed, changed)
        return one | {part: night.published(part) for part in night.parts}

    return Kept(work / "results" / data.name, f"{system}-{seed}-{digest}").once(make)


@dataclass
class PeakOfChildren:
    """The most memory (`bytes`, proportional set sizes) that processes which this one starts, and those below them, hold
    together while it is open.
    """

    every: float = 0.5  # seconds between two looks
    bytes: int = 0
    _before: frozenset[int] = frozenset()
    _done: threading.Event = field(default_factory=threading.Event)
    _watch: threading.Thread | None = None

    def __enter__(self) -> PeakOfChildren:
        self._before = frozenset(one.pid for one in psutil.Process().children(recursive=True))
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._watch is not None:
            self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(self.every):
            held = 0
            for process in psutil.Process().children(recursive=True):
                if process.pid in self._before:
                    continue
                try:
                    held += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                    continue
            self.bytes = max(self.bytes, held)


def _table(data: DataSet, found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    k = conf.load(data.conf, args.overrides).evaluate.k[0]
    splits = [f"{split} ndcg@{k}" for split in ("overall", "cold", "warm")]
    columns = ["system", *splits, "text, s", "CF, s", "placing cold items, s", "CF, GiB", "placing, GiB"]
    rows: list[list[Any]] = []
    for system, seeded in found.items():
        own = SYSTEMS[system][1]
        costs = [
            (
                one["seconds"]["text_embeddings"],
                one["seconds"]["cf"],
                sum(one["seconds"][name] for name in own),
                one["gib"]["cf"],
                max(one["gib"][name] for name in own),
            )
            for one in seeded
        ]
        rows.append(
            [
                system,
                *(mean_and_spread([one["test"][s] for one in seeded if s in one["test"]]) or None for s in splits),
                *(mean_and_spread(values, 1) for values in zip(*costs, strict=True)),
            ]
        )
    note = (
        f"Test part, {' '.join([data.conf, *args.overrides])}, {data.split}, trained with seeds {args.seeds}; "
        "mean ± standard deviation. Seconds and memory "
        "of whole stages, the start of their processes in memory but not in seconds. LLMInit's own training is its CF; "
        "A-LLMRec's is in placing."
    )
    return table(f"The systems on {data.name}", columns, rows, note)
