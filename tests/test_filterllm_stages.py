"""The stages filterllm_train and filterllm_score on a small lake, with real MiniLM weights and real Ray actors."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import safetensors.torch

from jobs import filterllm_score, filterllm_train, text_embeddings
from jobs.filterllm_train import load_model
from jobs.ray_cluster import ClusterError, require_workers
from jobs.run import Run, execute
from jobs.staging import Staging
from tests.filterllm_night import night, score, train
from tests.small_lake import RUN_DATE, tables
from udfs import filterllm_training, word_map
from udfs.filterllm import FilterLLMError
from udfs.ray_training import Journal
from udfs.vectors import from_column

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with the texts' embeddings and a trained model of RUN_DATE."""
    folder = tmp_path_factory.mktemp("lake")
    execute(night(folder), "filterllm_train", filterllm_train.run)
    return folder


def test_new_items_go_to_the_users_of_their_topic(lake: Path) -> None:
    run = night(lake)
    facts, sampled = score(run)
    assert facts["items"] == facts["scored"] + facts["reused"] == 12
    assert facts["rows"] == sampled.num_rows == 120
    assert sampled["rank"].to_pylist() == list(range(1, 11)) * 12
    assert sampled["item_id"].to_pylist() == sorted(sampled["item_id"].to_pylist())
    p = sampled["probability"].to_numpy().reshape(12, 10)
    assert ((p > 0) & (p <= 1)).all()
    assert (np.diff(p, axis=1) <= 0).all()
    assert set(sampled["propensity"].to_pylist()) == {"top_k"}
    # What training was validated on gets users too: the refresh takes from it how cold vectors are made.
    words, unseen = (filterllm_train.load_words(run, facts["model_version"], held_out=held) for held in (True, False))
    assert words is not None
    assert unseen is not None
    assert words.vectors.shape == (len(words.words), 8)
    held = run.staging("filterllm_score").read("held_out")
    space, texts = run.artifact("spaces", "space-a").read("items"), run.staging("snapshot").read("items_labelled")
    content = dict(zip(texts["item_id"].to_pylist(), texts["content"].to_pylist(), strict=True))
    for found, learnt in (
        (words, space),  # the second has not learnt from what it is measured by
        (unseen, space.filter(pc.invert(pc.is_in(space["item_id"], held["item_id"].combine_chunks())))),
    ):
        of_texts = [content[item] for item in learnt["item_id"].to_pylist()]
        expected = word_map.fit(of_texts, from_column(learnt["embedding"]), run.settings.filterllm.word_ridge)
        assert expected is not None
        assert found.words == expected.words
        np.testing.assert_allclose(found.idf, expected.idf)
        np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)
    assert learnt.num_rows == space.num_rows - facts["held_out"] < space.num_rows
    assert pc.count_distinct(held["item_id"]).as_py() == facts["held_out"] == train(run)["validation_items"]
    labels = run.staging("snapshot").read("items_labelled", ["item_id", "label"])
    warm = labels.filter(pc.equal(labels["label"], "warm"))["item_id"]
    assert pc.all(pc.is_in(held["item_id"], value_set=warm.combine_chunks())).as_py()
    topics = [i.split("-")[0] == u.split("-")[0] for i, u in zip(sampled["item_id"].to_pylist(), sampled["user_id"].to_pylist(), strict=True)]  # fmt: skip  # noqa: E501
    assert np.mean(topics) > 0.8
    # Against the dense distribution, from the saved model.
    model = load_model(run, facts["model_version"])
    vocabulary = run.artifact("models", facts["model_version"]).read("users")["user_id"].to_pylist()
    items = run.staging("snapshot").read("items_labelled")
    cold = items.filter(pc.equal(items["label"], "cold"))
    version = run.staging("text_embeddings").facts()["model_version"]
    queries = model.queries(text_embeddings.load(run, cold["text_sha256"].to_pylist(), version)).astype(float)
    keys, bias = model.keys()
    logits = queries @ keys.astype(float).T + bias
    dense = np.exp(logits - np.logaddexp.reduce(logits, axis=1)[:, None])
    np.testing.assert_allclose(p, -np.sort(-dense, axis=1)[:, :10], rtol=1e-4)
    best = [vocabulary[n] for n in dense.argmax(axis=1)]
    assert best == sampled.filter(pc.equal(sampled["rank"], 1))["user_id"].to_pylist()


