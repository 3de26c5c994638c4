"""A-LLMRec's first stage with its sentence encoder trained along: the night's alignment with adapters of its own."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import (
    allmrec_alignment,
    allmrec_artifacts,
    allmrec_backbone,
    allmrec_night,
    allmrec_reader,
    cf,
    prune,
    text_embeddings,
)
from jobs.adapted_texts import FILES
from jobs.run import Run, execute
from tests import staged_night
from tests.test_refresh import BPR
from udfs.ids import place

pytestmark = pytest.mark.usefixtures("one_thread")

DAY = date(2026, 3, 1)
COLD = ["new-0", "new-1"]
LORA = {"lora": True, "lora_rank": 2, "lora_learning_rate": 1e-2}


def night(lake: Path, language_model: Path, number: int = 1, **alignment: Any) -> Run:
    """A night up to the stages text_embeddings and cf; the text of an item is its id."""
    aligned = {"epochs": 4, "joint": 8, "learning_rate": 1e-2, "batch_size": 16, "stop_by": "loss", **alignment}
    text = {"model": str(language_model), "max_tokens": 8}
    run = staged_night.run_of(lake, DAY, number, cf=BPR, text=text, allmrec={"alignment": aligned})
    pairs = staged_night.blocks()
    staged_night.snapshot(run, pairs, tuple(COLD), {name: [1.0] for name in sorted({i for _, i in pairs} | set(COLD))})
    run.staging("text_embeddings").clear()
    execute(run, "text_embeddings", text_embeddings.run)
    execute(run, "cf", cf.run)
    return run


def aligned(run: Run) -> tuple[str, np.ndarray]:
    """The night's alignment, and the vectors that it gives the cold items."""
    version = allmrec_alignment.for_space(run, cf.load_space(run, run.staging("cf").facts()["space_version"]))
    return version, allmrec_alignment.vectors(run, version, [f"sha-{name}" for name in COLD])


def rows(run: Run, encoder_version: str) -> list[str]:
    return sorted(run.lake.read("text_embeddings", model_version=encoder_version)["text_sha256"].to_pylist())


def test_an_encoder_that_is_trained_along_gives_cold_items_other_vectors(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, of_frozen = aligned(night(tmp_path, small_model))
    run = night(tmp_path, small_model, 2, **LORA)
    assert (
        run.artifact("alignments", frozen).facts()["encoder_version"]
        == run.staging("text_embeddings").facts()["model_version"]
    )
    version, vectors = aligned(run)
    artifact = run.artifact("alignments", version)
    own = artifact.facts()["encoder_version"]
    assert own == f"lora-{version}"
    assert np.isfinite(vectors).all()
    assert np.abs(vectors - of_frozen).max() > 1e-3
    assert rows(run, own) == [f"sha-{name}" for name in COLD]

    # What is there is neither trained nor encoded again.
    other = night(tmp_path, small_model, 3, **LORA)
    before = run.lake.version("text_embeddings")
    again, same = aligned(other)
    assert (again, run.lake.version("text_embeddings")) == (version, before)
    np.testing.assert_array_equal(same, vectors)
    # Warm items that CF does not know are read through the adapters, too.
    found = allmrec_night.read(run.staging("snapshot"))
    side = allmrec_backbone.SpaceSide(found, cf.load_space(run, artifact.facts()["cf_version"]))
    side.known = side.known & (found.item_ids.to_numpy(zero_copy_only=False) != "i0-0")
    spoken = allmrec_reader.spoken(run, found, version, side)
    assert rows(run, own) == sorted(f"sha-{name}" for name in [*COLD, "i0-0"])
    model = allmrec_alignment.load(run, version)
    cold = place(pa.array(COLD), found.item_ids)
    q = text_embeddings.load(run, [f"sha-{name}" for name in COLD], own)
    np.testing.assert_array_equal(
        spoken.joint[cold], model.joint(np.zeros((2, 3), np.float32), q, np.ones(2, np.bool_))
    )

    # Killed while it trained: another run of it goes on, and ends with the same bytes.
    names = [*allmrec_artifacts.FILES, *FILES]
    files = {name: artifact.read_bytes(name) for name in names}
    artifact.clear()

    def killed(line: str) -> None:
        if "epoch 3/" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(allmrec_artifacts, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        aligned(run)
    lines: list[str] = []
    monkeypatch.setattr(allmrec_artifacts, "log", lines.append)
    assert not artifact.is_complete()
    assert aligned(run)[0] == version
    assert any("goes on behind epoch 2, which was saved" in line for line in lines)
    assert {name: artifact.read_bytes(name) for name in names} == files


def test_cached_texts_of_an_alignment_stay_as_long_as_it_does(tmp_path: Path, small_model: Path) -> None:
    run = night(tmp_path, small_model, epochs=1, **LORA)
    version, _ = aligned(run)
    run.record("publish", {"alignment_version": version}, 0.0, {})
    run.record("report", {}, 0.0, {})
    run.staging("").clear()
    later = datetime.now(UTC) + timedelta(days=365)
    assert "text_embeddings" in prune.prune(run.lake, 1, later)["removed"]  # of the made-up encoder
    assert rows(run, f"lora-{version}") == [f"sha-{name}" for name in COLD]
    following = night(tmp_path, small_model, 2)
    following = Run(following.settings, DAY + timedelta(days=40), "20260410-000000000002", 2, {}, "conf")
    following.record("publish", {}, 0.0, {})
    following.record("report", {}, 0.0, {})
    prune.prune(run.lake, 1, later)
    assert rows(run, f"lora-{version}") == []
