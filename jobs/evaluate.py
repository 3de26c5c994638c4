"""Recall, NDCG and hit rate at K of what a run published, beside the floors; how well p(user | item) is calibrated.

    python -m jobs.evaluate --conf conf/demo.yaml --run-date 2017-11-01

As a stage it measures with the truth that the run's pinned tables hold, if that is whole: on the night itself the users' time
(evaluate.horizon_days) has only begun. As a command it measures a published date with what is known by now, and replaces that
run's rows in `metrics`: a date that is named, or (every morning, say) the one whose truth is whole by then, and those of before it
that nobody has measured:

    python -m jobs.evaluate --conf conf/demo.yaml --due 2017-12-31
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from jobs import cli, inputs, truth
from jobs.lake import Lake
from jobs.published import NotPublishedError, Published, require_remakable
from jobs.run import LATE_DAYS, OUTPUTS, Run, code_version, execute, log, parse_run_date
from jobs.settings import Settings
from jobs.staging import Staging
from jobs.truth import Catalog, Truth
from schemas.errors import ColdRefreshError, ContractError
from schemas.table import table as schema
from udfs import floors
from udfs.fold_in import to_csr
from udfs.ids import place, take
from udfs.ranking_metrics import Scorer, Task, bootstrap, per_user
from udfs.reliability import Reliability, reliability
from udfs.scorers import distribution_scorer, dot_scorer
from udfs.tfidf import tfidf
from udfs.vectors import from_column

#: In `metrics`, the split under which the reliability curve stands: mean p and mean q of each bin, and their error.
RELIABILITY = "reliability"

# Each text is compared with each: of more items than this the floor text_knn would take the night.
_COMPARED_ITEMS = 200_000
#: The order in which systems are shown: ours, then the floors.
SYSTEMS = ("published", "distribution", "text_knn", "text_profile", "popularity", "random")


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Commits the run's `metrics`, or says why there are none; never fails for want of truth.

    Returns:
        truth (what was compared with), metrics (how many rows), summary ({split: {system: {metric: value}}}),
        calibration_error if p(user | item) could be compared with cold items' users, note if nothing was measured,
        output_versions if something was.
    """
    catalog = truth.catalog(run)
    with inputs.readable(run):
        found = truth.read(run, catalog, whole=True)
    return _evaluate(run, catalog, found, f"metrics/{run.run_id}", 0)


def _evaluate(run: Run, catalog: Catalog, found: Truth, app: str, sequence: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"truth": found.facts, "metrics": 0, "summary": {}}
    if not found.tasks:
        log(f"[evaluate] {found.facts['note']}")
        return {**facts, "note": found.facts["note"]}
    rows = measure(run, catalog, found)
    for row in rows:
        if row["split"] == RELIABILITY:
            if row["metric"] == "calibration_error":
                facts["calibration_error"] = round(row["value"], 4)
            continue
        systems = facts["summary"].setdefault(row["split"], {})
        systems.setdefault(row["system"], {})[row["metric"]] = round(row["value"], 4)
    table = pa.Table.from_pylist(rows, schema("metrics").arrow_schema)
    version = run.lake.commit(
        "metrics",
        table,
        app=app,
        sequence=sequence,
        replace={"refresh_date": run.run_date, "run_id": run.run_id},
        lineage={"run_id": run.run_id, "truth": found.facts},
    )
    return {**facts, "metrics": len(rows), "output_versions": {"metrics": version}}


def measure(run: Run, catalog: Catalog, found: Truth) -> list[dict[str, Any]]:
    """Rows of schemas/metrics.yaml for every split of the truth and every system that is defined there."""
    settings = run.settings.evaluate
    systems = Systems.published(run, catalog)
    rows = []
    for split, task in found.tasks.items():
        for system, scorer in systems.of(split, task):
            values = per_user(scorer, task, settings.k)
            interval = bootstrap(np.stack(list(values.values()), axis=1), settings.bootstrap, run.settings.seed)
            for column, (metric, of_users) in enumerate(values.items()):
                rows.append(
                    {
                        "refresh_date": run.run_date,
                        "run_id": run.run_id,
                        "split": split,
                        "system": system,
                        "metric": metric,
                        "value": float(of_users.mean()),
                        "n": len(of_users),
                        "low": float(interval[0][column]) if interval else None,
                        "high": float(interval[1][column]) if interval else None,
                    }
                )
            first = f"ndcg@{settings.k[0]}"
            log(f"[evaluate] {split:8} {system:13} {first} {values[first].mean():.4f} ({len(task.users)} users)")
    curve = systems.reliability(found.tasks["cold"], found.whole) if "cold" in found.tasks else None
    return rows + (_curve_rows(run, curve) if curve is not None and curve.items else [])