@pytest.mark.parametrize("start", ["cf", "random"])
def test_the_vocabulary_begins_where_the_settings_say(lake: Path, start: str) -> None:
    run = night(lake, filterllm={"user_init": start, "epochs": 1, "learning_rate": 1e-9, "weight_decay": 0.0})
    model = filterllm_train.load_model(run, train(run)["model_version"])
    of_cf = from_column(run.artifact("spaces", "space-a").read("users")["embedding"])
    assert np.allclose(model.vocabulary.detach().numpy(), of_cf, atol=1e-4) == (start == "cf")


def test_a_model_is_kept_until_it_is_stale_and_never_comes_from_the_future(lake: Path) -> None:
    first = train(night(lake))
    later = train(night(lake, RUN_DATE + timedelta(days=4)))
    assert (later["model_version"], later["trained"]) == (first["model_version"], False)
    for changed in (
        night(lake, filterllm={"hidden": 16, "epochs": 1}),  # other settings
        night(lake, space="space-b", filterllm={"epochs": 1}),  # another space
        night(lake, text={"max_tokens": 16}, filterllm={"epochs": 1}),  # texts
    ):
        facts = train(changed)
        assert facts["trained"]
        assert facts["model_version"] != first["model_version"]
    earlier = train(night(lake, RUN_DATE - timedelta(days=1), texts={"tea-0": "chess pieces"}))
    assert earlier["trained"]
    assert earlier["model_version"] != first["model_version"]
    assert load_model(night(lake), first["model_version"]).config.users == first["users"]


def test_a_model_of_restored_data_is_the_newest_again(lake: Path) -> None:
    few = {"epochs": 1}
    versions = []
    for texts in (None, {"tea-0": "chess pieces"}, None):
        run = night(lake, texts=texts, filterllm=few)
        versions.append(train(replace(run, settings=run.settings.training()))["model_version"])
        next_night = train(night(lake, RUN_DATE + timedelta(days=1), texts=texts, filterllm=few))
        assert (next_night["model_version"], next_night["trained"]) == (versions[-1], False)
    assert (versions[0] == versions[2], versions[0] == versions[1]) == (True, False)


