"""Quality of every method on a data set: NDCG and recall of what rankers would read, with the spread over seeds.

    python -m jobs.benchmark quality --dataset citeulike-a --seeds 7 8 9 --encoder mpnet=FOLDER

Columns, for each K of evaluate.k: overall, cold and warm from the refreshed user and item embeddings of a night, and cold
from the distribution p(u|i) itself, with its calibration error (udfs/reliability.py). A setting is chosen by the validation part
(it is in the JSON as `val`); the table is of the test part. What is done is kept under --work, so the command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs import settings as conf
from jobs.benchmark import datasets
from jobs.benchmark.baselines import BASELINES, ONLY
from jobs.benchmark.choice import ENCODER_HELP, HELP, Row, chosen, encoders
from jobs.benchmark.datasets import DataSet, lake_of
from jobs.benchmark.kept import Kept
from jobs.benchmark.measured import Measured, measure
from jobs.benchmark.quality_rows import rows
from jobs.benchmark.table import mean_and_spread, table
from jobs.run import log, parse_run_date

_SPLITS = ("overall", "cold", "warm")
_BASELINES = 3  # raise it when a baseline or a floor is computed in another way: kept results are not those any more
_FLOORS = ("random", "popularity", "text_profile", "text_knn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    datasets.add_arguments(parser, "citeulike-a")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--rows", nargs="+", help=HELP)
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=FOLDER", help=ENCODER_HELP)
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="for all rows"
    )
    parser.add_argument("--run-date", help="another than the data set's: to tune Complete Journey on an earlier one")
    parser.add_argument("--work", default=".cache/benchmark/quality", help="lakes and results (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    there = [*(Row(name) for name in (*_FLOORS, *BASELINES)), *rows(encoders(args.encoder))]
    names = chosen(args.rows, [row.name for row in there])
    work = Path(args.work)
    tables, results = [], {}
    chosen_sets = datasets.chosen(args)
    for data in chosen_sets:
        if args.run_date:
            data = replace(data, run_date=parse_run_date(args.run_date))
        lake = lake_of(data, work)
        found = {}
        for row in there:
            if row.name not in names:
                continue
            if ONLY.get(row.name, data.name) != data.name:
                log(f"[benchmark] {row.name}: left out, it is for {ONLY[row.name]} only")
                continue
            found[row.name] = _row(row, data, lake, args, work)
        results[data.name] = found
        tables.append(_table(data, found, args))
    seeds = {data.name: data.split_seed for data in chosen_sets}
    return {"tables": tables, "split_seeds": seeds, "results": results}


def _row(row: Row, data: DataSet, lake: str, args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """{seed, seconds, test, val} of each seed."""
    given = row.settings(args.overrides)
    found = []
    for seed in args.seeds:

        def make(seed: int = seed) -> dict[str, Any]:
            log(f"[benchmark] {data.name}, {row.name}, seed {seed}")
            begun = time.perf_counter()
            parts = _parts(row.name, measure(data, lake, seed, given))
            return {"seed": seed, **parts, "seconds": round(time.perf_counter() - begun, 1)}

        digest = conf.load(data.conf, [*given, f"seed={seed}"]).digest()  # defaults included
        version = f"-{_BASELINES}" if row.name in (*_FLOORS, *BASELINES) else ""
        name = f"{row.name}-{data.run_date}-{seed}-{digest}{version}"
        found.append(Kept(work / "results" / data.name, name).once(make))
        log(f"[benchmark] {data.name}, {row.name}, seed {seed}: {_brief(found[-1])}")
    return found


def _parts(name: str, measured: Measured) -> dict[str, Any]:
    """{test, val} of a row."""
    if name in _FLOORS:
        return {part: measured.floor(part, name) for part in measured.parts}
    if name in BASELINES:
        vectors = BASELINES[name](measured)
        return {part: measured.vectors(part, vectors) for part in measured.parts}
    return {part: measured.published(part) for part in measured.parts}


def _brief(one: dict[str, Any]) -> str:
    parts = (part for part in ("val", "test") if part in one)
    return "; ".join(f"{p} " + " ".join(f"{k} {v:.4f}" for k, v in one[p].items() if "ndcg" in k) for p in parts)


def _table(data: DataSet, found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    rows, columns = [], []
    for k in conf.load(data.conf, args.overrides).evaluate.k:
        columns += [f"{split} {metric}" for metric in (f"ndcg@{k}", f"recall@{k}") for split in _SPLITS]
        columns.append(f"distribution ndcg@{k}")
    columns.append("calibration error")
    for name, seeded in found.items():
        cells = [[one["test"][column] for one in seeded if column in one["test"]] for column in columns]
        rows.append([name, *(mean_and_spread(values) or None for values in cells)])
    note = (
        f"Test part, {' '.join([data.conf, *args.overrides])}, run date {data.run_date}, {data.split}, trained with "
        f"seeds {args.seeds}; mean ± standard deviation. The row FilterLLM is that as it stands, "
        "those below it change what they name."
    )
    if not any("val" in one for seeded in found.values() for one in seeded):
        note += " There is no validation part: TF-IDF ridge is tuned on the night's held-out items, text to judgment is not tuned."
    return table(f"Quality on {data.name}", ["method", *columns], rows, note)
