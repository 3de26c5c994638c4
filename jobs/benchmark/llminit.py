"""LLMInit: CF models from a random start and from text embeddings, for all users and for cold ones.

    python -m jobs.benchmark llminit --dataset amazon-beauty --rows LightGCN --seeds 7 8 9
    python -m jobs.benchmark llminit --dataset amazon-beauty --curve 32 64 128 256 384

The protocol is the paper's (arXiv 2503.01814): of each user's items in random order one is for validation and one for the
test, all items are ranked, and training ends when NDCG@10 on the validation items has not risen for --patience looks. Cold
users are measured in trainings of their own, in which a tenth of the users keeps one training interaction and another tenth
keeps half (udfs/splits.py). All rows of a seed have the same split. What is done is kept under --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jobs import cf, cf_start, plots, text_embeddings
from jobs import settings as conf
from jobs.benchmark import datasets
from jobs.benchmark.backbones import MODELS
from jobs.benchmark.choice import ENCODER_HELP, HELP, Row, chosen, encoders
from jobs.benchmark.datasets import DataSet, lake_of
from jobs.benchmark.kept import Kept
from jobs.benchmark.llminit_rows import BASE, by_dimension, rows
from jobs.benchmark.table import mean_and_spread, table
from jobs.run import Run, execute, log, open_run
from schemas.errors import ColdRefreshError
from udfs import cf_model, splits
from udfs.cf_inputs import Pairs
from udfs.llm_init import NarrowTextsError
from udfs.ranking_metrics import Task, per_user, task
from udfs.scorers import dot_scorer
from udfs.vectors import Matrix

_KS = (10, 20)
_METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
# Which trainings there are, and the groups of users that each is measured on.
PROTOCOLS = {"all": ("all",), "cold_users": ("single", "half")}
_DEFINITION = 2  # raise it when the same settings are measured in another way: kept results are not those any more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    datasets.add_arguments(parser, "amazon-beauty")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--rows", nargs="+", help=HELP)
    parser.add_argument("--protocols", choices=list(PROTOCOLS), nargs="+", default=list(PROTOCOLS))
    parser.add_argument(
        "--curve",
        type=int,
        nargs="+",
        metavar="D",
        help="instead: LightGCN's starts at these dimensions, as far as the texts are as wide",
    )
    parser.add_argument("--encoder", action="append", default=[], metavar="NAME=FOLDER", help=ENCODER_HELP)
    parser.add_argument("--patience", type=int, default=10, help="looks at the validation items without a gain")
    parser.add_argument("--look", type=int, default=2, help="epochs between two looks (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="for all rows"
    )
    parser.add_argument("--work", default=".cache/benchmark/quality", help="lakes and results (default: %(default)s)")


@dataclass(frozen=True)
class Division:
    """What is trained on, and a task for each part and group: ("val", "all"), ("test", "single")..."""

    train: Pairs
    tasks: dict[tuple[str, str], Task]


class Source:
    """A data set: users, items and pairs of its lake, and the items' text embeddings by encoder."""

    def __init__(self, data: DataSet, lake: str) -> None:
        self._data, self._texts = data, dict[str, Matrix]()
        night = self._night(conf.load(data.conf, [f"lake={lake}"]), ("snapshot",))
        items = night.staging("snapshot").read("items_labelled", ["item_id", "text_sha256"]).sort_by("item_id")
        self.item_ids, self._shas = items["item_id"].to_pylist(), items["text_sha256"].to_pylist()
        pairs = night.lake.read("interactions", columns=["user_id", "item_id"]).to_pandas().drop_duplicates()
        self.pairs = pairs[pairs["item_id"].isin(self.item_ids)].astype(str)
        self.user_ids = sorted(self.pairs["user_id"].unique())

    def _night(self, settings: conf.Settings, stages: tuple[str, ...]) -> Run:
        night = open_run(settings, self._data.run_date)
        for name in stages:
            execute(night, name)
        return night

    def texts(self, settings: conf.Settings) -> Matrix:
        """[items, width], rows of NaN for no text; they go through the night's own stages: Ray actors and the lake's cache."""
        key = settings.digest("text")
        if key not in self._texts:
            # Of a night, whatever CF model it is for.
            plain = conf.load(self._data.conf, [f"lake={settings.lake}"]).model_copy(update={"text": settings.text})
            night = self._night(plain, ("snapshot", "text_embeddings"))
            there = np.array([sha is not None for sha in self._shas])
            version = night.staging("text_embeddings").facts()["model_version"]
            vectors = text_embeddings.load(night, [sha for sha in self._shas if sha is not None], version)
            texts = np.full((len(there), vectors.shape[1]), np.nan, np.float32)
            texts[there] = vectors
            self._texts[key] = texts
        return self._texts[key]


