"""Seconds an epoch of LightGCN here and of RecBole's: same pairs, batches, dimensions and learning rate, in one run.

    python -m jobs.benchmark lightgcn --recbole PYTHON_WITH_RECBOLE

RecBole is installed apart (`pip install recbole==1.2.1 "numpy<2" "scipy<1.13" torch==2.13.0 ray` in an environment of its
own): its versions are not this project's. The data set is a folder of the data folder ($COLD_REFRESH_DATA, or
../shared/data), split by LLMInit's leave-one-out; both are ranked by the same metric, on the test items.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from jobs.benchmark import recbole_lightgcn
from jobs.benchmark.datasets import data_folder
from jobs.benchmark.table import best_and_spread, table
from jobs.run import log
from schemas.errors import ColdRefreshError
from udfs import cf_model, splits
from udfs.cf_inputs import CfParams, Pairs
from udfs.ranking_metrics import per_user, task
from udfs.scorers import dot_scorer
from udfs.vectors import Matrix

OURS, RECBOLE = "this project's", "RecBole's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recbole", required=True, metavar="PYTHON", help="an interpreter that has RecBole")
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=0.002)
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=7)


def run(args: argparse.Namespace) -> dict[str, Any]:
    pairs = pd.read_parquet(data_folder(args.dataset) / "interactions.parquet", columns=["user_id", "item_id"])
    split = splits.leave_one_out(pairs.astype(str), args.seed)
    params = CfParams(
        dimension=args.dimension,
        epochs=args.epochs,
        batch_size=args.batch_size,
        layers=args.layers,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        device="cpu",
    )
    seconds, quality = {}, {}
    for name, trained in ((RECBOLE, lambda: _recbole(split, params, args)), (OURS, lambda: _ours(split, params, args))):
        log(f"[benchmark] LightGCN, {name}: {args.epochs} epochs")
        seconds[name], users, items, ids = trained()
        quality[name] = _ndcg(split, users, items, ids, args.seed)
    ratio = min(seconds[RECBOLE]) / min(seconds[OURS])
    rows = [
        [name, best_and_spread(seconds[name]), min(seconds[name]) / min(seconds[OURS]), quality[name]]
        for name in (OURS, RECBOLE)
    ]
    note = (
        f"{args.dataset}, leave-one-out split of seed {args.seed}: {int((split['part'] == 'train').sum())} training pairs. "
        f"{args.dimension} dimensions, {args.layers} layers, batches of {args.batch_size}, learning rate {args.learning_rate}, "
        f"{torch.get_num_threads()} threads. The shortest epoch, and how far above it the median lies; quality after "
        f"{args.epochs} epochs, by the same metric, on the test items."
    )
    columns = ["LightGCN", "an epoch", "times ours", "ndcg@10"]
    return {"tables": [table("LightGCN, seconds an epoch", columns, rows, note)], "seconds": seconds, "times": ratio}


# Seconds of each epoch, users [U, d], items [I, d], and the ids of their rows.
_Trained = tuple[list[float], Matrix, Matrix, tuple[list[str], list[str]]]


def _ours(split: pd.DataFrame, params: CfParams, args: argparse.Namespace) -> _Trained:
    ids = sorted(split["user_id"].unique()), sorted(split["item_id"].unique())
    train = split[split["part"] == "train"]
    user, item = (pd.Index(ids[i]).get_indexer(pd.Index(train[name])) for i, name in enumerate(("user_id", "item_id")))
    ends = [time.perf_counter()]

    def told(epoch: int, embeddings: Callable[[], tuple[Matrix, Matrix]]) -> bool:
        ends.append(time.perf_counter())
        return False

    given = Pairs(user, item, np.ones(len(user), np.float32))
    users, items = cf_model.fit("lightgcn", given, len(ids[0]), len(ids[1]), params, args.seed, None, told)
    return np.diff(ends).tolist(), users, items, ids


def _recbole(split: pd.DataFrame, params: CfParams, args: argparse.Namespace) -> _Trained:
    options = {name: getattr(params, name) for name in CfParams.__dataclass_fields__}
    options |= {"seed": args.seed, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs"
        data.mkdir()
        for part, name in (("train", "train"), ("val", "valid"), ("test", "test")):
            rows = split.loc[split["part"] == part, ["user_id", "item_id"]]
            header = {"user_id": "user_id:token", "item_id": "item_id:token"}
            rows.rename(columns=header).to_csv(data / f"pairs.{name}.inter", sep="\t", index=False)
        command = [args.recbole, str(Path(recbole_lightgcn.__file__).resolve()), str(data), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise ColdRefreshError(f"RecBole failed under {args.recbole}:\n{done.stderr[-2000:]}")
        users, items = (np.load(data / f"{name}.npy", allow_pickle=False) for name in ("users", "items"))
        ids = tuple(json.loads((data / f"{name}.json").read_text()) for name in ("users", "items"))
        return json.loads(done.stdout.strip().splitlines()[-1]), users, items, (ids[0], ids[1])


def _ndcg(split: pd.DataFrame, users: Matrix, items: Matrix, ids: tuple[list[str], list[str]], seed: int) -> float:
    """Mean NDCG@10 of the test items, over all items that are in the split."""
    user, item = (pd.Index(ids[i]).get_indexer(pd.Index(split[name])) for i, name in enumerate(("user_id", "item_id")))
    test = (split["part"] == "test").to_numpy()
    every = np.random.default_rng(seed).permutation(np.unique(item))
    one = task(every, (user[test], item[test]), (user[~test], item[~test]))
    values = per_user(dot_scorer(users, items[every], every, np.ones(len(users), np.bool_)), one, (10,))
    return float(values["ndcg@10"].mean())
