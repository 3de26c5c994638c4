"""Stage `cf`: the embedding space of the night, an earlier one or one that is trained now.

A space is an artifact (`_artifacts/spaces/<version>`): tables `users` and `items`, with cf.init=llminit also `llminit`, and
facts that hold what a fold-in needs (alpha, regularization, binary, and the scales for spaces that ALS did not train). Its
version is a hash of what it was made from and of the date. A new one is rotated onto the one that was published before it, so
that vectors of different nights lie near each other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs import cf_start
from jobs.run import Run, log
from jobs.settings import Settings
from jobs.spark_session import session, spark_path
from jobs.staging import Staging
from udfs import cf_model, fold_in, procrustes
from udfs.cf_inputs import CfError, CfParams, Pairs
from udfs.ids import large, place, plain
from udfs.llm_init import TextMap
from udfs.vectors import Matrix, from_column, to_column

# Rows of each side from which the length of fold-ins is measured.
_SCALE_ROWS = 2000
# Rows that are compared with the earlier space at a time.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Space:
    """An embedding space in memory: users [U, d] and items [I, d] float32, rows in the order of the ids.

    `interactions` [I] are the real pairs that an item's vector was trained on.
    """

    version: str
    user_ids: list[str]
    users: Matrix
    item_ids: list[str]
    items: Matrix
    facts: dict[str, Any]
    interactions: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def fold_in(self, fixed: Matrix, csr: Any, scale: str, gram_of_all: Any = None, shares: Any = None) -> Matrix:
        """udfs.fold_in.fold_in with the space's own settings; `scale`: item_scale or user_scale, of its facts."""
        return fold_in.fold_in(
            fixed,
            *csr,
            alpha=self.facts["alpha"],
            regularization=self.facts["regularization"],
            scale=self.facts[scale],
            gram_of_all=gram_of_all,
            shares=shares,
        )


def load_space(run: Run, version: str) -> Space:
    """The space `version`.

    Raises:
        jobs.staging.StagingError: it is not there, or not complete.
    """
    artifact = run.artifact("spaces", version)
    facts = artifact.facts()
    users, items = artifact.read("users"), artifact.read("items")
    return Space(
        version,
        users["user_id"].to_pylist(),
        from_column(users["embedding"]),
        items["item_id"].to_pylist(),
        from_column(items["embedding"]),
        facts,
        items["interactions"].to_numpy(),
    )