def run(args: argparse.Namespace) -> dict[str, Any]:
    if other := [one for one in args.overrides if not one.startswith(("cf.", "text."))]:
        raise ColdRefreshError(f"--set {other}: of the settings this benchmark has cf and text only")
    if args.curve and "all" not in args.protocols:
        raise ColdRefreshError("--curve is of all users: leave --protocols out, or name all")
    wanted = _rows(args)
    tables, results = [], {}
    for data in datasets.chosen(args):
        name = data.name
        lake = lake_of(data, Path(args.work))
        source = Source(data, lake)
        found = {}
        for row in wanted:
            try:
                found[row.name] = [_cell(row, source, data, lake, seed, args) for seed in args.seeds]
            except NarrowTextsError as error:
                log(f"[benchmark] {name}, {row.name}: left out, {error}")
        results[name] = found
        tables.append(_table(name, found, args))
        if args.curve and found:
            plot = Path(args.out) / _plot_name(name, args)
            plot.parent.mkdir(parents=True, exist_ok=True)
            plot.write_text(plots.curves(_curves(found), "dimensions", "ndcg@10"))
            log(f"written to {plot}")
    return {"tables": tables, "results": results}


def _rows(args: argparse.Namespace) -> list[Row]:
    others = encoders(args.encoder)
    there = rows(others)
    if args.curve:
        there = [row.at(dimension) for row in by_dimension(others) for dimension in args.curve]
    names = chosen(args.rows, [row.name for row in there])
    return [row for row in there if row.name in names]


def _plot_name(name: str, args: argparse.Namespace) -> str:
    """Other encoders and settings have a plot of their own."""
    parts = ["llminit_curve", name, *encoders(args.encoder), *args.overrides]
    return "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts) + ".svg"


def _cell(row: Row, source: Source, data: DataSet, lake: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """{protocol: {val, test: {group metric: value}, epoch, epochs, seconds}} of a row and seed."""
    name, given = data.name, [*row.settings(args.overrides), f"seed={seed}", f"lake={lake}"]
    settings = conf.load(data.conf, given)
    if settings.cf.init == "llminit" and settings.cf.llminit.select == "full":
        settings = conf.load(data.conf, [*given, f"cf.dimension={source.texts(settings).shape[1]}"])
    found = {}
    for protocol in args.protocols:
        read = ("inputs", "snapshot", "cf", *(["text"] if settings.cf.init == "llminit" else []))
        body = [settings.digest(*read), args.patience, args.look, _DEFINITION]
        digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]

        def make(protocol: str = protocol) -> dict[str, Any]:
            log(f"[benchmark] {name}, {row.name}, {protocol}, seed {seed}")
            return measure(settings, source, divide(source, protocol, seed), args.patience, args.look)

        kept = Kept(Path(args.work) / "results" / "llminit" / name, f"{row.name}-{protocol}-{seed}-{digest}")
        found[protocol] = kept.once(make)
        log(f"[benchmark] {name}, {row.name}, {protocol}, seed {seed}: {json.dumps(found[protocol])}")
    return found


def divide(source: Source, protocol: str, seed: int) -> Division:
    """The pairs of the training and the tasks of its groups (PROTOCOLS); what a user had otherwise is masked, taken away or not."""
    split = splits.leave_one_out(source.pairs, seed).assign(group="all")
    if protocol == "cold_users":
        split = splits.cold_users(split, seed)
    user = pd.Index(source.user_ids).get_indexer(split["user_id"]).astype(np.int64)
    item = pd.Index(source.item_ids).get_indexer(split["item_id"]).astype(np.int64)
    part, group = split["part"].to_numpy(), split["group"].to_numpy()
    # Equal scores (items without a training pair have none) are ranked in an order that says nothing.
    every = np.random.default_rng(seed).permutation(len(source.item_ids))
    tasks = {}
    for name in ("val", "test"):
        for of in PROTOCOLS[protocol]:
            rows, rest = (part == name) & (group == of), part != name
            tasks[name, of] = task(every, (user[rows], item[rows]), (user[rest], item[rest]))
    kept = part == "train"
    return Division(Pairs(user[kept], item[kept], np.ones(kept.sum(), np.float32)), tasks)


