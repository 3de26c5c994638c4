"""A-LLMRec: the next item among 20, with all its ablations, for warm and cold items, new users, few users, another domain.

    python -m jobs.benchmark allmrec --dataset amazon-beauty --rows SASRec "stage 1 only" --seeds 7 8 9
    python -m jobs.benchmark allmrec --dataset amazon-games --scenarios all cross-domain --train-users 1000 --test-users 300

The protocol is the paper's (arXiv 2404.11343): the last item of a user's history is for the test, the one before it for
validation; it is to be found among 19 others that the user never had, and the exact candidate counts, not a title that contains
another. Cold and warm items are the bottom and top 35 % by training events; a cold item's text vector q_i stands in place of
e_i. Cold users have three events and are left out of training. Few-shot: everything is trained with so many users only.
Cross-domain: trained on Games, asked about Beauty. What is done is kept under --work. Everything is as the paper has it (one
example a user, its weights) but for the sizes among the options: it is the method that is compared here, and what a conf says
of `allmrec` is for the nights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.benchmark import allmrec_data
from jobs.benchmark.allmrec_cells import METRICS, cell
from jobs.benchmark.allmrec_data import SELDOM, Corpus
from jobs.benchmark.allmrec_rows import ROWS, SIZES, Options, Row
from jobs.benchmark.choice import HELP, chosen
from jobs.benchmark.datasets import SPLIT_SEED
from jobs.benchmark.kept import Kept
from jobs.benchmark.table import mean_and_spread, table
from jobs.run import log

DATA_SETS = ("amazon-beauty", "amazon-games")
# Trained on -> asked about.
ACROSS = {"amazon-games": "amazon-beauty"}
SCENARIOS = ("all", "few-shot", "cross-domain")
_GROUPS = ("all", "warm items", "cold items", SELDOM, "cold users")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = f"folders of the data folder (default: {' '.join(DATA_SETS)})"
    parser.add_argument("--dataset", nargs="+", default=list(DATA_SETS), metavar="NAME", help=known)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--rows", nargs="+", help=HELP + ": " + "; ".join(row.name for row in ROWS))
    parser.add_argument("--scenarios", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--few-shot", type=int, nargs="+", default=[256, 128], help="of how many users")
    for name in SIZES:
        default = getattr(Options(), name)
        told = "of rows that name no text encoder of their own " if name == "text_model" else ""
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{told}(default: %(default)s)"
        )
    parser.add_argument("--work", default=".cache/benchmark/allmrec", help="parts and results (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    names = chosen(args.rows, [row.name for row in ROWS])
    rows = [row for row in ROWS if row.name in names]
    base = Options(**{name: getattr(args, name) for name in SIZES})
    tables, results = [], {}
    for name in args.dataset:
        data = allmrec_data.read(name)
        scenarios = {"all": None} if "all" in args.scenarios else {}
        scenarios |= {f"few-shot {few}": few for few in args.few_shot if "few-shot" in args.scenarios}
        if "cross-domain" in args.scenarios and name in ACROSS:
            scenarios["cross-domain"] = None
        found: dict[str, list[dict[str, Any]]] = {row.name: [{} for _ in args.seeds] for row in rows}
        for number, seed in enumerate(args.seeds):
            for scenario, few in scenarios.items():
                division = allmrec_data.divide(data, few, seed, base.test_users, base.cold_users)
                other = allmrec_data.read(ACROSS[name]) if scenario == "cross-domain" else None
                for row in rows:
                    one = _kept(row, row.options(base), data, division, seed, scenario, other, Path(args.work))
                    if one:
                        found[row.name][number][scenario] = one
        results[name] = found
        tables += _tables(name, found, list(scenarios), base, args.seeds)
    return {"options": asdict(base), "split_seed": SPLIT_SEED, "tables": tables, "results": results}


def _kept(
    row: Row, options: Options, data: Corpus, division: Any, seed: int, scenario: str, other: Corpus | None, work: Path
) -> dict[str, Any]:
    """`cell`, computed once; {} where the scenario does not apply."""
    made_of = [asdict(options), data.digest, other.digest if other else None]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def make() -> dict[str, Any]:
        one = cell(options, work / "parts" / data.name, data, division, seed, scenario, other) or {}
        if one:
            log(f"[benchmark] {data.name}, {row.name}, {scenario}, seed {seed}: {json.dumps(one)}")
        return one

    return Kept(work / "results" / data.name, f"{row.name}-{scenario}-{seed}-{digest}").once(make)


def _tables(
    name: str, found: dict[str, list[dict[str, Any]]], scenarios: list[str], base: Options, seeds: list[int]
) -> list[dict[str, Any]]:
    """A table a metric; seconds and memory, of the first scenario, stand in the first."""
    groups = [group for scenario in scenarios for group in (_GROUPS if scenario == "all" else (scenario,))]
    users: dict[str, int] = {}
    made = []
    for metric in METRICS:
        rows = []
        for row, seeded in found.items():
            flat = [{key: v for one in by.values() for key, v in one["figures"].items()} for by in seeded]
            for by in seeded:
                for one in by.values():
                    users |= one["users"]
            cells = [mean_and_spread([one[f"{g} {metric}"] for one in flat if f"{g} {metric}" in one]) for g in groups]
            if metric == METRICS[0]:
                first = [by[scenarios[0]] for by in seeded if scenarios[0] in by]
                cells.append(mean_and_spread([one["seconds"] for one in first], 0))
                cells.append(mean_and_spread([one["memory"] / 2**20 for one in first], 0))
            rows.append([row, *cells])
        cost = [f"seconds ({scenarios[0]})", "MB"] if metric == METRICS[0] else []
        made.append(table(f"A-LLMRec on {name}: {metric} among 20", ["row", *groups, *cost], rows))
    asked = ", ".join(f"{group} {count}" for group, count in users.items())
    sizes = " ".join(f"{size}={getattr(base, size)}" for size in SIZES)
    made[-1]["note"] = (
        f"Test items; cold items, cold users and candidates drawn with seed {SPLIT_SEED}, trained with seeds {seeds}; mean ± "
        f"standard deviation. Empty: does not apply. Users asked: {asked}. Seconds: "
        "training of all parts and scoring; MB: the peak of the most demanding part, beyond what was there before. "
        f"Sizes: {sizes} (0: all)."
    )
    return made
