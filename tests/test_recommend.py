"""Recommendations as a batch job: a small night, a real language model, Ray, Delta and Great Expectations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from jobs import (
    allmrec_alignment,
    allmrec_artifacts,
    allmrec_backbone,
    allmrec_night,
    allmrec_reader,
    cf,
    item_index,
    recommend,
    recommend_users,
    recommend_weights,
)
from jobs.expectations import GateError
from jobs.lake import Lake
from jobs.published import NotPublishedError
from jobs.recommend import Request
from jobs.run import Run
from jobs.settings import Settings
from jobs.staging import Staging
from tests import nights, recommended_night, staged_night
from tests.recommended_night import COLD, DAY, PAIRS, night, rows_of
from udfs import allmrec_projections
from udfs.ids import place
from udfs.vectors import from_column

pytestmark = pytest.mark.usefixtures("one_thread")

Done = tuple[Run, dict[str, Any], Path]
ASKED = Request([*(f"u{b}-{u}" for b in range(3) for u in range(3)), "u0-0", "nobody", "loner"], candidates=7, top=5)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recommended_night.language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, language_model: Path) -> Done:
    """A night, the job on it that nothing disturbed, and the same night where the job has not run, with what it trained."""
    folder = tmp_path_factory.mktemp("lakes")
    run = night(folder / "lake", language_model)
    shutil.copytree(folder / "lake", folder / "other")
    summary = recommend.recommend(run.settings, DAY, ASKED)
    for kind in ("alignments", "readers", "reader_weights"):
        shutil.copytree(folder / "lake" / "_artifacts" / kind, folder / "other" / "_artifacts" / kind)
    return run, summary, folder / "other"


def changed(run: Run, reader: dict[str, Any], **allmrec: Any) -> Settings:
    settings = run.settings.model_dump(mode="json")
    settings["allmrec"] |= allmrec
    settings["allmrec"]["reader"] |= reader
    return Settings.model_validate(settings)


def test_users_get_unseen_items_of_their_own_kind_cold_ones_among_them(done: Done) -> None:
    run, summary, _ = done
    rows = rows_of(run.lake, summary["run_id"])
    assert summary["users"] == {
        "asked": 12,
        "served": 9,
        "rejected": {"duplicate": 1, "no_vector": 1, "unknown_user": 1},
    }
    assert summary["rows"] == len(rows) == 9 * 5
    published = {r["item_id"]: r for r in run.staging("refresh").read("item_embeddings").to_pylist()}
    users = {r["user_id"]: np.array(r["embedding"]) for r in run.staging("refresh").read("user_embeddings").to_pylist()}
    for user in sorted(set(ASKED.users) - {"nobody", "loner"}):
        own = [r for r in rows if r["user_id"] == user]
        assert [r["rank"] for r in own] == [1, 2, 3, 4, 5]
        scores = [r["score"] for r in own]
        assert scores == sorted(scores, reverse=True)
        assert not {(user, r["item_id"]) for r in own} & set(PAIRS)
        # The candidates are the nearest items by the published vectors that the user has not had.
        exact = {
            i: float(users[user] @ np.array(r["embedding"])) for i, r in published.items() if (user, i) not in PAIRS
        }
        best = sorted(exact, key=lambda i: -exact[i])[: ASKED.candidates]
        for r in own:
            assert best[r["candidate_rank"] - 1] == r["item_id"]
            assert r["retrieval_score"] == pytest.approx(exact[r["item_id"]], abs=1e-5)
            assert r["source"] == published[r["item_id"]]["source"]
    kinds = {item: {"new-0": "0", "new-1": "1"}.get(item, item[1]) for item in published}
    own = {user: [kinds[r["item_id"]] == user[1] for r in rows if r["user_id"] == user] for user in users}
    assert {r["source"] for r in rows} == {"cf", "sampled"}
    first = [marks[0] for marks in own.values() if marks]
    assert np.mean(first) > 0.7, own
    assert summary["cold_rows"] == sum(r["item_id"] in COLD for r in rows) > 0
    for name, value in (("run_id", summary["run_id"]), ("published_run_id", run.run_id), ("generated", None)):
        assert {r[name] for r in rows} == {value}
    assert {r["model_version"] for r in rows} == {summary["model_version"]}


def test_likelihood_and_retrieval_count_as_much_as_held_out_users_say(done: Done) -> None:
    run, summary, _ = done
    weights = summary["weights"]
    facts = run.artifact("reader_weights", weights["version"]).facts()
    assert (weights["likelihood"], weights["retrieval"]) == (facts["likelihood"], facts["retrieval"])
    assert facts["reader"] == summary["model_version"]
    assert 10 <= facts["users"] <= facts["of"]
    assert weights["likelihood"] > 0
    assert facts["ndcg@10"]["both"] >= max(facts["ndcg@10"]["likelihood"], facts["ndcg@10"]["retrieval"]) - 0.02
    for r in rows_of(run.lake, summary["run_id"]):
        both = weights["likelihood"] * r["likelihood"] + weights["retrieval"] * r["retrieval_score"]
        assert r["score"] == pytest.approx(both, abs=1e-4)
    # Whom the reader learnt from it is not weighed by.
    found, side, spoken = _sides(run)
    learns, held = map(
        set, allmrec_reader.learnable(found, side, spoken, run.settings.allmrec.reader, run.settings.seed)
    )
    assert not learns & held
    assert facts["of"] <= len(held)
    assert run.artifact("readers", summary["model_version"]).facts()["examples"] == len(learns)


def _sides(run: Run) -> tuple[Any, Any, Any]:
    """What the job makes of the published night."""
    found, published = allmrec_night.read(run.staging("snapshot")), run.staging("refresh")
    of = {}
    for name in ("user", "item"):
        rows = published.read(f"{name}_embeddings")
        of[f"{name}s"] = rows[f"{name}_id"].to_pylist(), from_column(rows["embedding"])
    side = allmrec_backbone.SpaceSide(found, cf.load_space(run, published.facts()["space_version"]), of)
    (alignment,) = Staging(run.lake.path("_artifacts/alignments")).children()
    return found, side, allmrec_reader.spoken(run, found, alignment, side)


@pytest.mark.parametrize(("users", "share"), [(0, 0.2), (128, 0.05)])
def test_where_nothing_is_weighed_the_likelihood_ranks(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], users: int, share: float
) -> None:
    monkeypatch.setattr(allmrec_reader, "_HELD_OUT", share)
    run = replace(done[0], settings=changed(done[0], {"weigh_users": users}))
    found, side, spoken = _sides(run)
    nearest = recommend_users.Nearest(item_index.load(run.lake, run.run_id), found)
    weights, version = recommend_weights.find(run, found, side, side, spoken, "another reader", nearest, 6)
    assert version is None
    assert ("too few to weigh retrieval by" in capsys.readouterr().err) == bool(users)
    np.testing.assert_array_equal(weights(np.float32([[-1.5, -0.25]]), np.float32([[7, np.nan]])), [[-1.5, -0.25]])


def test_who_cannot_be_served_is_rejected_with_the_reason(done: Done) -> None:
    run, summary, _ = done
    rejected = run.lake.read("rejected_rows").to_pylist()
    mine = {(r["key"], r["reason"], r["rows"]) for r in rejected if r["run_id"] == summary["run_id"]}
    assert mine == {("u0-0", "duplicate", 1), ("nobody", "unknown_user", 1), ("loner", "no_vector", 1)}


KILL = """
import os, sys
from jobs import recommend
from jobs.staging import Staging

