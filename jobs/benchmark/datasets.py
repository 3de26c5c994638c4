"""The data sets of the benchmarks, each as a lake of its own under the benchmark's working folder.

They are folders of a data folder ($COLD_REFRESH_DATA, or ../shared/data) and hold interactions.parquet and items.parquet, with
columns as in schemas/; complete-journey comes with the package of the demo. Any other folder there is a data set, too.
CiteULike has FilterLLM's own split, Complete Journey is split by time; the others are split by items with SPLIT_SEED
(udfs/splits.py) where their conf measures so.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pandas as pd

from jobs import settings as conf
from jobs.formats.contract import Request
from jobs.ingest import ingest
from jobs.lake import Lake
from jobs.run import log
from schemas.errors import ColdRefreshError
from udfs import splits

#: One split for all seeds of training: the spread is that of training, not of the luck of the split.
SPLIT_SEED = 2026


@dataclass(frozen=True)
class DataSet:
    """Which settings a data set has, and on what dates it is measured.

    conf: its settings. run_date: of the test; a split by time has no validation part, and is tuned on an earlier date.
    split_seed: of the random split by items that the benchmark makes; None where the data set has a split, or is split by time.
    """

    name: str
    conf: str
    run_date: date = date(2026, 1, 1)
    split_seed: int | None = None

    @property
    def split(self) -> str:
        """How it is split, in words."""
        return (
            "split as it comes or by time"
            if self.split_seed is None
            else f"items split at random (seed {self.split_seed})"
        )


DATA_SETS = {
    one.name: one
    for one in (
        DataSet("citeulike-a", "conf/citeulike.yaml"),
        DataSet("amazon-beauty", "conf/amazon.yaml", split_seed=SPLIT_SEED),
        DataSet("amazon-games", "conf/amazon.yaml", split_seed=SPLIT_SEED),
        DataSet("amazon-toys", "conf/amazon.yaml", split_seed=SPLIT_SEED),  # short derived phrases for texts
        DataSet("complete-journey", "conf/demo.yaml", date(2017, 11, 1)),
    )
}


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """--dataset and --conf."""
    known = f"{', '.join(DATA_SETS)}, or another folder of the data folder (default: {default})"
    parser.add_argument("--dataset", nargs="+", default=[default], metavar="NAME", help=known)
    parser.add_argument(
        "--conf", help="another than the data set's own; a folder that is not known has conf/amazon.yaml"
    )


def chosen(args: argparse.Namespace) -> list[DataSet]:
    """What `add_arguments` was given.

    Raises:
        ColdRefreshError: there is no such data set.
        jobs.settings.SettingsError: --conf cannot be used.
    """
    return [_named(name, args.conf) for name in args.dataset]


def _named(name: str, settings: str | None) -> DataSet:
    data = DATA_SETS.get(name)
    if data is None:
        if Path(name).name != name:
            raise ColdRefreshError(f"--dataset {name!r}: the name of a folder in the data folder, not a path")
        data_folder(name)
        data = DataSet(name, "conf/amazon.yaml", split_seed=SPLIT_SEED)
    if settings is None:
        return data
    by_items = conf.load(settings).evaluate.protocol == "random_item"
    return replace(data, conf=settings, split_seed=data.split_seed if by_items else None)


def data_folder(name: str) -> Path:
    """The folder of the data set `name`.

    Raises:
        ColdRefreshError: it is not there.
    """
    folder = Path(os.environ.get("COLD_REFRESH_DATA") or "../shared/data") / name
    if not (folder / "interactions.parquet").is_file():
        raise ColdRefreshError(f"{folder} holds no interactions.parquet: name the data folder in COLD_REFRESH_DATA")
    return folder


def lake_of(data: DataSet, work: Path) -> str:
    """The lake of `data` under `work`; ingested if it is not there yet.

    Raises:
        ColdRefreshError: the data set's files are not there, cannot be read, or are others than the lake was made of.
    """
    lake, made_of = Lake(str(work / data.name), {}), work / f"{data.name}.sha256"
    if data.name == "complete-journey":
        name, request = data.name, Request()
    elif data.name == "citeulike-a":
        name, request = "citeulike", Request(source=data_folder(data.name))
    else:
        split = None if data.split_seed is None else _split(data, data.split_seed, work)
        name, request = "parquet", Request(source=data_folder(data.name), split=split)
    digest = "" if request.source is None else _digest(request.source)
    if made_of.exists() and made_of.read_text() != digest:
        raise ColdRefreshError(f"{lake.uri} was made of another {data.name} than {request.source}: name another --work")
    # With another conf it may have been made without a split.
    if not lake.exists("interactions") or (request.split is not None and not lake.exists("split")):
        log(f"[benchmark] reading {data.name} into {lake.uri}")
        ingest(name, request, lake)
    made_of.write_text(digest)
    return lake.uri


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.parquet")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _split(data: DataSet, seed: int, work: Path) -> Path:
    target = work / f"{data.name}-split.parquet"
    if not target.exists():
        pairs = pd.read_parquet(data_folder(data.name) / "interactions.parquet", columns=["user_id", "item_id"])
        work.mkdir(parents=True, exist_ok=True)
        splits.random_item(pairs.astype(str), seed).to_parquet(target)
    return target
