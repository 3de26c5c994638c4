"""Text to distribution against text to judgment (ColdLLM's way): the same language model, dtype and batches, in one run.

The titles and the filter's candidates are CiteULike's (citeulike-a of the data folder: $COLD_REFRESH_DATA, or ../shared/data).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from jobs.benchmark.datasets import data_folder
from jobs.benchmark.measure import SHARES, ceilings, layer_weights, shares
from jobs.benchmark.table import table
from jobs.run import log
from schemas.errors import ColdRefreshError
from udfs import two_tower
from udfs.devices import forked
from udfs.filterllm import Config, FilterLLM
from udfs.fold_in import to_csr
from udfs.judged_pairs import recent
from udfs.judgment import Judge, Question
from udfs.model_files import find_model
from udfs.streaming_topk import top_k
from udfs.text_encoder import TextEncoder

Ints = NDArray[np.int64]
#: How much faster FilterLLM's paper (arXiv 2502.16924) is than ColdLLM, an item.
PAPER = 34.75
_WIDTH = 128  # of the user vocabulary; what was measured is with this one, conf/citeulike.yaml has 256
_BATCH_TOKENS = 8192
# What FilterLLM's own prompts are like: a task, then the item.
_TASK = "Describe which researchers will want to read a paper with the following title.\nTitle: {title}\nResearchers:"
# The least that an item's own part of the prompt can be: the question is asked before it, once a user.
_FIRST = Question(
    user="A person saved these:\n{history}\nWould the same person save the next one too? Answer Yes or No.\n",
    item="\n- {title}",
)


def filter_folder() -> Path:
    """Where citeulike-a and the pairs of ColdLLM's filter are. Raises ColdRefreshError if they are nowhere."""
    folder = data_folder("citeulike-a")
    if not (folder / "coldllm_filter.parquet").is_file():
        raise ColdRefreshError(f"no {folder}/coldllm_filter.parquet: name the data folder in COLD_REFRESH_DATA")
    return folder


@dataclass(frozen=True)
class _Sample:
    """Titles of all items, histories of all users (titles), and the filter's pairs (user, item) of all cold items."""

    titles: list[str]
    histories: list[list[str]]
    users: Ints
    items: Ints


def _read(folder: Path, history: int) -> _Sample:
    items = pd.read_parquet(folder / "items.parquet").sort_values("item_id")
    split = pd.read_parquet(folder / "split.parquet")
    pairs = pd.read_parquet(folder / "coldllm_filter.parquet").sort_values(["item_id", "user_id"])
    train = split[split["part"] == "train"]
    item_ids, user_ids = pd.Index(items["item_id"]), pd.Index(sorted(train["user_id"].unique()))
    rows, columns = user_ids.get_indexer(train["user_id"]), item_ids.get_indexer(train["item_id"])
    indptr, indices, _ = to_csr(rows, columns, np.ones(len(rows)), len(user_ids))
    titles = items["title"].tolist()
    histories = [[titles[item] for item in chosen] for chosen in recent(indptr, indices, history)]
    pairs = pairs[pairs["user_id"].isin(user_ids)]
    return _Sample(titles, histories, user_ids.get_indexer(pairs["user_id"]), item_ids.get_indexer(pairs["item_id"]))