def test_a_model_that_another_run_trained_meanwhile_is_left_as_it_is(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = filterllm_training.train

    def slow(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(filterllm_training, "train", fit)
        train(night(lake, filterllm={"epochs": 3}))
        monkeypatch.setattr(
            Staging,
            "write_bytes",
            lambda folder, name, body: (
                pytest.fail(f"{folder.uri} is complete: {name}")
                if "/models/" in folder.uri
                else write(folder, name, body)
            ),
        )
        return fit(*args, **options)

    write = Staging.write_bytes
    monkeypatch.setattr(filterllm_training, "train", slow)
    assert train(night(lake, filterllm={"epochs": 3}))["trained"] is False


def test_only_new_and_changed_items_are_scored(lake: Path) -> None:
    sampling = {"k": 7}
    facts, before = score(night(lake, sampling=sampling))
    assert (facts["scored"], facts["reused"]) == (12, 0)
    facts, again = score(night(lake, sampling=sampling, refresh={"scale": 2.0, "words": 0}))
    assert facts["held_out"] == 0  # nothing is measured by them
    assert (facts["scored"], facts["reused"]) == (0, 12)
    assert again.equals(before)
    facts, changed = score(night(lake, sampling=sampling, texts={"tea-new-1": "chess pieces of wood, a chess clock"}))
    assert (facts["scored"], facts["reused"]) == (1, 11)
    moved = pc.equal(changed["item_id"], "tea-new-1")
    assert changed.filter(pc.invert(moved)).equals(before.filter(pc.invert(moved)))
    assert not changed.filter(moved)["user_id"].equals(before.filter(moved)["user_id"])


def test_deleted_users_are_never_drawn(lake: Path) -> None:
    _, before = score(night(lake))
    gone = set(before["user_id"].to_pylist()[:3])
    facts, after = score(night(lake, RUN_DATE + timedelta(days=1), without=gone))
    assert facts["users"] == 80 - len(gone)
    assert facts["scored"] == 12
    assert after.num_rows == 120
    assert not gone & set(after["user_id"].to_pylist())


@pytest.mark.parametrize("draw", ["top_k", "sampled"])
def test_a_killed_run_goes_on_and_shards_do_not_matter(lake: Path, draw: str) -> None:
    """The first shard is committed and the run dies; the next one does the rest. Other shards and tiles give the same users."""
    sampling = {"k": 9, "draw": draw, "temperature": 1.5}
    killed = night(lake, sampling=sampling)
    trained = train(killed)
    vocabulary = killed.artifact("models", trained["model_version"]).read("users")["user_id"].combine_chunks()
    allowed = filterllm_score._allowed(killed, vocabulary)
    version = filterllm_score._scoring_version(killed, trained["model_version"], vocabulary)
    items = killed.staging("snapshot").read("items_labelled")
    cold = items.filter(pc.equal(items["label"], "cold")).select(["item_id", "text_sha256"]).sort_by("item_id")
    filterllm_score._score(killed, trained, vocabulary, allowed, version, cold.slice(0, 5).combine_chunks())
    commits = killed.lake.version("item_scores")
    facts = execute(killed, "filterllm_score", filterllm_score.run)
    assert (facts["scored"], facts["reused"]) == (7, 5)
    left = 7 + facts["held_out"]
    assert killed.lake.version("item_scores") == commits + -(-left // 5)  # shards of 5 items
    sampled = killed.staging("filterllm_score").read("sampled")
    # The cache emptied, everything is found again in other shards and tiles.
    killed.lake.table("item_scores").delete(f"scoring_version = '{version}'")
    facts, whole = score(night(lake, sampling={**sampling, "shard_items": 12, "user_tile": 16384}))
    assert facts["scored"] == 12
    assert whole.select(["item_id", "user_id", "rank", "propensity"]).equals(
        sampled.select(["item_id", "user_id", "rank", "propensity"])
    )
    np.testing.assert_allclose(whole["probability"].to_numpy(), sampled["probability"].to_numpy(), rtol=1e-5)
    assert set(sampled["propensity"].to_pylist()) == {draw}


def test_no_cold_items_is_a_good_night(lake: Path) -> None:
    facts, sampled = score(night(lake, cold=False))
    assert (facts["items"], facts["rows"], facts["scored"], facts["reused"]) == (0, 0, 0, 0)
    assert sampled.num_rows == 0
    assert sampled.schema.names == ["item_id", "user_id", "rank", "probability", "propensity"]
    assert facts["model_version"]


def test_items_without_any_text_and_strangers_only_are_clear_errors(lake: Path) -> None:
    _, items = tables()
    wordless = dict.fromkeys(items["item_id"].to_pylist())
    silent = night(lake, texts=wordless, space="space-c")
    with pytest.raises(FilterLLMError, match="48 are warm, 0 of them have a text"):
        filterllm_train.run(silent, silent.staging("filterllm_train"))
    run = night(lake)
    train(run)
    users = run.staging("snapshot").read("users")
    strangers = [f"stranger-{n}" for n in range(users.num_rows)]
    run.staging("snapshot").write("users", users.set_column(0, "user_id", pa.array(strangers)))
    with pytest.raises(FilterLLMError, match="none of the model's 80 users"):
        filterllm_score.run(run, run.staging("filterllm_score"))


def test_with_lora_cold_texts_go_through_the_trained_model(lake: Path) -> None:
    conf = {"lora": True, "lora_targets": "all_linear", "vocabulary": "llm", "epochs": 2, "batch_size": 48}
    run = night(lake, filterllm=conf)
    facts, sampled = score(run)
    trained = run.staging("filterllm_train").facts()
    assert trained["encoder_version"] == f"lora-{facts['model_version']}"
    assert load_model(run, facts["model_version"]).config.dimension == 384
    assert sampled.num_rows == 120
    shas = run.staging("snapshot").read("items_labelled")
    shas = shas.filter(pc.equal(shas["label"], "cold"))["text_sha256"].to_pylist()
    adapted = text_embeddings.load(run, shas, trained["encoder_version"])
    frozen = text_embeddings.load(run, shas, run.staging("text_embeddings").facts()["model_version"])
    assert np.abs(adapted - frozen).max() > 1e-3
    assert np.abs(adapted - frozen).max() < 1.0
    # jobs.prune has deleted them, and the date is measured: its scores are there, its texts are read again.
    run.lake.table("text_embeddings").delete(f"model_version = '{trained['encoder_version']}'")
    again = text_embeddings.load(run, shas, trained["encoder_version"])
    np.testing.assert_allclose(again, adapted, atol=1e-5)


# --- Killed trainings, and training over Ray Train's workers


def _fit(run: Run) -> dict[str, np.ndarray]:
    """The tensors of the model that this run trains."""
    facts = execute(run, "filterllm_train", filterllm_train.run)
    assert facts["trained"]
    artifact = run.artifact("models", facts["model_version"])
    artifact.verify()
    assert not Path(run.artifact("checkpoints", facts["model_version"]).uri).exists()
    tensors = safetensors.torch.load(artifact.read_bytes("model.safetensors"))
    # So that the next one is trained, too.
    artifact.clear()
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_a_killed_stage_goes_on_from_its_checkpoint(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = {"epochs": 5, "lora_rank": 4}
    expected = _fit(night(lake, filterllm=conf))
    run = night(lake, filterllm=conf)
    told: list[str] = []

    def log(line: str) -> None:
        told.append(line)
        if line.startswith("[filterllm_train] epoch 3/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(filterllm_train, "log", log)
    with pytest.raises(KeyboardInterrupt):
        execute(run, "filterllm_train", filterllm_train.run)
    monkeypatch.setattr(filterllm_train, "log", told.append)
    found = _fit(run)
    assert "[filterllm_train] goes on behind epoch 2, which was saved" in told
    assert len([line for line in told if " epoch " in line and "loss" in line]) == 3 + 3
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name


def _kill_first_worker(checkpoints: Path, epoch: int) -> None:
    """SIGKILL the worker that says so much of itself, once `epoch` is done."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for folder in checkpoints.glob("*"):
            lines = Journal(str(folder / "journal")).read(0)
            if any(line.startswith(f"epoch {epoch}/") for line in lines):
                os.kill(int(re.search(r"process id (\d+)", lines[0])[1]), signal.SIGKILL)
                return
        time.sleep(0.01)


def test_workers_train_the_model_of_one_process_although_one_is_killed(
    lake: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Without dropout and noise, whose draws are each worker's own, only the order of sums differs. The last batch is of one item:
    # the second worker has no part in it.
    conf = {
        "epochs": 40,
        "patience": 40,
        "batch_size": 41,
        "dropout": 0.0,
        "noise": 0.0,
        "softmax": "sampled",
        "samples": 20,
    }
    expected = _fit(night(lake, filterllm=conf))
    killer = threading.Thread(target=_kill_first_worker, args=(lake / "_artifacts" / "checkpoints", 2))
    killer.start()
    capfd.readouterr()
    found = _fit(night(lake, filterllm=conf, ray={"training_workers": 2, "cpus_per_actor": 0.5}))
    killer.join()
    told = capfd.readouterr().err
    assert told.count("[filterllm_train] 2 workers on cpu") == 2  # the group was started again
    assert re.search(r"goes on behind epoch \d+, which was saved", told)
    assert re.search(r"epoch 40/40: .* items/s, validation nll", told)
    assert found.keys() == expected.keys()
    models = [json.loads(one.read_text()) for one in lake.glob("_artifacts/models/*/manifest.json")]
    assert {one["facts"]["items"] % 41 for one in models} == {1}
    apart = {n: np.linalg.norm(found[n] - t) / max(np.linalg.norm(t), 1e-9) for n, t in expected.items()}
    # Workers that did not add up would be off by a fifth of what training moves.
    assert max(apart.values()) < 0.01, apart


def test_workers_that_never_fit_and_errors_of_the_task_are_clear(lake: Path) -> None:
    run = night(lake, filterllm={"epochs": 2}, ray={"training_workers": 5000})
    with pytest.raises(ClusterError, match=r"ray.training_workers \(5000\) x ray.cpus_per_actor \(1\) is more than"):
        filterllm_train.run(run, run.staging("filterllm_train"))
    with pytest.raises(ClusterError, match=r"^ray.cpus_per_actor \(5000\) is more than this machine's"):
        require_workers(run.settings.ray.model_copy(update={"cpus_per_actor": 5000.0}), 1)
    # The task's own error arrives as it was raised.
    with pytest.raises(FilterLLMError, match="training diverged"):
        train(night(lake, filterllm={"epochs": 2, "learning_rate": 1e30}))


def test_items_that_two_runs_scored_at_once_count_once(lake: Path) -> None:
    facts, before = score(night(lake, sampling={"k": 6}))
    run = night(lake, sampling={"k": 6})
    same = {"scoring_version": facts["scoring_version"]}
    run.lake.commit("item_scores", run.lake.read("item_scores", **same), app="another run, in other shards")
    assert run.lake.read("item_scores", **same).num_rows == 2 * (before.num_rows + 6 * facts["held_out"])
    facts, again = score(run)
    assert (facts["scored"], facts["reused"]) == (0, 12)
    assert again.equals(before)


def test_a_night_with_nothing_to_score_starts_no_ray(lake: Path) -> None:
    import ray

    _, before = score(night(lake))
    run = night(lake, ray={"address": "127.0.0.1:9"})
    ray.shutdown()
    facts, sampled = score(run)
    assert (facts["scored"], facts["reused"]) == (0, 12)
    assert sampled.equals(before)
    assert not ray.is_initialized()
