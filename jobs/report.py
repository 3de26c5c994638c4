"""Stage `report`: one page in HTML about a run, for a person; it needs nothing beside itself.

    python -m jobs.report --conf conf/demo.yaml --run-date 2017-11-01

The command writes the page of a published date again, for instance after `python -m jobs.evaluate`.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import cli, plots
from jobs.evaluate import RELIABILITY, SYSTEMS, published_run
from jobs.run import OUTPUTS, STAGES, Run, code_version, log, parse_run_date
from jobs.staging import Staging
from udfs.cleaning import REASONS
from udfs.floors import id_hashes

PAGE = "report.html"
_EXAMPLES, _USERS, _HISTORY, _KEYS = 6, 4, 5, 3
_TITLE, _TEXT = 160, 400  # characters shown
_SPLITS = ("overall", "cold", "warm")
_DATES = 14


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Writes report.html into the stage's folder, and the page into the lake.

    Returns:
        path (in the lake), bytes.
    """
    page = render(run).encode("utf-8", "replace")
    out.write_bytes(PAGE, page)
    return _keep(run, page)


def _keep(run: Run, page: bytes) -> dict[str, Any]:
    """Write the page into the lake: report.html of the newest published date, report-<date>.html of an older one."""
    rows = run.lake.read("runs", columns=["refresh_date", "stage"]).to_pylist()
    newer = any(r["stage"] == "publish" and r["refresh_date"] > run.run_date for r in rows)
    name = f"report-{run.run_date}.html" if newer else PAGE
    Staging(run.lake.uri).write_bytes(name, page)
    return {"path": run.lake.path(name), "bytes": len(page)}


def render(run: Run) -> str:
    """The page. Whatever comes from the tables (titles, ids) is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    facts = run.recorded()
    sampled = _sampled(run, facts)
    metrics = _metrics(run)
    drawn = _drawn(metrics)
    view = {
        "run": run,
        "facts": facts,
        "headline": _headline(metrics),
        "splits": _SPLITS,
        "before": _before(run),
        "metrics": _by_split(metrics),
        "metrics_note": facts.get("evaluate", {}).get("note"),
        "truth": facts.get("evaluate", {}).get("truth", {}),
        "metrics_plot": Markup(plots.metrics(metrics, drawn[0], SYSTEMS)) if drawn else None,
        "probability": _probabilities(sampled),
        "reliability": _reliability(metrics),
        "examples": _examples(run, sampled),
        "rejected": _rejected(run, facts["publish"]["output_versions"]["rejected_rows"]),
        "rows": _rows(facts),
        "timings": _timings(facts),
        "lineage": _lineage(run, facts),
        "data_docs": _data_docs(run, facts),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,}"
    return environment.from_string((files("jobs") / "report.html.j2").read_text(encoding="utf-8")).render(view)


def _metrics(run: Run) -> list[dict[str, Any]]:
    rows = run.lake.read("metrics", refresh_date=run.run_date)
    return rows.filter(pc.equal(rows["run_id"], run.run_id)).to_pylist()


def _by_split(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table a split: a line a system, a column a metric."""
    tables = []
    for split in _SPLITS:
        of_split = {(r["system"], r["metric"]): r for r in rows if r["split"] == split}
        if not of_split:
            continue
        names = sorted({metric for _, metric in of_split}, key=_metric_order)
        best = {m: max(r["value"] for (_, metric), r in of_split.items() if metric == m) for m in names}
        lines = [(system, [of_split[system, m] for m in names]) for system in SYSTEMS if (system, names[0]) in of_split]
        n = next(iter(of_split.values()))["n"]
        tables.append({"split": split, "n": n, "metrics": names, "best": best, "lines": lines})
    return tables


def _metric_order(name: str) -> tuple[int, int]:
    kind, _, k = name.partition("@")
    return int(k), ("ndcg", "recall", "hit").index(kind)


def _drawn(rows: list[dict[str, Any]]) -> list[str]:
    """The NDCGs among the metrics, in their order; plots and headlines show the first."""
    return [name for name in dict.fromkeys(r["metric"] for r in rows) if name.startswith("ndcg@")]