def measure_speed(
    items: int = 40,
    *,
    ceilings: Mapping[str, float],
    model: str = "smollm2",
    history: int = 10,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    rounds: int = 4,
    seed: int = 7,
) -> dict[str, Any]:
    """Items a second of both ways, K = 20 users an item, and how many times faster text to distribution is.

    The items are drawn from CiteULike's cold ones and the users are those that ColdLLM's released filter kept of them. Each
    round times every way on its share of the sample, so that a machine that slows down slows all of them. With a shared
    prefix, how many pairs share one decides the cost: that way is timed on all pairs of users drawn at random, as many
    pairs as the others have, so that they share as on a night of all cold items. Its best form asks the question in the
    shared part; what that does to the answers is not measured here.

    The shares of `ceilings` (of `jobs.benchmark.measure`, for this device) that a way reaches count the language model alone:
    2 FLOP a weight of its layers and token that it reads, and these weights once a pass of the model, be it for many tokens or
    few. Activations, keys and values do not count.

    Returns:
        tables (one), seconds_an_item and ratio by way, tokens_an_item and passes_an_item (of the language model) by way,
        stages (seconds an item), and the options.
    """
    data = _read(filter_folder(), history)
    rng = np.random.Generator(np.random.Philox(seed))
    cold = np.unique(data.items)
    chosen = rng.permutation(cold)[:items]
    k = len(data.items) / len(cold)
    directory = find_model(model).directory
    options: dict[str, Any] = {"dtype": dtype, "batch_tokens": _BATCH_TOKENS, "device": device}
    asked = Judge(directory, **options)
    encoder = asked.encoder  # one set of weights for both ways
    scorer = _Scorer(encoder, len(data.histories), seed)
    of_user = np.argsort(data.users, kind="stable")
    starts = np.searchsorted(data.users[of_user], np.arange(len(data.histories) + 1))
    by_user = rng.permutation(np.unique(data.users))
    shared_pairs = np.cumsum([starts[u + 1] - starts[u] for u in by_user])
    by_user = by_user[: 1 + int(np.searchsorted(shared_pairs, items * k))]
    spent: dict[str, float] = {}
    passes: dict[str, float] = {}
    counted = {"shared": 0, "passes": 0}

    def count(*_: Any) -> None:
        counted["passes"] += 1

    encoder.model.register_forward_pre_hook(count)

    def timed(name: str, work: Callable[..., Any], *given: Any) -> Any:
        counted["passes"] = 0
        begun = time.perf_counter()
        result = work(*given)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
        passes[name] = passes.get(name, 0.0) + counted["passes"]
        return result

    # Warmed up: threads are started and kernels are chosen.
    encoder.encode([data.titles[i] for i in chosen[:4]])
    asked.score(data.histories, data.titles, data.users[:2], data.items[:2])
    scorer.top(np.zeros((1, encoder.width), np.float32))
    for number in range(rounds):
        part = chosen[number::rounds]
        own = np.flatnonzero(np.isin(data.items, part))
        group = np.concatenate([of_user[starts[u] : starts[u + 1]] for u in by_user[number::rounds]])
        counted["shared"] += len(group)
        texts = [data.titles[i] for i in part]
        states = timed("encode", encoder.encode, texts)
        timed("map and top-K", scorer.top, states)
        timed("encode with a task", encoder.encode, [_TASK.format(title=text) for text in texts])
        timed("filter", scorer.filter, states)
        timed("judge", _score, asked, data, own, False, Question())
        timed("judge, shared", _score, asked, data, group, True, Question())
        timed("judge, shared, question first", _score, asked, data, group, True, _FIRST)
        log(f"judgment: round {number + 1} of {rounds}, {sum(spent.values()):.0f} s")
    each, passes = (
        {
            name: k * total / counted["shared"] if "shared" in name else total / len(chosen)
            for name, total in totals.items()
        }
        for totals in (spent, passes)
    )
    seconds, passes = _of_ways(each), _of_ways(passes)
    tokens = _tokens(asked, encoder, data, chosen, k)
    ratio = {name: value / seconds["distribution"] for name, value in seconds.items()}
    weights = layer_weights(encoder.model)
    rows = []
    for name, value in seconds.items():
        moved = weights * encoder.model.dtype.itemsize * passes[name]
        reached = shares(ceilings, value, 2 * weights * tokens[name], moved, dtype)
        rows.append([name, 1 / value, 1000 * value, tokens[name], ratio[name], *reached])
    note = (
        f"{len(chosen)} cold items of CiteULike, K = {k:g}, {history} titles a user, {model} in {dtype} on {device}, "
        f"{torch.get_num_threads()} threads, seed {seed}. The paper's ratio is {PAPER}. Of a judgment "
        f"{100 * each['judge'] / seconds['judgment']:.1f} % is the judge. The shares count the language model alone: "
        "2 FLOP a weight of its layers and token, these weights once a pass."
    )
    columns = ["way", "items/s", "ms an item", "LLM tokens an item", "times the distribution's", *SHARES]
    return {
        "tables": [table("Text to distribution against text to judgment", columns, rows, note)],
        "seconds_an_item": seconds,
        "ratio": ratio,
        "ratio_with_task": {
            name: value / seconds["distribution, task in the prompt"] for name, value in seconds.items()
        },
        "paper_ratio": PAPER,
        "tokens_an_item": tokens,
        "passes_an_item": passes,
        "stages": each,
        "items": len(chosen),
        "k": k,
        "history": history,
        "pairs_of_shared": counted["shared"],
        "users_of_shared": len(by_user),
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }


def _of_ways(stages: dict[str, float]) -> dict[str, float]:
    """What each way costs, in whatever its stages' costs are."""
    # ColdLLM's filter reads the item once, as FilterLLM does, before its towers.
    judged = stages["encode"] + stages["filter"]
    return {
        "distribution": stages["encode"] + stages["map and top-K"],
        "distribution, task in the prompt": stages["encode with a task"] + stages["map and top-K"],
        "judgment": judged + stages["judge"],
        "judgment, shared prefix": judged + stages["judge, shared"],
        "judgment, shared prefix, question first": judged + stages["judge, shared, question first"],
    }


class _Scorer:
    """FilterLLM's mapper and vocabulary, and ColdLLM's towers; what their weights are costs nothing.

    The mapper is as wide inside as `Config` has it, 512: so it was measured. That of conf/citeulike.yaml has 2048.
    """

    def __init__(self, encoder: TextEncoder, users: int, seed: int) -> None:
        with forked(encoder.device):
            torch.manual_seed(seed)
            self.model = FilterLLM(Config(width=encoder.width, dimension=_WIDTH, users=users)).to(encoder.device)
            self.model.vocabulary.data.normal_()
            self.towers = two_tower.TwoTower(encoder.width, two_tower.Options()).to(encoder.device).eval()
            # As FilterLLM's vocabulary, the users' vectors are there before the night.
            self.users = torch.randn(users, two_tower.Options().dimension).to(encoder.device)

    def top(self, states: np.ndarray) -> None:
        keys, bias = self.model.vocabulary.detach(), self.model.bias
        queries = torch.from_numpy(self.model.queries(states)).to(keys.device)
        top_k(queries, keys, 20, bias=None if bias is None else bias.detach())

    def filter(self, states: np.ndarray) -> None:
        top_k(self.towers.vectors(states, self.towers.item), self.users, 20)


def _score(model: Judge, data: _Sample, pairs: Ints, share_prefix: bool, question: Question) -> None:
    model.question = question
    model.score(data.histories, data.titles, data.users[pairs], data.items[pairs], share_prefix=share_prefix)


def _tokens(model: Judge, encoder: TextEncoder, data: _Sample, chosen: Ints, k: float) -> dict[str, float]:
    """What the language model reads an item, without padding; of the shared prefix, on a night of all cold items."""
    cold = np.unique(data.items)
    users = np.unique(data.users)
    shared = {}
    for name, question in (
        ("judgment, shared prefix, question first", _FIRST),
        ("judgment, shared prefix", Question()),
    ):
        model.question = question
        prefix = dict(zip(users, (len(model.prefix(data.histories[u])) for u in users), strict=True))
        suffix = np.mean([len(model.suffix(data.titles[i])) for i in chosen])
        shared[name] = sum(prefix.values()) / len(cold) + k * suffix
    own = np.flatnonzero(np.isin(data.items, chosen))
    title = [len(ids) for ids in encoder.tokens([data.titles[i] for i in chosen])]
    task = [len(ids) for ids in encoder.tokens([_TASK.format(title=data.titles[i]) for i in chosen])]
    return {
        "distribution": float(np.mean(title)),
        "distribution, task in the prompt": float(np.mean(task)),
        "judgment": float(np.mean(title) + k * (np.mean([prefix[data.users[p]] for p in own]) + suffix)),
        **{name: float(np.mean(title) + tokens) for name, tokens in reversed(shared.items())},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", type=int, default=40, help="cold items, drawn (default: %(default)s)")
    parser.add_argument("--history", type=int, default=10, help="titles a user (default: %(default)s)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return measure_speed(
        args.items,
        ceilings=ceilings(args.device),
        model=args.model,
        history=args.history,
        dtype=args.dtype,
        device=args.device,
        rounds=args.rounds,
        seed=args.seed,
    )
