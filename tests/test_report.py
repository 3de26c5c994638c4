"""jobs/report.py: the page of a staged and published run; what comes from tables is escaped, nothing is fetched."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
import yaml
from deltalake import write_deltalake

from jobs import plots, report
from jobs.run import execute, open_run
from jobs.settings import load
from schemas.table import table as schema
from tests.small_lake import RUN_DATE
from udfs.vectors import to_column

EVIL = "<script>alert('gift')</script> & <b>tea</b>"
ITEMS = {f"warm-{i}": f"Warm thing {i}" for i in range(8)} | {f"cold-{i}": f"New thing {i}" for i in range(5)}
ITEMS["cold-2"] = EVIL
ITEMS["warm-3"] = "<img src=x onerror=alert(2)>"
USERS = [f"user-{i}" for i in range(6)]


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def snapshot_stage(rejected):
    def stage(run, out):
        ids = sorted(ITEMS)
        labels = ["cold" if item.startswith("cold") else "warm" for item in ids]
        titles = [ITEMS[item] for item in ids]
        content = [f"{title}\nA longer text about it. " + "word " * 200 for title in titles]
        facts = {"item_id": ids, "label": labels, "title": titles, "content": content}
        out.write("items_labelled", pa.table(facts))
        rows = [
            {
                "user_id": user,
                "item_id": f"warm-{(u + k) % 8}",
                # In microseconds: the oldest is of long before the year 1, which a table may hold and Python may not.
                "last_time": int((run.midnight - timedelta(days=k + 1)).timestamp() * 1e6) if k < 6 else -(10**17),
                "last_seq": None,
                "weight": 1.0,
            }
            for u, user in enumerate(USERS)
            for k in range(7)
        ]
        types = {"last_time": pa.timestamp("us", tz="UTC"), "last_seq": pa.int64()}
        pairs = pa.Table.from_pylist(rows)
        for name, kind in types.items():
            pairs = pairs.set_column(pairs.schema.get_field_index(name), name, pairs[name].cast(kind))
        out.write("training_interactions", pairs)
        counts = {"users": 6, "items": 13, "warm": 8, "cold": 5, "pairs": 42}
        used = {"interactions": 42, "items": 13}
        bad = {name: sum(r["rows"] for r in rejected if r["table"] == name) for name in used}
        total = {name: used[name] + bad[name] for name in used}
        docs = {"data_docs": out.path("data_docs/index.html")}
        return {**counts, **docs, "rows_in": total, "rows_used": used, "rows_rejected": bad}

    return stage


def publish_stage(cold, rejected):
    def stage(run, out):
        same = {"refresh_date": run.run_date, "run_id": run.run_id, "model_version": "m", "space_version": "s"}
        rows = [
            {
                **same,
                "item_id": item,
                "user_id": user,
                "rank": k + 1,
                "probability": 0.3 / (k + 1),
                "propensity": "top_k",
            }
            for item in cold
            for k, user in enumerate(USERS[:5])
        ]
        vectors = to_column(np.ones((len(USERS), 4)))
        users = pa.table(
            {**{k: pa.array([v] * len(USERS)) for k, v in same.items()}, "user_id": USERS, "embedding": vectors}
        )
        sampled = pa.Table.from_pylist(rows, schema("sampled_interactions").arrow_schema)
        lineage = {"refresh_date": run.run_date, "run_id": run.run_id, "detail": None}
        left_out = pa.Table.from_pylist([{**lineage, **row} for row in rejected], schema("rejected_rows").arrow_schema)
        versions = {
            "rejected_rows": run.lake.commit("rejected_rows", left_out, app="t/r"),
            "sampled_interactions": run.lake.commit("sampled_interactions", sampled, app="t/s"),
            "user_embeddings": run.lake.commit("user_embeddings", users, app="t/u"),
            "item_embeddings": 0,
        }
        counted = {"sampled_interactions": len(rows), "user_embeddings": 6, "item_embeddings": 13}
        return {"output_versions": versions, "rows": counted, "space_version": "s", "model_version": "m"}

    return stage


def evaluate_stage(measured):
    def stage(run, out):
        values = {"published": 0.31, "distribution": 0.29, "text_knn": 0.2, "text_profile": 0.15}
        values |= {"popularity": 0.05, "random": 0.01}
        rows = [
            {
                "refresh_date": run.run_date, "run_id": run.run_id, "split": split, "system": system, "metric": metric,
                "value": value, "n": 1234, "low": value - 0.01, "high": value + 0.01,
            }
            for split in ("overall", "cold", "warm")
            for system, value in values.items()
            for metric in ("ndcg@20", "recall@20", "hit@20")
            if system != "distribution" or split == "cold"
        ]  # fmt: skip
        curve = [
            ("calibration_error", 0.4567, 77),
            ("p@9", 2e-6, 5000),
            ("q@9", 0.0, 5000),
            ("p@20", 0.01, 50),
            ("q@20", 0.02, 50),
        ]
        rows += [
            {**rows[0], "split": "reliability", "system": "distribution", "metric": name, "value": value, "n": n}
            for name, value, n in curve
        ]
        truth = {"protocol": "temporal", "from": "2026-03-01", "until": "2026-04-30"}
        if not measured:
            return {"metrics": 0, "truth": {"protocol": "none"}, "note": "evaluate.protocol is none: <nothing>"}
        table = pa.Table.from_pylist(rows, schema("metrics").arrow_schema)
        version = run.lake.commit("metrics", table, app="t/m")
        return {"metrics": len(rows), "truth": truth, "output_versions": {"metrics": version}}

    return stage


REJECTED = [
    {"table": "interactions", "key": "user-1 <i>x</i>", "reason": "bad_weight", "rows": 1},
    {"table": "interactions", "key": "user-2 y", "reason": "bad_weight", "rows": 1},
    {"table": "interactions", "key": None, "reason": "after_run_date", "rows": 4321},
    {"table": "items", "key": "z", "reason": "no_text", "rows": 1},
    {"table": "user_embeddings", "key": "stranger", "reason": "no_vector", "rows": 1},
]


def night(folder, rejected=REJECTED, cold=tuple(f"cold-{i}" for i in range(5)), measured=True):
    """A run whose stages before `report` are complete."""
    lake = folder / "lake"
    write_deltalake(str(lake / "interactions"), pa.table({"user_id": ["a"]}))
    write_deltalake(str(lake / "items"), pa.table({"item_id": ["a"]}))
    conf = folder / "conf.yaml"
    conf.write_text(yaml.safe_dump({"lake": str(lake)}))
    run = open_run(load(conf), RUN_DATE)
    execute(run, "snapshot", snapshot_stage(rejected))
    execute(run, "cf", lambda run, out: {"space_version": "space-1a2b", "trained": True})
    execute(run, "filterllm_train", lambda run, out: {"model_version": "model-3c4d", "trained": False})
    placed = {"sources": {"sampled": len(cold)} if cold else {}, "scale": 1.53, "words": 0.218}
    execute(run, "refresh", lambda run, out: placed)
    execute(run, "gates", lambda run, out: {"data_docs": out.path("data_docs/index.html")})
    execute(run, "publish", publish_stage(cold, rejected))
    execute(run, "evaluate", evaluate_stage(measured))
    return run, conf


def test_the_page_shows_the_run(tmp_path):
    run, _ = night(tmp_path)
    facts = execute(run, "report", report.run)
    written = (tmp_path / "lake" / "report.html").read_text()
    assert facts["path"] == str(tmp_path / "lake" / "report.html")
    assert written == run.staging("report").read_bytes("report.html").decode()
    page = Page(written)
    for expected in (
        run.run_id, "0.3100 0.3000–0.3200", "text_knn 0.2000 0.1900–0.2100", "text_profile 0.1500 0.1400–0.1600",
        "bad_weight", "not a finite number above 0",
        "4,321", "interactions at version 0, items at version 0", f"hash {run.conf_hash}",
        "space-1a2b (trained in this run)", "of words 22%; 1.5 times",
        "model-3c4d (kept from an earlier run)", "1,234 users",
        "5,050 pairs of 77 cold items", "Calibration error 0.457",
    ):  # fmt: skip
        assert expected in page.text, expected
    for stage in ("snapshot", "gates"):
        assert f"Data Docs, {stage}" in page.text
        assert ("href", f"_staging/{run.run_id}/{stage}/data_docs/index.html") in page.attributes
    assert page.tags.count("svg") == 4
    # A user's newest item first, and no more than five of them.
    assert (
        "user-0 0.3 Warm thing 0 · Warm thing 1 · Warm thing 2 · <img src=x onerror=alert(2)> · Warm thing 4"
        in page.text
    )
    # The best of each metric is marked: one a split and metric.
    assert written.count('class="best"') == 9


def test_titles_are_text_and_nothing_is_fetched(tmp_path):
    run, _ = night(tmp_path)
    written = report.render(run)
    page = Page(written)
    assert EVIL in page.text
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert page.tags.count("i") == 2  # the page's own
    assert "user-1 <i>x</i>" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    addresses = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith(("#", "_staging/")) for value in addresses)
    assert not re.search(r"url\((?!#)|@import", written)


def test_the_page_is_the_same_bytes_again(tmp_path, capsys):
    run, conf = night(tmp_path)
    first = report.render(run)
    assert report.render(run) == first
    assert report.main(["--conf", str(conf), "--run-date", str(RUN_DATE)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["run_id"] == run.run_id
    assert (tmp_path / "lake" / "report.html").read_text() == first


def test_an_older_date_leaves_the_newest_page(tmp_path, capsys):
    run, conf = night(tmp_path)
    first = report.run(run, run.staging("report"))
    later = replace(
        run, run_date=RUN_DATE + timedelta(days=1), run_id=f"{RUN_DATE + timedelta(days=1):%Y%m%d}-{1:012x}"
    )
    later.record("publish", {}, 0.0, {})
    assert report.main(["--conf", str(conf), "--run-date", str(RUN_DATE)]) == 0
    old = tmp_path / "lake" / f"report-{RUN_DATE}.html"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["path"] == str(old) != first["path"]
    assert old.read_text() == (tmp_path / "lake" / "report.html").read_text()


def test_the_page_shows_how_the_dates_before_were_measured(tmp_path):
    run, _ = night(tmp_path, measured=False)
    # Of each date the newest run counts; what was measured of a later date does not.
    for days, number, cold in ((-2, 1, 0.11), (-1, 1, 0.99), (-1, 2, 0.22), (1, 1, 0.88)):
        day = run.run_date + timedelta(days=days)
        other = replace(run, run_date=day, sequence=number, run_id=f"{day:%Y%m%d}-{number:012x}")
        other.record("publish", {}, 0.0, {})
        same = {"refresh_date": day, "run_id": other.run_id, "split": "cold", "n": 6, "low": None, "high": None}
        values = {("published", "ndcg@20"): cold, ("random", "ndcg@20"): 0.01, ("text_knn", "ndcg@20"): 0.07}
        values[("published", "recall@20")] = 0.77
        rows = [{**same, "system": name, "metric": metric, "value": v} for (name, metric), v in values.items()]
        table = pa.Table.from_pylist(rows, schema("metrics").arrow_schema)
        run.lake.commit("metrics", table, app=f"t/{other.run_id}")
    text = Page(report.render(run)).text
    first, second = (
        f"{RUN_DATE + timedelta(days=d)} {v} ndcg@20; text_knn 0.0700" for d, v in ((-1, 0.22), (-2, 0.11))
    )
    shown = text.partition("Dates before this one")[2]
    assert shown.index(first.replace("0.22", "0.2200")) < shown.index(second.replace("0.11", "0.1100"))
    assert not {"0.99", "0.88", "0.77"} & {number[:4] for number in shown.split()}


def test_a_night_without_cold_items_metrics_or_rejected_rows(tmp_path):
    run, _ = night(tmp_path, rejected=[], cold=(), measured=False)
    page = Page(report.render(run))
    assert "No cold item was scored on this date." in page.text
    assert "Nothing was measured. evaluate.protocol is none: <nothing>" in page.text
    assert "Rejected rows by reason None." in page.text
    assert "svg" not in page.tags
    assert "Calibration" not in page.text
    assert "Examples" not in page.text


@pytest.mark.parametrize("probabilities", [[0.5], [0.25] * 10, [1e-12, 1.0]])
def test_plots_stand_degenerate_probabilities(probabilities):
    values = np.array(probabilities)
    for svg in (
        plots.probability_histogram(values),
        plots.probability_by_rank(np.arange(1, len(values) + 1), values),
    ):
        assert svg.startswith("<svg")
        assert "nan" not in svg.lower().replace("dominant", "")
    assert np.histogram(values, plots.bins(values))[0].sum() == len(values)


@pytest.mark.parametrize(
    ("predicted", "observed"),
    [([0.1], [0.1]), ([1e-9, 1e-3], [0.0, 0.0]), ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]), ([], [])],
)
def test_the_curve_stands_degenerate_bins(predicted, observed):
    svg = plots.reliability(np.array(predicted), np.array(observed))
    assert svg.startswith("<svg")
    assert "nan" not in svg.lower().replace("dominant", "")


def test_no_probability_falls_out_of_the_histogram():
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = 10 ** rng.uniform(-9, 0, 7)
        assert np.histogram(values, plots.bins(values))[0].sum() == 7


def test_a_date_that_was_measured_late_needs_nothing_staged_but_its_snapshot(tmp_path):
    run, _ = night(tmp_path)
    whole = report.render(run)
    assert "stranger" in whole
    for stage in ("cf", "filterllm_train", "refresh", "gates", "publish", "evaluate"):
        run.staging(stage).clear()
    assert Page(report.render(run)).text == Page(whole).text