def _headline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is published and the best floor, a split: {split, metric, value, floor, name: the floor's}."""
    drawn = _drawn(rows)
    if not drawn:
        return []
    found = []
    for split in _SPLITS:
        value = {r["system"]: r["value"] for r in rows if r["split"] == split and r["metric"] == drawn[0]}
        floor = {name: v for name, v in value.items() if name not in ("published", "distribution")}
        if "published" in value and floor:
            name = max(floor, key=lambda key: floor[key])
            found.append(
                {"split": split, "metric": drawn[0], "value": value["published"], "floor": floor[name], "name": name}
            )
    return found


def _before(run: Run) -> list[dict[str, Any]]:
    """The newest measured dates before this one, newest first: {date, headline: by split}; of a date its newest run's."""
    begun = run.lake.read("runs", columns=["run_id", "sequence"]).to_pylist()
    sequence = {row["run_id"]: row["sequence"] for row in begun}
    rows = run.lake.read("metrics", columns=["refresh_date", "run_id", "split", "system", "metric", "value"])
    runs: dict[tuple[Any, int], list[dict[str, Any]]] = {}
    for row in rows.filter(pc.less(rows["refresh_date"], pa.scalar(run.run_date))).to_pylist():
        runs.setdefault((row["refresh_date"], sequence.get(row["run_id"], 0)), []).append(row)
    headlines = {day: {h["split"]: h for h in _headline(runs[day, number])} for day, number in sorted(runs)}
    return [{"date": day, "headline": headlines[day]} for day in sorted(headlines, reverse=True)[:_DATES]]


def _sampled(run: Run, facts: dict[str, dict[str, Any]]) -> pa.Table:
    """item_id, user_id, rank, probability of the run's published sampled interactions."""
    version = facts["publish"]["output_versions"]["sampled_interactions"]
    columns = ["item_id", "user_id", "rank", "probability", "run_id"]
    rows = run.lake.read_date("sampled_interactions", run.run_date, version, columns=columns)
    return rows.filter(pc.equal(rows["run_id"], run.run_id)).drop_columns(["run_id"])


def _probabilities(sampled: pa.Table) -> dict[str, Any] | None:
    from markupsafe import Markup

    if sampled.num_rows == 0:
        return None
    values, ranks = sampled["probability"].to_numpy(), sampled["rank"].to_numpy()
    return {
        "items": pc.count_distinct(sampled["item_id"]).as_py(),
        "rows": sampled.num_rows,
        "median_first": float(np.median(values[ranks == ranks.min()])),
        "histogram": Markup(plots.probability_histogram(values)),
        "by_rank": Markup(plots.probability_by_rank(ranks, values)),
    }


def _reliability(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The curve of p(user | item) against what happened, of the rows that evaluation left."""
    from markupsafe import Markup

    of = {r["metric"]: r for r in rows if r["split"] == RELIABILITY}
    if "calibration_error" not in of:
        return None
    bins = sorted(int(name.removeprefix("p@")) for name in of if name.startswith("p@"))
    predicted, observed = ([of[f"{side}@{number}"]["value"] for number in bins] for side in "pq")
    return {
        "error": of["calibration_error"]["value"],
        "items": of["calibration_error"]["n"],
        "pairs": sum(of[f"p@{number}"]["n"] for number in bins),
        "plot": Markup(plots.reliability(np.array(predicted), np.array(observed))),
    }


def _examples(run: Run, sampled: pa.Table) -> list[dict[str, Any]]:
    """A few cold items, the same on every rendering, with their first users and what these had last."""
    items = sorted(pc.unique(sampled["item_id"]).to_pylist())
    chosen = [items[i] for i in np.argsort(id_hashes(items, run.settings.seed), kind="stable")[:_EXAMPLES]]
    if not chosen:
        return []
    rows = sampled.filter(pc.is_in(sampled["item_id"], pa.array(chosen))).sort_by("rank").to_pylist()
    of_item = {item: [row for row in rows if row["item_id"] == item][:_USERS] for item in chosen}
    histories = _histories(run, sorted({row["user_id"] for users in of_item.values() for row in users}))
    wanted = set(chosen) | {item for history in histories.values() for item in history}
    texts = _texts(run, wanted)
    return [
        {
            "item_id": item,
            "title": texts[item][0] if item in texts else item,
            "text": texts[item][1] if item in texts else "",
            "users": [
                {
                    "user_id": row["user_id"],
                    "probability": row["probability"],
                    "history": [texts[i][0] if i in texts else i for i in histories.get(row["user_id"], [])],
                }
                for row in users
            ],
        }
        for item, users in of_item.items()
    ]


def _histories(run: Run, users: list[str]) -> dict[str, list[str]]:
    """user_id -> its last items, newest first; by weight where the source keeps no order."""
    asked = pa.array(users, pa.string())
    columns = ["user_id", "item_id", "last_time", "last_seq", "weight"]
    pieces = run.staging("snapshot").batches("training_interactions", columns)
    kept = [piece.filter(pc.is_in(piece["user_id"], asked)) for piece in pieces]
    found: dict[str, list[str]] = {}
    if not kept:
        return found
    order = [
        ("last_time", "descending"),
        ("last_seq", "descending"),
        ("weight", "descending"),
        ("item_id", "ascending"),
    ]
    # Without the times: Python has none before the year 1, which tables may hold.
    for row in pa.Table.from_batches(kept).sort_by(order).select(["user_id", "item_id"]).to_pylist():
        history = found.setdefault(row["user_id"], [])
        if len(history) < _HISTORY:
            history.append(row["item_id"])
    return found


def _texts(run: Run, items: set[str]) -> dict[str, tuple[str, str]]:
    """item_id -> (title, what the LLM read besides, its beginning)."""
    asked = pa.array(sorted(items), pa.string())
    found = {}
    for piece in run.staging("snapshot").batches("items_labelled", ["item_id", "title", "content"]):
        for row in piece.filter(pc.is_in(piece["item_id"], asked)).to_pylist():
            content, title = (row["content"] or "").strip(), (row["title"] or "").strip()
            title = title or content.partition("\n")[0] or row["item_id"]
            text = content.removeprefix(title).strip()
            if len(text) > _TEXT:
                text = text[:_TEXT].rsplit(maxsplit=1)[0] + " …"
            found[row["item_id"]] = (title[:_TITLE], text)
    return found


def _rejected(run: Run, version: int) -> list[dict[str, Any]]:
    """{table, reason, meaning, rows, keys: a few} by table, most rows first."""
    columns = ["table", "key", "reason", "rows", "run_id"]
    rows = run.lake.read_date("rejected_rows", run.run_date, version, columns=columns)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for batch in rows.filter(pc.equal(rows["run_id"], run.run_id)).to_batches(10_000):
        for row in batch.to_pylist():
            group = groups.setdefault(
                (row["table"], row["reason"]), {"rows": 0, "keys": [], "meaning": REASONS.get(row["reason"], "")}
            )
            group["rows"] += row["rows"]
            if row["key"] is not None and len(group["keys"]) < _KEYS:
                group["keys"].append(row["key"][:80])
    found = [{"table": table, "reason": reason, **group} for (table, reason), group in groups.items()]
    return sorted(found, key=lambda g: (g["table"], -g["rows"], g["reason"]))


def _rows(facts: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    snapshot, published = facts.get("snapshot", {}), facts.get("publish", {})
    into = [
        {
            "table": name,
            "in": rows,
            "used": snapshot["rows_used"][name],
            "rejected": snapshot["rows_rejected"][name],
        }
        for name, rows in snapshot.get("rows_in", {}).items()
    ]
    counts = published.get("rows", {})
    return {"in": into, "out": [{"table": name, "rows": counts[name]} for name in OUTPUTS if name in counts]}


def _timings(facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    seconds = [(name, float(facts[name]["seconds"])) for name in STAGES if "seconds" in facts.get(name, {})]
    longest = max((value for _, value in seconds), default=0.0)
    return [{"stage": name, "seconds": s, "share": 100 * s / longest if longest else 0} for name, s in seconds]


def _lineage(run: Run, facts: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    trained, cf = facts.get("filterllm_train", {}), facts.get("cf", {})
    outputs: dict[str, Any] = {}
    for name in STAGES:
        outputs |= facts.get(name, {}).get("output_versions", {})
    pairs = [
        ("run", f"{run.run_id}, number {run.sequence} of {run.run_date}"),
        ("inputs", ", ".join(f"{name} at version {v}" for name, v in sorted(run.input_versions.items()))),
        ("outputs", ", ".join(f"{name} at version {v}" for name, v in sorted(outputs.items()))),
        ("settings", f"hash {run.conf_hash}, seed {run.settings.seed}"),
        ("code", f"cold-refresh {code_version()}"),
        ("text model", str(facts.get("text_embeddings", {}).get("model_version", ""))),
        ("FilterLLM", _made(trained, "model_version")),
        ("embedding space", _made(cf, "space_version")),
        ("cold vectors", _placed(facts.get("refresh", {}))),
    ]
    return [(name, value) for name, value in pairs if value]


def _made(facts: dict[str, Any], version: str) -> str:
    if not facts.get(version):
        return ""
    how = " (trained in this run)" if facts.get("trained") else " (kept from an earlier run)"
    return f"{facts[version]}{how if 'trained' in facts else ''}"


def _placed(facts: dict[str, Any]) -> str:
    """How those of sampled users are made, if there are any."""
    if not facts.get("sources", {}).get("sampled"):
        return ""
    words, scale = facts["words"], facts["scale"]
    return f"of sampled users {1 - words:.0%}, of words {words:.0%}; {scale:.2g} times the fold-in's length"


def _data_docs(run: Run, facts: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(stage, where its Data Docs are, link from the page in the lake)."""
    root = run.lake.uri.rstrip("/") + "/"
    named = [(name, str(facts[name]["data_docs"])) for name in STAGES if facts.get(name, {}).get("data_docs")]
    return [(name, path, path.removeprefix(root)) for name, path in named]


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_settings(parser)
    parser.add_argument("--run-date", required=True, help="YYYY-MM-DD: a published date")
    args = parser.parse_args(argv)

    def job() -> dict[str, Any]:
        found = published_run(cli.settings(args), parse_run_date(args.run_date))
        kept = _keep(found, render(found).encode("utf-8", "replace"))
        log(f"the report of {found.run_date} is in {kept['path']}")
        return {"run_id": found.run_id, **kept}

    return cli.main(job)


if __name__ == "__main__":
    sys.exit(cli.script("jobs.report", __file__))
