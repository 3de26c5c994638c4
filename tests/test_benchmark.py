"""The benchmark command: its tables, its options, and that what it compares gives the same results. No time is asserted."""

from __future__ import annotations

import argparse
import json
import types

import numpy as np
import pandas as pd
import pytest
import torch

from jobs.benchmark import __main__ as command
from jobs.benchmark import encoding_speed, lightgcn, scoring_speed, training_speed
from jobs.benchmark.measure import device, fresh, interleaved, peak_memory
from jobs.benchmark.table import best_and_spread, markdown, mean_and_spread, table
from schemas.errors import ColdRefreshError
from udfs.cf_inputs import CfParams
from udfs.splits import leave_one_out


def test_tables_in_markdown():
    text = markdown([table("T", ["name", "value"], [["a|b", 0.12345], [None, 2]], "a note")])
    assert text.splitlines() == [
        "### T", "", "| name |  value |", "| ---- | -----: |", "| a\\|b | 0.1235 |", "|      |      2 |", "", "a note",
    ]  # fmt: skip
    assert mean_and_spread([0.1, 0.2, 0.3], 2) == "0.20 ± 0.10"
    assert (mean_and_spread([0.5], 1), mean_and_spread([])) == ("0.5", "")
    assert best_and_spread([0.012, 0.010, 0.020]) == "10 ms (+20 %)"
    with pytest.raises(ValueError, match="2 columns"):
        table("T", ["a", "b"], [[1]])


def test_a_subject_leaves_json_and_a_table(tmp_path, monkeypatch, capsys):
    result = {"tables": [table("T", ["a"], [[1]])], "figure": 2}
    subject = types.SimpleNamespace(
        __doc__="A subject.",
        add_arguments=lambda p: p.add_argument("--n", type=int),
        run=lambda args: {**result, "n": args.n},
    )
    monkeypatch.setattr(command, "import_module", {"jobs.benchmark.speed": subject}.__getitem__)
    assert command.main(["speed", "--n", "3", "--out", str(tmp_path / "new")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "new" / "speed.json").read_text()) == {**result, "n": 3}
    assert (tmp_path / "new" / "speed.md").read_text().startswith("### T\n")


def test_wrong_options_are_said(capsys):
    assert command.main(["speed", "--parts", "scoring,cooking"]) == 1
    assert "choose from scoring, training" in capsys.readouterr().err
    assert command.main(["speed", "--users", "many"]) == 1
    assert "--users 'many'" in capsys.readouterr().err


def test_what_is_compared_gives_the_same():
    names = [scoring_speed.STREAMING, scoring_speed.DRAWN, scoring_speed.DENSE, scoring_speed.FAISS]
    found = scoring_speed.times(names, users=3000, items=32, seed=0, repeats=1)
    assert found["shared"] == 1.0
    assert found["lse_error"] < 1e-6
    assert all(len(seconds) == 1 for seconds in found["seconds"].values())
    found = training_speed.times([training_speed.TILED, training_speed.DENSE], users=3000, items=32, seed=0, repeats=1)
    assert found["difference"] < 1e-5


def test_encoders_that_are_compared_give_the_same_vectors():
    found = encoding_speed._measure(
        "minilm", [f"{size} cup for {drink}" for size in ("a", "a large") for drink in ("tea", "milk")]
    )
    differ = found["differ"]
    assert list(found["seconds"]) == list(differ)
    assert all(value < 1e-4 for name, value in differ.items() if name.endswith("float32"))
    assert all(0 < value < 0.05 for name, value in differ.items() if name.endswith("bfloat16"))
    assert len(differ) == 6
    assert found["batches"] == {encoding_speed.OURS: 1, encoding_speed.ST: 1, encoding_speed.PLAIN: 1}
    # MiniLM's 22.7 million, but for the embeddings.
    assert 10e6 < found["weights"] < 12e6


@pytest.mark.parametrize("part", [scoring_speed, training_speed])
def test_tables_say_which_share_of_the_ceilings_is_reached(part, monkeypatch):
    monkeypatch.setattr(part, "fresh", lambda module, function, **given: getattr(part, function)(**given))
    found = part.run([1000, 2000], 16, 0, {"float32 FLOP/s": 1e9, "memory bytes/s": 1e8})
    (made,) = found["tables"]
    seconds = {case["users"]: case["seconds"] for case in found["cases"]}
    products, passes, results = (1, 1, 16 * 16 * 20) if part is scoring_speed else (3, 3, 0)
    assert len(made["rows"]) == sum(map(len, seconds.values()))
    for row in made["rows"]:
        cells = dict(zip(made["columns"], row, strict=True))
        best = min(seconds[cells["users"]][cells["method"]])
        product = 2 * 16 * cells["users"] * 64
        assert cells["share of the matmul ceiling"] == pytest.approx(products * product / best / 1e9)
        moved = passes * 4 * 64 * (16 + cells["users"]) + results
        assert cells["share of the memory ceiling"] == pytest.approx(moved / best / 1e8)


def test_a_process_of_its_own_says_what_a_function_gives_or_fails_with_it():
    given = {"users": 2000, "items": 16, "seed": 0}
    assert fresh("training_speed", "memory", name=training_speed.DENSE, **given) >= 0
    with pytest.raises(ColdRefreshError):
        fresh("training_speed", "no_such_function", **given)


def test_lightgcn_is_trained_and_measured_as_recboles_is():
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame({"user_id": np.repeat(np.arange(60), 8), "item_id": 0})
    pairs["item_id"] = pairs["user_id"] % 3 + 3 * rng.integers(
        0, 15, len(pairs)
    )  # a user stays with a third of the items
    split = leave_one_out(pairs.drop_duplicates().astype(str), 7)
    params = CfParams(dimension=16, epochs=40, batch_size=64, layers=2, learning_rate=0.01, device="cpu")
    seconds, users, items, ids = lightgcn._ours(split, params, argparse.Namespace(seed=7))
    assert len(seconds) == 40
    chance = lightgcn._ndcg(split, rng.normal(size=users.shape), rng.normal(size=items.shape), ids, 7)
    assert lightgcn._ndcg(split, users, items, ids, 7) > chance + 0.1


def test_measuring():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3  # the first round warms up
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}
    assert peak_memory(lambda: torch.ones(2**25, device=device())) == pytest.approx(2**27, rel=0.1)
