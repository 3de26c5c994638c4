"""A lake on an object store, where one is given: COLD_REFRESH_TEST_STORE=s3://bucket/folder, with what S3 clients read
from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; AWS_ENDPOINT_URL and AWS_ALLOW_HTTP for another store
than Amazon's). Spark fetches Hadoop's client for S3 from Maven. Without a store the test is skipped."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from deltalake import write_deltalake

from tests import nights
from tests import small_lake as small

# Of the Hadoop that Spark brings.
CLIENT = "org.apache.hadoop:hadoop-aws:3.5.0"


@pytest.fixture
def store() -> str:
    if "COLD_REFRESH_TEST_STORE" not in os.environ:
        pytest.skip("no object store is named (COLD_REFRESH_TEST_STORE)")
    return os.environ["COLD_REFRESH_TEST_STORE"].rstrip("/")


@pytest.mark.timeout(1800)
def test_a_night_killed_on_an_object_store_leaves_the_tables_of_one_on_a_disk(
    store: str, tmp_path: Path, undisturbed: tuple[small.SmallLake, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = f"{store}/{uuid.uuid4().hex}"
    settings = yaml.safe_load(small.build(tmp_path).conf.read_text())
    for name, rows in zip(("interactions", "items"), small.tables(), strict=True):
        write_deltalake(f"{lake}/{name}", rows)
    conf = tmp_path / "store.yaml"
    conf.write_text(yaml.safe_dump({**settings, "lake": lake}))
    defaults = {"spark.jars.packages": CLIENT}
    if "AWS_ENDPOINT_URL" in os.environ:
        s3a = {"endpoint": os.environ["AWS_ENDPOINT_URL"], "path.style.access": "true"}
        defaults |= {f"spark.hadoop.fs.s3a.{name}": value for name, value in s3a.items()}
    (tmp_path / "spark-defaults.conf").write_text("".join(f"{name} {value}\n" for name, value in defaults.items()))
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    for stage in ("text_embeddings", "filterllm_train", "publish"):
        nights.kill_at(conf, small.RUN_DATE, stage, delay=0.5)
    assert nights.night(conf, small.RUN_DATE)["run_id"] == undisturbed[1]["run_id"]
    nights.assert_same_tables(lake, undisturbed[0].lake, small.RUN_DATE)