complete, done = Staging.complete, []

def counted(self, facts):
    if "/shards/" in self.uri:
        done.append(self.uri)
        if len(done) == 2:
            os._exit(9)
    complete(self, facts)

Staging.complete = counted
sys.exit(recommend.main(sys.argv[1:]))
"""


def test_killed_amid_the_shards_and_started_again_the_table_is_the_same(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, expected, lake = done
    conf, users = tmp_path / "conf.yaml", tmp_path / "users.txt"
    settings = {**before.settings.model_dump(mode="json"), "lake": str(lake)}
    conf.write_text(yaml.safe_dump(settings))
    users.write_text("\n".join(reversed(ASKED.users)) + "\n\n")
    command = ["--conf", str(conf), "--run-date", str(DAY), "--users", str(users), "--candidates", "7", "--top", "5"]
    options: dict[str, Any] = {"cwd": nights.REPOSITORY, "capture_output": True, "text": True, "timeout": 300}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILL, *command], **options)
    assert killed.returncode == 9, killed.stderr[-3000:]
    tables = Lake(str(lake))
    assert not tables.exists("recommendations")
    assert recommend.main(command) == 0
    said = capsys.readouterr()
    assert "1 of 3 shards are complete already" in said.err
    assert "training" not in killed.stderr + said.err  # the alignment and the reader were there
    summary = json.loads(said.out.splitlines()[-1])
    same = ("run_id", "users", "rows", "model_version", "output_versions")
    assert {name: summary[name] for name in same} == {name: expected[name] for name in same}
    found, first = rows_of(tables, summary["run_id"]), rows_of(before.lake, summary["run_id"])
    assert len(found) == len(first)
    for one, two in zip(found, first, strict=True):
        # What the language model says may be rounded otherwise.
        said = ("score", "likelihood")
        assert {k: v for k, v in one.items() if k not in said} == {k: v for k, v in two.items() if k not in said}
        assert [one[k] for k in said] == pytest.approx([two[k] for k in said], abs=1e-5)
    assert not Staging(f"{lake}/_staging/{summary['run_id']}/shards").children()
    version = tables.version("recommendations")
    assert recommend.main(command) == 0
    assert "finished: nothing is recomputed" in capsys.readouterr().err
    assert tables.version("recommendations") == version


def _with_history(table: pa.Table) -> pa.Table:
    user = table["user_id"][0].as_py()
    had = next(item for owner, item in PAIRS if owner == user)
    return table.set_column(2, table.schema.field(2), pa.array([had, *table["item_id"].to_pylist()[1:]]))


def _with_hole(table: pa.Table) -> pa.Table:
    return table.filter(pc.not_equal(table["rank"], 2))


def _without_score(table: pa.Table) -> pa.Table:
    at = table.schema.get_field_index("score")
    return table.set_column(at, table.schema.field(at), pa.array([float("nan")] * table.num_rows))


def _twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(0, 1)])


OTHERS = Request(["u1-1", "u2-0", "nobody"], 7, 5, generate=True)


def test_a_gate_that_fails_writes_nothing_and_mended_the_run_goes_on(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, summary, _ = done
    before = {name: run.lake.version(name) for name in ("recommendations", "rejected_rows", "runs")}
    score = recommend.recommend_shards.score
    for broken, rule in (
        (_with_history, "nobody is recommended what is in the history"),
        (_with_hole, "ranks have no holes"),
        (_without_score, "scores and likelihoods are finite"),
        (_twice, "a user has an item once"),
        (lambda table: table.slice(5), "every user who can be served is"),
    ):
        monkeypatch.setattr(recommend.recommend_shards, "score", lambda *given, broken=broken: broken(score(*given)))
        with pytest.raises(GateError, match=rule) as failed:
            recommend.recommend(run.settings, DAY, OTHERS)
        assert "Nothing was written to 'recommendations'" in str(failed.value)
        assert {name: run.lake.version(name) for name in before} == before
    monkeypatch.undo()
    other = recommend.recommend(run.settings, DAY, OTHERS)
    assert other["run_id"] != summary["run_id"]
    assert other["model_version"] == summary["model_version"]  # nothing is trained again
    mine, first = rows_of(run.lake, other["run_id"]), rows_of(run.lake, summary["run_id"])
    assert [r["user_id"] for r in mine] == ["u1-1"] * 5 + ["u2-0"] * 5
    assert all(isinstance(r["generated"], str) for r in mine)
    # The same user gets the same, whoever else is asked for.
    of = {r["rank"]: r for r in first if r["user_id"] == "u1-1"}
    for r in mine[:5]:
        assert r["item_id"] == of[r["rank"]]["item_id"]
        assert r["score"] == pytest.approx(of[r["rank"]]["score"], abs=1e-4)


def test_nobody_to_serve_is_no_failure_and_trains_nothing(done: Done) -> None:
    run, _, _ = done
    readers = Staging(run.lake.path("_artifacts/readers")).children()
    summary = recommend.recommend(changed(run, {"epochs": 2}), DAY, Request(["nobody", "loner"], 6, 5))
    assert (summary["rows"], summary["users"]["served"], summary["model_version"]) == (0, 0, None)
    assert Staging(run.lake.path("_artifacts/readers")).children() == readers


def test_without_the_candidates_in_the_prompt_titles_count_by_what_the_user_adds(done: Done) -> None:
    run, _, _ = done
    settings = changed(run, {"candidates": False, "epochs": 1, "weigh_users": 0})
    summary = recommend.recommend(settings, DAY, Request(["u1-1", "u2-0"], 7, 5))
    found, side, spoken = _sides(run)
    conf = settings.allmrec.reader
    files = allmrec_artifacts.files(run, "readers", summary["model_version"])
    reader = allmrec_reader.language_model(conf).reader(allmrec_projections.load(files), "cpu")
    catalogue = reader.catalogue(found.titles, spoken.joint, allmrec_reader.prompt_options(conf))
    for user, rows in groupby(rows_of(run.lake, summary["run_id"]), key=itemgetter("user_id")):
        own = list(rows)
        number = place(pa.array([user]), found.user_ids)
        history = spoken.histories(found.histories).take(number)
        items = place(pa.array([r["item_id"] for r in own]), found.item_ids)
        expected = reader.score(catalogue, side.users(number), history, items[None])[0]
        np.testing.assert_allclose([r["likelihood"] for r in own], expected, atol=1e-3)
        assert [r["score"] for r in own] == [r["likelihood"] for r in own]


@pytest.mark.parametrize(
    ("kind", "trainer"),
    [("backbones", allmrec_backbone.sequence_training), ("readers", allmrec_reader.allmrec_reader_training)],
)
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    done: Done, monkeypatch: pytest.MonkeyPatch, kind: str, trainer: Any
) -> None:
    model = {"epochs": 4, "dimension": 8}
    run = replace(done[0], settings=changed(done[0], {"epochs": 4}, backbone="sasrec", model=model))
    found = allmrec_night.read(run.staging("snapshot"))

    def part() -> str:
        side = allmrec_backbone.trained(run, found)
        if kind == "backbones":
            return side.version
        alignment = allmrec_alignment.find(run, found, "encoder", side)
        return allmrec_reader.find(run, found, alignment, side, allmrec_reader.spoken(run, found, alignment, side))

    version = part()
    artifact, checkpoints = run.artifact(kind, version), run.artifact("checkpoints", version)
    files = allmrec_artifacts.files(run, kind, version)
    assert not checkpoints.children()
    artifact.clear()
    train, epochs = trainer.train, []

    def killed(*given: Any, **options: Any) -> Any:
        def log(line: str) -> None:
            epochs.append(line)
            if line.startswith("epoch 3/"):
                raise KeyboardInterrupt

        return train(*(log if isinstance(value, FunctionType) else value for value in given), **options)

    monkeypatch.setattr(trainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        part()
    assert not artifact.is_complete()
    assert len(epochs) == 3
    monkeypatch.undo()
    assert part() == version
    assert allmrec_artifacts.files(run, kind, version) == files
    assert not checkpoints.children()


@pytest.mark.parametrize("kind", ["sasrec", "ncf"])
def test_a_backbone_of_its_own_is_kept_and_read_by_the_ids_of_another_night(done: Done, kind: str) -> None:
    model = {"epochs": 3, "dimension": 8, "max_length": 6}
    run = replace(done[0], settings=changed(done[0], {"epochs": 1}, backbone=kind, model=model))
    found = allmrec_night.read(run.staging("snapshot"))
    side = allmrec_backbone.trained(run, found)
    artifact = run.artifact("backbones", side.version)
    assert (artifact.facts()["kind"], artifact.facts()["items"], artifact.facts()["order"]) == (kind, 21, "seq")
    alignment = allmrec_alignment.find(run, found, "encoder", side)
    spoken = allmrec_reader.spoken(run, found, alignment, side)
    assert found.item_ids.filter(pa.array(spoken.by_text)).to_pylist() == list(COLD)
    assert spoken.known.all()
    reader = allmrec_reader.find(run, found, alignment, side, spoken)
    learns, held = allmrec_reader.learnable(found, side, spoken, run.settings.allmrec.reader, run.settings.seed)
    assert run.artifact("readers", reader).facts()["examples"] == len(learns)
    assert len(learns) + len(held) == 72
    # Another night: users and items in other places, one of each that the backbone does not know.
    later = replace(run, run_date=date(2026, 3, 4), run_id=f"20260304-{7:012x}")
    pairs = {("a-stranger", "a-novelty"): 1.0, **{pair: w for pair, w in PAIRS.items() if pair[0] != "u0-0"}}
    staged_night.snapshot(later, pairs, COLD)
    another = allmrec_night.read(later.staging("snapshot"))
    same = allmrec_backbone.trained(later, another)
    assert same.version == side.version
    at = place(another.item_ids, found.item_ids)
    np.testing.assert_array_equal(same.items[at >= 0], side.items[at[at >= 0]])
    assert another.item_ids.filter(pa.array(~same.known)).to_pylist() == ["a-novelty"]
    assert another.user_ids.filter(pa.array(~same.users_known)).to_pylist() == ["a-stranger"]
    rows = np.flatnonzero(same.users_known)
    if kind == "ncf":
        of = place(another.user_ids, found.user_ids)[rows]
        np.testing.assert_array_equal(same.users(rows), side.users(of))
    assert same.users(rows).shape == (len(rows), 8)
    long_after = replace(later, run_date=date(2026, 3, 9))
    assert allmrec_backbone.trained(long_after, another).version != side.version


def test_what_cannot_be_used_is_named(done: Done, tmp_path: Path) -> None:
    run, _, _ = done
    with pytest.raises(
        NotPublishedError, match="nothing is published of 2026-03-09; the newest before it is of 2026-03-01"
    ):
        recommend.recommend(run.settings, date(2026, 3, 9), ASKED)
    for body, said in ((None, "no such file"), (b"\n \n", "names nobody"), (b"\xff\xfe", "not UTF-8")):
        if body is not None:
            (tmp_path / "users.txt").write_bytes(body)
        with pytest.raises(recommend.RecommendError, match=said):
            recommend.read_users(str(tmp_path / "users.txt"))
