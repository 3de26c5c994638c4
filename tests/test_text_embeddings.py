"""The stage on real weights, Ray and Delta: cached, resumed after a kill to the same bits, read back in any order."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import text_embeddings
from jobs.lake import Lake
from jobs.ray_cluster import cluster
from jobs.run import Run
from jobs.settings import RayCluster, Settings, Text
from schemas.table import table as schema
from udfs.hashed_words import HashedWords
from udfs.ids import Places
from udfs.model_files import ModelError, find_model
from udfs.text_encoder import TextEncoder

TEXT = Text(model="minilm", max_tokens=32, shard_texts=4)
TEXTS = [f"{word} no. {n}" for word in ("green tea", "chess board", "merino wool yarn") for n in range(5)]

# Runs the stage and is killed by the system right after its second commit.
_KILLED = """
import os, signal, sys
from tests.test_text_embeddings import run_of
from jobs import lake, text_embeddings

commits, commit = [], lake.Lake.commit
def and_die(self, *args, **options):
    version = commit(self, *args, **options)
    commits.append(version)
    if len(commits) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return version
lake.Lake.commit = and_die
run = run_of(sys.argv[1])
text_embeddings.run(run, run.staging("text_embeddings"))
"""


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run_of(lake: str | Path, **text: object) -> Run:
    settings = Settings(lake=str(lake), text=TEXT.model_copy(update=text), ray=RayCluster())
    return Run(settings, date(2026, 3, 1), "20260301-0123456789ab", 1, {}, settings.digest())


def staged(run: Run, texts: list[str | None]) -> Run:
    """`run` with a completed snapshot of items with these texts; None is an item without any."""
    rows = [
        {
            "item_id": f"i{n:03d}",
            "item_idx": n,
            "label": "cold",
            "interactions": 0,
            "title": None,
            "content": text,
            "text_sha256": None if text is None else sha(text),
            "created_at": None,
        }
        for n, text in enumerate(texts)
    ]
    out = run.staging("snapshot")
    out.clear()
    out.write("items_labelled", pa.Table.from_pylist(rows, schema=schema("items_labelled").arrow_schema))
    out.complete({})
    return run


def encode(run: Run) -> dict[str, object]:
    return text_embeddings.run(run, run.staging("text_embeddings"))


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with cluster(RayCluster()):
        yield


def test_texts_are_encoded_once_and_read_back_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "tea " * 2_500_000  # 10 MB
    run = staged(run_of(tmp_path / "lake"), [*TEXTS[:6], None, TEXTS[0], long, "", "茶 🍵"])
    facts = encode(run)
    version = text_embeddings.model_version(run.settings.text)
    assert facts == {"model_version": version, "width": 384, "texts": 9, "encoded": 9, "cached": 0}
    order = [TEXTS[4], TEXTS[0], TEXTS[4], long, "", "茶 🍵"]
    found = text_embeddings.load(run, [sha(t) for t in order], version)
    expected = TextEncoder(find_model("minilm").directory, max_tokens=32).encode(order)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32

    # One more text: only that one is encoded. Then none: neither Ray nor the model is touched.
    assert encode(staged(run, TEXTS[:7]))["encoded"] == 1
    monkeypatch.setattr(text_embeddings, "cluster", None)
    monkeypatch.setattr(text_embeddings, "map_ordered", None)
    assert encode(run) == {**facts, "texts": 7, "encoded": 0, "cached": 7}  # of tonight's
    assert encode(staged(run, [None]))["texts"] == 0
    assert run.lake.read("text_embeddings").num_rows == 10

    with pytest.raises(text_embeddings.TextEmbeddingsError, match=r"lacks 1 of 2 texts.*run the stage"):
        text_embeddings.load(run, [sha(TEXTS[0]), sha("never seen")], version)
    with pytest.raises(text_embeddings.TextEmbeddingsError, match="lacks 1 of 1"):
        text_embeddings.load(run, [sha(TEXTS[0])], "another-model")


def test_a_killed_run_goes_on_behind_its_last_shard_to_the_same_bits(tmp_path: Path) -> None:
    calm = staged(run_of(tmp_path / "calm"), TEXTS)
    encode(calm)
    run = staged(run_of(tmp_path / "killed"), TEXTS)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "killed")], cwd=Path(__file__).parents[1], timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert run.lake.read("text_embeddings").num_rows == 8  # two of four shards
    assert encode(run)["encoded"] == 7

    shas = [sha(text) for text in TEXTS]
    version = text_embeddings.model_version(run.settings.text)
    np.testing.assert_array_equal(text_embeddings.load(run, shas, version), text_embeddings.load(calm, shas, version))
    assert run.lake.read("text_embeddings").num_rows == 15  # nothing twice


def test_rows_that_were_deleted_are_encoded_again(tmp_path: Path) -> None:
    run = staged(run_of(tmp_path / "lake"), TEXTS[:4])
    version = text_embeddings.model_version(run.settings.text)
    shas = pa.array(sorted(sha(t) for t in TEXTS[:4]))
    # As an earlier run left it: the shard committed under its name, its rows deleted since.
    rows = text_embeddings._rows(shas, version, np.zeros((4, 384), np.float32))
    app = text_embeddings._app(shas, version)
    run.lake.commit("text_embeddings", rows, app=app)
    run.lake.table("text_embeddings").delete()
    assert encode(run)["encoded"] == 4
    vectors = text_embeddings.load(run, shas.to_pylist(), version)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_texts_that_were_deleted_since_a_run_needed_them_are_encoded_again_where_they_are_read(tmp_path: Path) -> None:
    run = staged(run_of(tmp_path / "lake", also=("words-256",)), TEXTS[:4])
    version, shas = str(encode(run)["model_version"]), [sha(t) for t in TEXTS[:4]]
    before = text_embeddings.load(run, shas, version)
    run.lake.table("text_embeddings").delete(f"text_sha256 IN ('{shas[1]}', '{shas[2]}')")
    np.testing.assert_allclose(text_embeddings.load(run, shas[::-1], version), before[::-1], atol=1e-5)
    assert run.lake.read("text_embeddings").num_rows == 8
    run.lake.table("text_embeddings").delete(f"text_sha256 = '{shas[1]}'")
    run.staging("snapshot").clear()
    with pytest.raises(text_embeddings.TextEmbeddingsError, match="lacks 1 of 4"):
        text_embeddings.load(run, shas, version)


def test_rows_that_stand_twice_do_no_harm(tmp_path: Path) -> None:
    run = staged(run_of(tmp_path / "lake"), TEXTS[:3])
    version = text_embeddings.model_version(run.settings.text)
    shas = [sha(t) for t in TEXTS[:3]]
    vectors = np.arange(3 * 384, dtype=np.float32).reshape(3, 384)
    for app in ("one run", "another run"):
        run.lake.commit("text_embeddings", text_embeddings._rows(pa.array(shas), version, vectors), app=app)
    np.testing.assert_array_equal(text_embeddings.load(run, shas[::-1], version), vectors[::-1])
    assert encode(run)["cached"] == 3
    wider = text_embeddings._rows(pa.array(shas), version, np.ones((3, 8), np.float32))
    run.lake.commit("text_embeddings", wider, app="of another width")
    with pytest.raises(text_embeddings.TextEmbeddingsError, match=r"width|and 8|8 and"):
        text_embeddings.load(run, shas, version)


def test_vectors_of_several_models_stand_side_by_side(tmp_path: Path) -> None:
    alone = staged(run_of(tmp_path / "lake"), TEXTS[:3])
    encode(alone)
    other = tmp_path / "minilm-cls"
    shutil.copytree(find_model("minilm").directory, other)
    pooling = other / "1_Pooling" / "config.json"
    recipe = json.loads(pooling.read_text())
    pooling.write_text(json.dumps({**recipe, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    both = staged(run_of(tmp_path / "lake", also=(str(other), "words-256")), TEXTS[:3])
    facts = encode(both)
    assert facts == {**facts, "width": 384 + 384 + 256, "texts": 3, "encoded": 6, "cached": 3}  # MiniLM's are there
    assert facts["model_version"] == text_embeddings.model_version(both.settings.text)
    shas = [sha(t) for t in TEXTS[:3]]
    found = text_embeddings.load(both, shas[::-1], str(facts["model_version"]))
    first, second, words = str(facts["model_version"]).split("+")
    np.testing.assert_array_equal(found[:, :384], text_embeddings.load(alone, shas[::-1], first))
    np.testing.assert_array_equal(found[:, 384:768], text_embeddings.load(alone, shas[::-1], second))
    assert not np.allclose(found[:, :384], found[:, 384:768], atol=0.1)
    assert words.startswith("words-256-")
    np.testing.assert_array_equal(found[:, 768:], HashedWords(256, 128).encode(TEXTS[:3][::-1]))


def test_a_model_that_is_missing_or_another_one_stops_before_ray(tmp_path: Path) -> None:
    run = staged(run_of(tmp_path / "lake", model=str(tmp_path / "nowhere")), TEXTS)
    with pytest.raises(ModelError, match="no such directory"):
        encode(run)
    run = staged(run_of(tmp_path / "lake", sha256="f" * 64), TEXTS)
    with pytest.raises(ModelError, match=r"f{64} is expected"):
        encode(run)
    assert not run.lake.exists("text_embeddings")


def test_of_a_large_cache_only_what_is_wanted_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "lake")
    shas = sorted(sha(str(n)) for n in range(40))
    for n in range(8):
        part = text_embeddings._rows(pa.array(shas[n * 5 : n * 5 + 5]), "m", np.full((5, 2), n, np.float32))
        run.lake.commit("text_embeddings", part, app=str(n))
    other = text_embeddings._rows(pa.array([sha("x")]), "another", np.zeros((1, 2), np.float32))
    at = run.lake.commit("text_embeddings", other, app="another")
    made: list[int] = []

    class Counted(Places):
        def __init__(self, among: pa.Array) -> None:
            made.append(len(among))
            super().__init__(among)

    monkeypatch.setattr(text_embeddings, "Places", Counted)
    # To read all of it at once is what fails: 33 million hashes are 2 GiB.
    monkeypatch.setattr(Lake, "read", None)
    wanted = text_embeddings.distinct(pa.array([shas[3], None, sha("x"), shas[30], shas[3]]))
    version, there = text_embeddings.cached(run.lake, "m", wanted)
    assert (version, dict(zip(wanted.to_pylist(), there.tolist(), strict=True))) == (
        at,
        {shas[3]: True, shas[30]: True, sha("x"): False},
    )
    found = text_embeddings.load(run, [shas[30], shas[3], shas[39], shas[3]], "m")
    assert found[:, 0].tolist() == [6, 0, 7, 0]
    assert made == [3, 3], "once, not with each batch of the table"
    assert text_embeddings.cached(run.lake, "m", wanted.slice(0, 0))[1].tolist() == []
    # Slices behind 2 GiB of hashes keep their place, and are committed all the same.
    size = 3 << 29
    offsets = np.array([0, size, 2 * size, 2 * size + 1], np.int64)
    zeros = np.zeros(2 * size + 1, np.uint8)
    column = pa.LargeStringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(zeros))
    assert text_embeddings._rows(column.slice(2), "m", np.zeros((1, 2), np.float32)).num_rows == 1
