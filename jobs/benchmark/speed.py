"""Speed of each stage against what it replaces, in one run on one machine: times, ratios, peak memory, and the shares of the
machine's measured ceilings.

Parts: scoring (streaming top-K and draws against the dense softmax and FAISS IndexFlatIP), training (the loss in tiles against
dense autograd), encoding (TextEncoder against sentence-transformers and a plain loop, in float32 and bfloat16), judgment (text
to distribution against text to judgment). On a GPU the same is measured there; this path has not been tried.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from jobs.benchmark import encoding_speed, judgment, scoring_speed, training_speed
from jobs.benchmark.measure import ceilings, device
from jobs.benchmark.table import table
from jobs.run import log
from schemas.errors import ColdRefreshError

PARTS = ("scoring", "training", "encoding", "judgment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--users",
        default="10000,100000,1000000,10000000",
        help="scoring: sizes of the vocabulary (default: %(default)s)",
    )
    parser.add_argument(
        "--training-users", default="5000,50000,500000", help="the same for training (default: %(default)s)"
    )
    parser.add_argument(
        "--items", type=int, default=256, help="scoring and training: items of a batch (default: %(default)s)"
    )
    parser.add_argument("--texts", type=int, default=400, help="encoding: texts for MiniLM (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """tables: one a part; parts: the figures behind them; machine: device, threads, measured ceilings.

    Raises:
        ColdRefreshError: an unknown part, or no whole numbers of users.
    """
    parts = [part for part in args.parts.split(",") if part]
    if not parts or set(parts) - set(PARTS):
        raise ColdRefreshError(f"--parts {args.parts!r}: choose from {', '.join(PARTS)}")
    users, training_users = _counts("--users", args.users), _counts("--training-users", args.training_users)
    machine = {"device": device(), "threads": torch.get_num_threads(), **ceilings(device())}
    log(f"machine: {machine}")
    found: dict[str, Any] = {}
    for part in parts:
        log(f"measuring {part}")
        if part == "scoring":
            found[part] = scoring_speed.run(users, args.items, args.seed, machine)
        elif part == "training":
            found[part] = training_speed.run(training_users, args.items, args.seed, machine)
        elif part == "encoding":
            found[part] = encoding_speed.run(args.texts, args.seed, machine)
        else:
            found[part] = judgment.measure_speed(device=device(), seed=args.seed, ceilings=machine)
    rows = [[name, f"{value / 1e9:.0f} G" if "/s" in name else value] for name, value in machine.items()]
    tables = [table("Machine", ["", "measured"], rows)]
    for result in found.values():
        tables += result.pop("tables")
    return {"tables": tables, "machine": machine, "parts": found}


def _counts(option: str, text: str) -> list[int]:
    try:
        counts = [int(float(part)) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 100:
        raise ColdRefreshError(
            f"{option} {text!r}: expected numbers of at least 100 with commas between, such as 10000,1e6"
        )
    return counts