def measure(settings: conf.Settings, source: Source, division: Division, patience: int, look: int) -> dict[str, Any]:
    """Train until the validation items are not ranked better any more; the figures of the best embeddings.

    Returns:
        val, test: "group metric" -> mean over its users; epoch: the best; epochs: all; seconds: of the training alone.
    """
    n_users, n_items = len(source.user_ids), len(source.item_ids)
    start = None
    if settings.cf.init == "llminit":
        texts = source.texts(settings).copy()
        texts[np.bincount(division.train.items, minlength=n_items) == 0] = np.nan
        start, _ = cf_start.of_texts(settings, texts, division.train, n_users)
    best: dict[str, Any] = {"score": -1.0, "epoch": 0, "last": 0}
    begun, looking = time.perf_counter(), 0.0

    def figures(part: str, vectors: tuple[Matrix, Matrix]) -> dict[str, float]:
        found: dict[str, float] = {}
        known = np.ones(n_users, np.bool_)
        for (name, group), one in division.tasks.items():
            if name == part:
                values = per_user(dot_scorer(*vectors, one.candidates, known), one, _KS)
                found |= {f"{group} {metric}": float(values[metric].mean()) for metric in _METRICS}
        return found

    def told(epoch: int, embeddings: Callable[[], tuple[Matrix, Matrix]]) -> bool:
        nonlocal looking
        best["last"] = epoch
        if epoch % look:
            return False
        before = time.perf_counter()
        users, items = embeddings()
        vectors = users, items[next(iter(division.tasks.values())).candidates]
        found = figures("val", vectors)
        score = float(np.mean([found[f"{group} ndcg@10"] for _, group in division.tasks]))
        if score > best["score"]:
            best.update(score=score, epoch=epoch, val=found, vectors=vectors)
        looking += time.perf_counter() - before
        return epoch - int(best["epoch"]) >= patience * look

    cf_model.fit(settings.cf.model, division.train, n_users, n_items, cf.params(settings), settings.seed, start, told)
    seconds = time.perf_counter() - begun - looking
    if not best["epoch"]:
        raise ColdRefreshError(f"cf.epochs is {settings.cf.epochs}, and the first look is after {look}")
    facts = {"epoch": best["epoch"], "epochs": best["last"], "seconds": round(seconds, 1)}
    return {"val": best["val"], "test": figures("test", best["vectors"]), **facts}


def _table(name: str, found: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    groups = [group for protocol in args.protocols for group in PROTOCOLS[protocol]]
    rows = []
    for row, seeded in found.items():
        tests = [{key: value for one in cell.values() for key, value in one["test"].items()} for cell in seeded]
        cells = [mean_and_spread([test[f"{group} {m}"] for test in tests]) for group in groups for m in _METRICS]
        first = [one[args.protocols[0]] for one in seeded]
        each = float(np.mean([one["seconds"] / one["epochs"] for one in first]))
        rows.append([row, *cells, mean_and_spread([one["epoch"] for one in first], 0), round(each, 2)])
    columns = ["model and start", *(f"{group} {metric}" for group in groups for metric in _METRICS), "epoch", "s/epoch"]
    own = "; ".join(f"{name}: {' '.join(tuned)}" for name, (_, *tuned) in MODELS.items() if tuned)
    note = (
        f"Test items, seeds {args.seeds} of split and training; mean ± standard deviation. "
        "All users; users with a single training interaction; users with half of theirs. "
        f"Epoch: the best on the validation items, {args.patience} looks of {args.look} epochs without "
        f"a gain end a training. Beside the row's own settings, the last winning: "
        f"{' '.join(BASE)}; {own}; {' '.join(args.overrides) or 'no --set'}."
    )
    return table(f"LLMInit on {name}", columns, rows, note)


def _curves(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    """start -> (dimension, mean ndcg@10 of all users)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row, seeded in found.items():
        start, dimension = row.rsplit(", d = ", 1)
        value = float(np.mean([cell["all"]["test"]["all ndcg@10"] for cell in seeded]))
        curves.setdefault(start, []).append((float(dimension), value))
    return curves
