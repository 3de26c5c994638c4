"""Settings: what is refused, what overrides do, and which changes make another run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.run import parse_new_run_date, parse_run_date
from jobs.settings import Settings, SettingsError, load

CONF = Path(__file__).parents[1] / "conf"


def test_settings_are_read_without_torch() -> None:
    """Every command reads them, and most need no more: torch takes seconds."""
    command = "import sys, jobs.settings, jobs.published; assert not {'torch', 'pyspark', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_of_conf_loads_and_begins_with_its_command(path: Path) -> None:
    load(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# spark-submit jobs/cold_refresh.py")
    assert f"conf/{path.name}" in first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cf.modle=als", "cf.modle"),
        ("cf.model=svd", "'als'"),
        ("text.max_tokens=many", "text.max_tokens"),
        ("sampling.k=0", "sampling.k"),
        ("sampling.q=3", "unknown key; there are k, draw"),
        ("text.also=smollm2", "expected a list"),
        ("text=words", "expected a section"),
        ("allmrec.alignment={match: none, alpha: 0, beta: 0, recommendation: 0}", "no loss is left"),
        ("text.also=[minilm]", "name a model twice"),
        ("refresh.scale=foo", "refresh.scale: "),
        ("refresh.users=1000", "refresh.users"),
        ("evaluate.protocol=random_item", "snapshot.split"),
        ("cf.negatives=user", "draws no negatives"),
        ("cf.llminit.select=variance", "cf.init is random: set cf.init llminit"),
        ("ray={training_workers: 2, gpus_per_actor: 0.5}", "need a whole GPU each"),
        ("evaluate.k=[]", "evaluate.k"),
        ("evaluate.k=[20, 0]", "evaluate.k.1"),
        ("gates.norm_low=20", "must be below norm_high"),
        ("text.prompt=the same for all", "names no field"),
        ("text.prompt=of {brand}", "names {brand}"),
        ("text.prompt=of {title:.50}", "has a format"),
        ("text.prompt=of {title", "expected '}'"),
        ("text.prompt={title", "is not YAML"),
        ("text.prompt={title}", "quote it"),
        ("seed", "expected key=value"),
        ("lake.folder=x", "lake is not a section"),
    ],
)
def test_settings_that_cannot_be_used_are_named(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(CONF / "demo.yaml", [override])


def test_values_that_are_not_wrong_are_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"--set spark.conf, --set seed: .*\n +seed") as told:
        load(CONF / "demo.yaml", ["spark.conf={spark.hadoop.fs.s3a.secret.key: hunter2}", "seed=-1"])
    assert "hunter2" not in str(told.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file"):
        load(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("lake: [")
    with pytest.raises(SettingsError, match="no readable YAML"):
        load(broken)
    with pytest.raises(SettingsError, match="no readable YAML"):
        load(tmp_path)
    broken.write_text("- a list")
    with pytest.raises(SettingsError, match="no mapping"):
        load(broken)


def test_overrides_are_applied_and_settings_are_frozen() -> None:
    settings = load(CONF / "demo.yaml", ["sampling.k=7", "snapshot.window_days=30"])
    assert (settings.sampling.k, settings.snapshot.window_days) == (7, 30)
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 8


def test_only_what_decides_results_makes_another_run() -> None:
    base = Settings(lake="here")
    assert base.digest() == Settings.model_validate({"lake": "there", "ray": {"actors": 9}}).digest()
    assert base.digest() != Settings.model_validate({"lake": "here", "cf": {"dimension": 32}}).digest()
    # Into what pieces work is cut makes no other model, and what only checks an input makes no other night.
    pieces = {
        "text": {"shard_texts": 9, "batch_tokens": 99, "sha256": "0" * 64},
        "cf": {"device": "cpu", "retrain_days": 3},
        "filterllm": {"vocabulary_chunk": 9, "retrain_days": 3},
        "sampling": {"shard_items": 9, "user_tile": 9},
        "gates": {"kept_share": 0.1, "stale_days": 9},
    }
    cut = Settings.model_validate({"lake": "here", **pieces})
    assert base.digest() == cut.digest()
    assert base.digest("text", "filterllm") == cut.digest("text", "filterllm")
    # But dropout falls by batches of tokens where a language model is trained along.
    for lora in ({"filterllm": {"lora": True}}, {"allmrec": {"alignment": {"lora": True}}}):
        small, large = (Settings(lake="here", text={"batch_tokens": n}, **lora).digest("text") for n in (99, 8192))
        assert small != large
    assert base.digest() != Settings(lake="here", seed=8).digest()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"refresh": {"cold": "allmrec", "method": "retrain"}}, "set refresh.method fold_in"),
        (
            {"refresh": {"cold": "llminit", "method": "retrain"}, "cf": {"init": "llminit", "model": "bpr"}},
            "set refresh.method fold_in",
        ),
        (
            {"refresh": {"cold": "allmrec"}, "allmrec": {"alignment": {"match": "none"}}},
            "alignment.match mse or infonce",
        ),
        (
            {"refresh": {"cold": "allmrec"}, "allmrec": {"alignment": {"alpha": 0, "recommendation": 0}}},
            "nothing trains it: set allmrec.alignment.alpha",
        ),
        ({"allmrec": {"backbone": "svd"}}, "'sasrec'"),
        ({"filterllm": {"lora": True}, "text": {"also": ["words"]}}, "leave text.also empty"),
        ({"filterllm": {"lora": True}, "text": {"model": "words"}}, "text.model words is none"),
        ({"allmrec": {"alignment": {"lora": True}}, "text": {"also": ["words"]}}, "alignment.lora trains one language"),
        ({"allmrec": {"reader": {"llm": "smollm2"}}}, "reader.llm"),
    ],
)
def test_choices_that_do_not_go_together_are_named(sections: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.model_validate({"lake": "here", **sections})


def test_allmrec_makes_another_night_only_where_a_night_reads_it() -> None:
    reader, alignment = {"allmrec": {"reader": {"epochs": 1}}}, {"allmrec": {"alignment": {"epochs": 1}}}
    base, placed = {"lake": "here"}, {"lake": "here", "refresh": {"cold": "allmrec"}}
    digests = [
        Settings.model_validate({**one, **two}).digest() for one in (base, placed) for two in ({}, reader, alignment)
    ]
    assert digests[0] == digests[1] == digests[2] != digests[3] == digests[4] != digests[5]


@pytest.mark.parametrize("text", ["2026-02-30", "20260201", "yesterday", ""])
def test_a_run_date_that_is_none(text: str) -> None:
    with pytest.raises(SettingsError, match="is no date"):
        parse_run_date(text)


def test_a_run_date_that_is_still_to_come() -> None:
    assert parse_run_date("9999-01-01").year == 9999
    with pytest.raises(SettingsError, match="--to 9999-01-01 is still to come"):
        parse_new_run_date("9999-01-01", "--to")