def _curve_rows(run: Run, curve: Reliability) -> list[dict[str, Any]]:
    """The curve as rows of schemas/metrics.yaml: p@bin and q@bin, n the bin's pairs; calibration_error, n the items."""
    log(f"[evaluate] p(user | item) of {curve.items} cold items: calibration error {curve.calibration_error:.4f}")
    same = {"refresh_date": run.run_date, "run_id": run.run_id, "split": RELIABILITY, "system": "distribution"}
    values = [("calibration_error", curve.calibration_error, curve.items)]
    for number, pairs, p, q in curve.points:
        values += [(f"p@{number}", p, pairs), (f"q@{number}", q, pairs)]
    return [{**same, "metric": name, "value": value, "n": n, "low": None, "high": None} for name, value, n in values]


class Systems:
    """What is measured: reads and prepares each system once, and gives its scorer for any task."""

    def __init__(
        self, run: Run, catalog: Catalog, users: pa.Table, items: pa.Table, trained: dict[str, Any] | None
    ) -> None:
        """users and items: rows of user_embeddings and item_embeddings; trained: facts of the stage filterllm_train.

        Raises:
            ColdRefreshError: users and items differ in their dimensions.
        """
        self.run, self.catalog, self.trained = run, catalog, trained or {}
        self.users, self.users_known = take(catalog.user_ids, users["user_id"], from_column(users["embedding"]))
        self.items, self.items_known = take(catalog.item_ids, items["item_id"], from_column(items["embedding"]))
        if self.users.shape[1] != self.items.shape[1]:
            raise ColdRefreshError(
                f"run {run.run_id}: user_embeddings have {self.users.shape[1]} dimensions and item_embeddings "
                f"{self.items.shape[1]}; they are not of one space"
            )
        self.texts = tfidf(catalog.texts)
        self._cold: tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray] | None = None
        seed = run.settings.seed
        self.user_hashes = floors.id_hashes(catalog.user_ids, seed)
        self.item_hashes = floors.id_hashes(catalog.item_ids, seed + 1)

    @classmethod
    def published(cls, run: Run, catalog: Catalog) -> Systems:
        """Those of what `run` published.

        Raises:
            NotPublishedError: it has published nothing.
        """
        facts = run.recorded()
        if "publish" not in facts:
            raise NotPublishedError(
                f"run {run.run_id} of {run.run_date} has published nothing: run its stage publish first"
            )
        versions = {name: int(facts["publish"]["output_versions"][name]) for name in OUTPUTS}
        space = facts["publish"]["space_version"]
        rows = facts["publish"].get("rows", {})
        tables = Published(run.run_id, run.run_date, run.sequence, versions, rows, space, run.lake)
        return cls(run, catalog, tables.user_embeddings(), tables.item_embeddings(), facts.get("filterllm_train"))

    def of(self, split: str, task: Task) -> Iterator[tuple[str, Scorer]]:
        """(name, scorer) of the systems that are defined in this split."""
        c, candidates = self.catalog, task.candidates
        vectors = np.where(self.items_known[candidates, None], self.items[candidates], np.float32(np.nan))
        yield "published", dot_scorer(self.users, vectors, candidates, self.users_known)
        if split == "cold" and self.trained.get("model_version"):
            yield "distribution", self._distribution(task)
        history = c.history(task.users)
        if len(c.item_ids) <= _COMPARED_ITEMS:
            yield "text_knn", floors.text_knn_scorer(self.neighbours, history, candidates)
        yield "text_profile", floors.text_profile_scorer(self.texts, history, candidates)
        yield "popularity", floors.popularity_scorer(c.interactions, candidates)
        yield "random", floors.random_scorer(self.user_hashes, self.item_hashes, candidates)

    @cached_property
    def neighbours(self) -> sparse.csr_array:
        """Those of floors.text_neighbours, the same for every split. Ties go by a hash of the id, as among a task's candidates."""
        known = np.flatnonzero(self.catalog.interactions > 0)
        hashes = floors.id_hashes([self.catalog.item_ids[i] for i in known], self.run.settings.seed)
        return floors.text_neighbours(self.texts, known[np.argsort(hashes, kind="stable")])

    def _distribution(self, task: Task) -> Scorer:
        """log p(u | c) of the run's model; the raw logit if evaluate.normalize_by_item is false."""
        from jobs import text_embeddings
        from jobs.filterllm_train import load_model

        model = load_model(self.run, self.trained["model_version"])
        artifact = self.run.artifact("models", self.trained["model_version"])
        keys, bias = model.keys()
        at = place(self.catalog.user_ids, artifact.read("users")["user_id"])
        known = at >= 0
        with_text = [i for i, item in enumerate(task.candidates) if self.catalog.text_sha256[item]]
        shas = [str(self.catalog.text_sha256[item]) for item in task.candidates[with_text]]
        queries = np.full((len(task.candidates), keys.shape[1]), np.nan, np.float32)
        if shas:
            hidden = text_embeddings.load(self.run, shas, self.trained["encoder_version"])
            queries[with_text] = model.queries(hidden)
        keys = np.where(known[:, None], keys[at], 0)
        bias = None if bias is None else np.where(known, bias[at], 0)
        self._cold = queries, keys, bias, known
        return distribution_scorer(
            queries, keys, bias, task.candidates, known, self.run.settings.evaluate.normalize_by_item
        )

    def reliability(self, cold: Task, whole: truth.Pairs | None = None) -> Reliability | None:
        """The curve of the cold items with text and users that the model knows; None without a model. Call it after `of`.

        Of more items than truth.CELLS allows, the first by the hash of their id, in which order the candidates are; where the
        task has not all users of an item, of those that `whole` has.
        """
        if self._cold is None:
            return None
        queries, keys, bias, known = self._cold
        true = cold.truth.tocoo()
        users, items = cold.users[true.row], true.col.astype(np.int64)
        if whole is not None:
            at = np.full(len(self.catalog.item_ids), -1)
            at[cold.candidates] = np.arange(len(cold.candidates))
            candidate = at[whole[1]] >= 0
            users, items = whole[0][candidate], at[whole[1][candidate]]
        there = known[users] & ~np.isnan(queries[items]).any(axis=1)
        chosen = np.unique(items[there])[: max(1, truth.CELLS // max(1, int(known.sum())))]
        there &= np.isin(items, chosen)
        number = np.cumsum(known) - 1
        indptr, numbers, _ = to_csr(
            np.searchsorted(chosen, items[there]), number[users[there]], np.ones(int(there.sum())), len(chosen)
        )
        return reliability(queries[chosen], keys[known], None if bias is None else bias[known], indptr, numbers)


def again(settings: Settings, run_date: date, *, whole: bool = False) -> dict[str, Any]:
    """Evaluate what `run_date` published with the truth as the tables are now; `whole`: as in jobs.truth.read.

    Raises:
        NotPublishedError: no run of that date has published.
    """
    return _again(published_run(settings, run_date), whole)


def _again(run: Run, whole: bool) -> dict[str, Any]:
    catalog = truth.catalog(run)
    found = truth.read(run, catalog, run.lake.version(run.settings.inputs.interactions.table), whole=whole)
    app = f"metrics/{run.run_id}/{'whole' if whole else 'again'}"
    before = run.lake.table("metrics").transaction_version(app) if run.lake.exists("metrics") else None
    facts = _evaluate(run, catalog, found, app, 0 if before is None else before + 1)
    return {"run_id": run.run_id, "run_date": run.run_date.isoformat(), **facts}


def published_run(settings: Settings, run_date: date) -> Run:
    """The latest run of `run_date` that published, with the given settings and its snapshot staged.

    Raises:
        NotPublishedError: there is none, or its snapshot is gone and would be another one: with these settings, this code, or the
            input tables as they are.
    """

    latest = _published_row(settings, run_date)
    if latest is None:
        raise NotPublishedError(
            f"no run of {run_date} has published in {settings.lake}: run jobs/cold_refresh.py for that date first"
        )
    pinned = json.loads(latest["input_versions"])
    run = Run(settings, run_date, latest["run_id"], latest["sequence"], pinned, latest["conf_hash"])
    if not run.staging("snapshot").is_complete():
        # Removed since: it is made again from the versions that the run pinned.
        require_remakable(run, latest)
    elif (latest["conf_hash"], latest["code_version"]) != (settings.digest(), code_version()):
        log(
            f"note: run {run.run_id} was made with other settings or code than these; its own data is evaluated with these"
        )
    execute(run, "snapshot")
    return run


def _published_row(settings: Settings, run_date: date) -> dict[str, Any] | None:
    rows = Lake(settings.lake, settings.storage_options).read("runs", refresh_date=run_date).to_pylist()
    return max((r for r in rows if r["stage"] == "publish"), key=lambda r: r["sequence"], default=None)


def due(settings: Settings, day: date) -> dict[str, Any]:
    """Evaluate the date whose evaluate.horizon_days end with the midnight at which `day` begins, and dates before it that were
    published and have no figures: nobody measured them then, the truth was not whole yet, or the horizon was longer.

    Of these it takes the LATE_DAYS before the one that is due, and of all that are older and whose snapshot is still staged, the
    oldest LATE_DAYS: the others follow on the next days.

    Returns:
        As `again`, of the date that is due (a note if nothing was published then, its snapshot is gone, as after the horizon was
        made longer, or the protocol knows no such date), and measured: the dates that have figures now.

    Raises:
        NotPublishedError: there is no lake, or what the date that is due has published is not there any more.
    """
    lake = Lake(settings.lake, settings.storage_options)
    if not lake.exists("runs"):
        # Every day's note that nothing is due would hide a lake that is mistyped.
        raise NotPublishedError(f"no run was ever begun in {settings.lake}: is this the lake? It has no table 'runs'")
    last = day - timedelta(days=settings.evaluate.horizon_days)
    found: dict[str, Any] = {"run_date": last.isoformat(), "metrics": 0}
    measured: list[str] = []
    if settings.evaluate.protocol != "temporal":
        found["note"] = f"evaluate.protocol is {settings.evaluate.protocol}: no date is ever due"
    elif _published_row(settings, last) is None:
        found["note"] = f"no run of {last} has published: on {day} there is nothing to measure"
    else:
        try:
            run = published_run(settings, last)
        except (NotPublishedError, ContractError) as error:
            found["note"] = f"{last} cannot be measured: {error}"
        else:
            found = _again(run, whole=True)
    if found["metrics"]:
        measured.append(last.isoformat())
    if "note" in found:
        log(f"[evaluate] {found['note']}")
    for late in _unmeasured(lake, last) if settings.evaluate.protocol == "temporal" else []:
        try:
            if again(settings, late, whole=True)["metrics"]:
                measured.append(late.isoformat())
        except Exception as error:  # it was to be measured earlier; what is due today has been
            log(f"[evaluate] {late} has no figures yet: {error}")
    return {**found, "measured": sorted(measured)}


def _unmeasured(lake: Lake, last: date) -> list[date]:
    """What `due` measures beside `last`: first the late dates, newest first, then the older ones."""
    rows = lake.read("runs", columns=["refresh_date", "run_id", "sequence", "stage"]).to_pylist()
    published = sorted((r["refresh_date"], r["sequence"], r["run_id"]) for r in rows if r["stage"] == "publish")
    newest = {one: run_id for one, _, run_id in published if one < last}
    since, staged = last - timedelta(days=LATE_DAYS), set(Staging(lake.path("_staging")).children())
    late = [one for one in reversed(newest) if one >= since and not _has_figures(lake, newest[one])]
    older = (
        one
        for one, run_id in newest.items()
        if one < since
        and run_id in staged
        and Staging(lake.path(f"_staging/{run_id}/snapshot")).is_complete()
        and not _has_figures(lake, run_id)
    )
    return late + list(islice(older, LATE_DAYS))


def _has_figures(lake: Lake, run_id: str) -> bool:
    """Of truth that was whole: what was measured by hand before that does not count."""
    if not lake.exists("metrics"):
        return False
    metrics = lake.table("metrics")
    apps = (f"metrics/{run_id}", f"metrics/{run_id}/whole")
    return any(metrics.transaction_version(app) is not None for app in apps)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_settings(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run-date", help="YYYY-MM-DD: a published date")
    which.add_argument("--due", metavar="DATE", help="YYYY-MM-DD: the date whose evaluate.horizon_days end here")
    args = parser.parse_args(argv)

    def job() -> dict[str, Any]:
        settings = cli.settings(args)
        if args.due:
            return due(settings, parse_run_date(args.due, "--due"))
        return again(settings, parse_run_date(args.run_date))

    return cli.main(job)


if __name__ == "__main__":
    sys.exit(cli.script("jobs.evaluate", __file__))