def conf_digest(settings: Settings, encoder_version: str | None = None) -> str:
    """Hash of the settings and the seed that decide a space; when and on what device it is trained is left out."""
    cf = settings.cf.model_dump(mode="json", exclude={"retrain_days", "device"})
    made_of = [cf, settings.digest("snapshot", "inputs"), settings.seed, encoder_version]
    # What of an item is encoded is no part of the encoder.
    body = json.dumps(made_of if encoder_version is None else [*made_of, settings.text.prompt], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _spaces(run: Run) -> list[tuple[date, str, dict[str, Any]]]:
    """`Run.trained` of this stage's spaces, without those of the stage refresh."""
    return [one for one in run.trained("spaces") if one[2]["kind"] == "cf"]


def _published(run: Run) -> set[str]:
    """The spaces of stage cf in the nights that were published."""
    rows = run.lake.read("runs", columns=["run_id", "stage", "counts"]).to_pylist()
    published = {row["run_id"] for row in rows if row["stage"] == "publish"}
    of = (json.loads(row["counts"]) for row in rows if row["stage"] == "cf" and row["run_id"] in published)
    return {facts["space_version"] for facts in of}


def kept(run: Run, encoder_version: str | None) -> str | None:
    """The space that the night takes up: the newest of the last cf.retrain_days days and the same settings. None: it trains one.

    Args:
        encoder_version: see `cf_start.encoder_version`.
    """
    digest, days = conf_digest(run.settings, encoder_version), run.settings.cf.retrain_days
    fresh = [v for day, v, facts in _spaces(run) if facts["conf"] == digest and (run.run_date - day).days < days]
    return fresh[-1] if fresh else None


def run(run: Run, out: Staging) -> dict[str, Any]:
    """Choose the night's space: the newest of the last cf.retrain_days days and the same settings, or train one.

    Returns:
        space_version; trained: whether this run trained it; model, dimension, trained_on, users, items, aligned_to, residual.

    Raises:
        udfs.cf_inputs.CfError: there is nothing to train on, or training failed.
    """
    cf, version = run.settings.cf, kept(run, cf_start.encoder_version(run))
    if version is not None:
        log(f"[cf] space {version} is younger than {cf.retrain_days} days: kept")
    else:
        alike = [one for one in _spaces(run) if (one[2]["model"], one[2]["dimension"]) == (cf.model, cf.dimension)]
        # What a gate refused is no measure: the next space would be like it, and pass.
        published = _published(run)
        earlier = [v for day, v, _ in alike if day < run.run_date and v in published]
        version = train(run, out, align_to=earlier[-1] if earlier else None)
    facts = run.artifact("spaces", version).facts()
    told = ("model", "dimension", "trained_on", "users", "items", "aligned_to", "residual")
    return {"space_version": version, "trained": facts["run_id"] == run.run_id, **{name: facts[name] for name in told}}


def train(run: Run, out: Staging, *, align_to: str | None, sampled: Pairs | None = None) -> str:
    """Train a space on the snapshot's pairs and leave it as an artifact; returns its version.

    Args:
        out: where Spark may keep its checkpoints meanwhile.
        align_to: the space to rotate it onto.
        sampled: pairs (of the snapshot's user_idx and item_idx, none of them real) to train on as well; then cold items take
            part, and the space is this night's only: the stage never takes it up for a later one.

    Raises:
        udfs.cf_inputs.CfError: there is nothing to train on, or training failed.
    """
    snapshot, settings = run.staging("snapshot"), run.settings
    users = large(snapshot.read("users", ["user_id", "user_idx"])).sort_by("user_idx")
    items = large(snapshot.read("items_labelled", ["item_id", "item_idx", "label", "interactions"])).sort_by("item_idx")
    takes_part = np.ones(items.num_rows, bool) if sampled is not None else pc.equal(items["label"], "warm").to_numpy()
    if not takes_part.any():
        raise CfError(
            f"no warm item: none of the {items.num_rows} items has snapshot.warm_interactions "
            f"({settings.snapshot.warm_interactions}) users before {run.run_date}; the snapshot has "
            f"{snapshot.facts()['pairs']} pairs. Lower snapshot.warm_interactions, or take a later --run-date"
        )
    encoder_version = cf_start.encoder_version(run)
    conf = conf_digest(settings, encoder_version)
    # With its date: what a night of later left must not stand in for this one's, though it be the same.
    made_of = [conf, run.run_date.isoformat(), snapshot.facts()["training_digest"], align_to]
    if encoder_version is not None:
        made_of.append(cf_start.texts_digest(run))
    digest = hashlib.sha256(json.dumps(made_of).encode())
    if sampled is not None:
        for part in (sampled.users, sampled.items, sampled.weights):
            digest.update(np.ascontiguousarray(part).tobytes())
        # Of cold items the training digest knows nothing.
        digest.update(snapshot.facts()["items_digest"].encode())
    version = digest.hexdigest()[:16]
    artifact = run.artifact("spaces", version)
    if artifact.is_complete():
        if sampled is None:
            run.renew("spaces", version)
        return version
    log(f"[cf] training {settings.cf.model} with {settings.cf.dimension} dimensions, space {version}")
    y, x, scales, of_text = _fit(run, out, takes_part, users.num_rows, sampled)
    y_ids, x_ids = users["user_id"].filter(y.any(1)), items["item_id"].filter(x.any(1))
    interactions = items["interactions"].filter(x.any(1))
    y, x = y[y.any(1)], x[x.any(1)]
    residual = None
    if align_to is not None:
        earlier = load_space(run, align_to)
        rotation, residual = _alignment(y_ids, y, x_ids, x, earlier)
        if residual is None:
            align_to = None
        else:
            y, x = (matrix @ rotation.astype(np.float32) for matrix in (y, x))
            of_text = of_text.rotated(rotation) if of_text else None
    if artifact.is_complete():  # another run trained it meanwhile, and a night may read it
        return version
    artifact.clear()
    artifact.write("users", plain(pa.table({"user_id": y_ids, "embedding": to_column(y)})))
    columns = {"item_id": x_ids, "embedding": to_column(x), "interactions": interactions}
    artifact.write("items", plain(pa.table(columns)))
    if of_text:
        cf_start.write(artifact, of_text)
    facts = {
        "kind": "refresh" if sampled is not None else "cf",
        "run_id": run.run_id,
        "trained_on": run.run_date.isoformat(),
        "nth": run.nth("spaces"),  # mended data are trained on again
        "conf": conf,
        "seed": settings.seed,
        "model": settings.cf.model,
        "encoder_version": encoder_version,
        "dimension": settings.cf.dimension,
        "alpha": settings.cf.alpha,
        "regularization": settings.cf.regularization,
        "binary": settings.cf.binary,
        **scales,
        "users": len(y),
        "items": len(x),
        "aligned_to": align_to,
        "residual": residual,
    }
    artifact.complete(facts)
    return version


def params(settings: Settings) -> CfParams:
    """How to train, as the settings say."""
    names = set(CfParams.__dataclass_fields__) - {"checkpoint_dir"}
    return CfParams(**{name: value for name, value in settings.cf.model_dump().items() if name in names})


def pair_weights(weight: npt.NDArray[np.floating], binary: bool) -> npt.NDArray[np.float32]:
    """What a pair counts in a space whose fact `binary` is this, from the snapshot's weight."""
    return (np.ones(len(weight)) if binary else np.log1p(weight)).astype(np.float32)


def _fit(
    run: Run, out: Staging, takes_part: npt.NDArray[np.bool_], n_users: int, sampled: Pairs | None
) -> tuple[Matrix, Matrix, dict[str, float], TextMap | None]:
    """Users [n_users, d], items [n_items, d], what fold-ins are multiplied by in this space, and where texts alone lie in it."""
    cf, seed = run.settings.cf, run.settings.seed
    given = params(run.settings)
    if cf_model.ENGINES[cf.model] == "spark":
        scratch = Staging(out.path("checkpoint"))
        pairs = _spark_pairs(run, sampled)
        given = replace(given, checkpoint_dir=spark_path(scratch.uri))
        y, x = cf_model.fit(cf.model, pairs, n_users, len(takes_part), given, seed)
        scratch.clear()
        return y, x, {"user_scale": 1.0, "item_scale": 1.0}, None
    table = run.staging("snapshot").read("training_interactions", ["user_idx", "item_idx", "weight"])
    user, item = table["user_idx"].to_numpy(), table["item_idx"].to_numpy()
    kept = takes_part[item]
    real = Pairs(user[kept], item[kept], pair_weights(table["weight"].to_numpy()[kept], cf.binary)).sorted()
    together = _union(real, sampled) if sampled is not None else real
    begin, of_text = cf_start.start(run, together, n_users) if cf.init == "llminit" else (None, None)
    y, x = cf_model.fit(cf.model, together, n_users, len(takes_part), given, seed, begin)
    if of_text:
        of_text = cf_model.without_pairs(cf.model, given, of_text)
    return y, x, _scales(real, y, x, cf.alpha, cf.regularization, seed), of_text


def _union(real: Pairs, sampled: Pairs) -> Pairs:
    return Pairs(
        np.concatenate([real.users, sampled.users]),
        np.concatenate([real.items, sampled.items]),
        np.concatenate([real.weights, sampled.weights]),
    )


def _spark_pairs(run: Run, sampled: Pairs | None) -> Any:
    """The pairs to train on as a Spark DataFrame: user_idx, item_idx, weight."""
    from pyspark.sql import functions as F

    spark, snapshot = session(run.settings.spark), run.staging("snapshot")
    frame = spark.read.parquet(spark_path(snapshot.path("training_interactions")))
    weight = F.lit(1.0) if run.settings.cf.binary else F.log1p("weight")
    frame = frame.select("user_idx", "item_idx", weight.cast("float").alias("weight"))
    if sampled is None:
        items = spark.read.parquet(spark_path(snapshot.path("items_labelled")))
        return frame.join(
            F.broadcast(items.where(items["label"] == "warm").select("item_idx")), "item_idx", "left_semi"
        )
    columns = {"user_idx": sampled.users, "item_idx": sampled.items, "weight": sampled.weights}
    types = {"user_idx": pa.int32(), "item_idx": pa.int32(), "weight": pa.float32()}
    more = pa.table({name: pa.array(values).cast(types[name]) for name, values in columns.items()})
    return frame.unionByName(spark.createDataFrame(more))


def _scales(real: Pairs, y: Matrix, x: Matrix, alpha: float, regularization: float, seed: int) -> dict[str, float]:
    """user_scale and item_scale of a space that ALS did not train, from rows of it that are folded in again."""
    found = {}
    sides = {"item_scale": (real.items, real.users, x, y), "user_scale": (real.users, real.items, y, x)}
    for name, (own, other, trained, fixed) in sides.items():
        rows = np.unique(own)
        if len(rows) > _SCALE_ROWS:
            rows = np.sort(np.random.default_rng(seed).choice(rows, _SCALE_ROWS, replace=False))
        mine = np.isin(own, rows)
        csr = fold_in.to_csr(np.searchsorted(rows, own[mine]), other[mine], real.weights[mine], len(rows))
        folded = fold_in.fold_in(fixed, *csr, alpha=alpha, regularization=regularization)
        found[name] = fold_in.norm_scale(trained[rows], folded)
    return found


def _alignment(
    user_ids: pa.ChunkedArray, users: Matrix, item_ids: pa.ChunkedArray, items: Matrix, earlier: Space
) -> tuple[npt.NDArray[np.float64], float | None]:
    """The rotation onto `earlier` over the shared users and items, and its relative residual (None: nothing is shared)."""
    sides = (
        (users, earlier.users, place(user_ids, earlier.user_ids)),
        (items, earlier.items, place(item_ids, earlier.item_ids)),
    )
    if not any((at >= 0).any() for _, _, at in sides):
        log(f"[cf] no user and no item of space {earlier.version} is left: not aligned to it")
        return np.eye(users.shape[1]), None
    shared = ((new, old, at, np.flatnonzero(at >= 0)) for new, old, at in sides)
    return procrustes.align(
        (new[rows[start : start + _PIECE]], old[at[rows[start : start + _PIECE]]])
        for new, old, at, rows in shared
        for start in range(0, len(rows), _PIECE)
    )
