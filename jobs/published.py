"""What rankers read: the three output tables of one night, together, at the versions that `runs` names.

    python -m jobs.published --lake ./lake --date 2017-11-01 --user 1 --top 10

The newest publication of the date (or before it) is found, checked, and asked for a user's best items as a ranker would:
the inner product of the user's vector with the items'. Cold items are marked. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs import cli, item_index
from jobs.lake import Lake
from jobs.run import OUTPUTS, Run, code_version, has_its_inputs, log, parse_run_date
from schemas.errors import ColdRefreshError
from udfs.ids import sort
from udfs.vectors import from_column

# Sources of the vectors of items whose interactions, if they have any, do not place them yet.
_COLD = ("sampled", "llminit", "allmrec")


class NotPublishedError(ColdRefreshError):
    """There is no such publication, or what is there is not of one run."""


@dataclass(frozen=True)
class Published:
    """One complete night. `versions`: output table -> Delta version, rows: how many it has; later nights do not change what is read
    here."""

    run_id: str
    refresh_date: date
    sequence: int
    versions: dict[str, int]
    rows: dict[str, int]
    space_version: str
    lake: Lake = field(repr=False)

    def _read(self, name: str) -> pa.Table:
        version = self.versions[name]
        table = self.lake.read_date(name, self.refresh_date, version)
        for column, expected in (("run_id", self.run_id), ("space_version", self.space_version)):
            others = [v for v in pc.unique(table[column]).to_pylist() if v != expected]
            if others:
                raise NotPublishedError(
                    f"table '{name}' version {version} holds rows of {self.refresh_date} with {column} {others[:3]}, and "
                    f"`runs` says {expected!r}: they were replaced; publish the night again"
                )
        if table.num_rows != (published := self.rows.get(name, table.num_rows)):
            raise NotPublishedError(
                f"table '{name}' holds {table.num_rows} rows of {self.refresh_date}, and {published} were published: they were "
                "deleted or replaced; publish the night again"
            )
        return table

    def sampled_interactions(self) -> pa.Table:
        """The users of the cold items (schemas/sampled_interactions.yaml), by item and rank; no rows if none was cold.

        Raises:
            NotPublishedError: its rows are gone (deleted and vacuumed), or not of this run and space.
            jobs.lake.LakeError: the table cannot be read.
        """
        return sort(self._read("sampled_interactions"), "item_id", "rank")

    def item_embeddings(self) -> pa.Table:
        """The items' vectors (schemas/item_embeddings.yaml), by id. Raises as `sampled_interactions` does."""
        return sort(self._read("item_embeddings"), "item_id", vectors="embedding")

    def user_embeddings(self) -> pa.Table:
        """The users' vectors (schemas/user_embeddings.yaml), by id. Raises as `sampled_interactions` does."""
        return sort(self._read("user_embeddings"), "user_id", vectors="embedding")


def latest(lake: Lake, on_or_before: date | None = None) -> Published:
    """The newest publication, by refresh date and then by run; of `on_or_before` or an earlier date, if given.

    Raises:
        NotPublishedError: there is none.
    """
    rows = lake.read(
        "runs", columns=["refresh_date", "run_id", "sequence", "stage", "status", "output_versions", "counts"]
    )
    rows = rows.filter(pc.and_(pc.equal(rows["stage"], "publish"), pc.equal(rows["status"], "complete")))
    if on_or_before is not None:
        rows = rows.filter(pc.less_equal(rows["refresh_date"], pa.scalar(on_or_before)))
    if rows.num_rows == 0:
        until = f" on or before {on_or_before}" if on_or_before else ""
        doubt = "" if lake.exists("runs") else " (there is no table 'runs': is this the lake?)"
        raise NotPublishedError(
            f"nothing is published in {lake.uri}{until}{doubt}: run jobs/cold_refresh.py for a date"
        )
    row = max(rows.to_pylist(), key=lambda r: (r["refresh_date"], r["sequence"]))
    versions = {name: int(v) for name, v in json.loads(row["output_versions"]).items() if name in OUTPUTS}
    absent = sorted(set(OUTPUTS) - set(versions))
    if absent:
        raise NotPublishedError(f"run {row['run_id']} names no version of {absent} in `runs`: publish the night again")
    counts = json.loads(row["counts"])
    rows_of = counts.get("rows", {})
    return Published(
        row["run_id"], row["refresh_date"], row["sequence"], versions, rows_of, counts["space_version"], lake
    )


def previous(lake: Lake, before: date) -> Published | None:
    """The newest publication of a date before `before`; None if there is none."""
    try:
        return latest(lake, before - timedelta(days=1))
    except NotPublishedError:
        return None


def require_remakable(night: Run, row: dict[str, Any]) -> None:
    """The staged snapshot of `night`, which was removed, can be made again as it was, with the settings of `night`.

    Args:
        row: conf_hash and code_version of what the night published.

    Raises:
        NotPublishedError: it would be another one, since the settings, the code or the input tables are others.
    """
    gone = f"the staged snapshot of run {night.run_id} is gone (keep_runs), and"
    if (row["conf_hash"], row["code_version"]) != (night.settings.digest(), code_version()):
        raise NotPublishedError(
            f"{gone} to make it again its own settings and code are needed: name the --conf and --set of that night (code "
            f"{row['code_version']}), or run the night again"
        )
    if not has_its_inputs(night):
        raise NotPublishedError(
            f"{gone} it cannot be made again: an input table was made anew since, or has no longer the version that the run "
            f"pinned ({night.input_versions}). Name a later night"
        )


def recommend(published: Published, user_id: str | None, top: int, *, use_index: bool = False) -> dict[str, Any]:
    """The `top` items of a user by inner product, best first (ties by id), as a ranker would take them.

    Args:
        user_id: None for the first user of the table.
        use_index: ask the exported FAISS index instead of multiplying with every item.

    Returns:
        run_id, refresh_date, space_version, rows of the three tables, user_id, items: [{item_id, score, cold, source}].

    Raises:
        NotPublishedError: the user has no vector tonight, or the tables are not of one run.
    """
    sampled, items, users = published.sampled_interactions(), published.item_embeddings(), published.user_embeddings()
    position = 0 if user_id is None else pc.index(users["user_id"], user_id).as_py()
    if position < 0 or users.num_rows == 0:
        raise NotPublishedError(
            f"user {user_id!r} has no vector among the {users.num_rows} of {published.refresh_date} "
            f"(run {published.run_id}): it is unknown, or `rejected_rows` says why it has none"
        )
    user = users.slice(position, 1)
    vector = from_column(user["embedding"])[0]
    ids = items["item_id"].to_pylist()
    if use_index:
        best = item_index.load(published.lake, published.run_id).search(vector, top)
    else:
        scores = from_column(items["embedding"]) @ vector
        best = [(ids[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top]]
    source = dict(zip(ids, items["source"].to_pylist(), strict=True))
    return {
        "run_id": published.run_id,
        "refresh_date": published.refresh_date.isoformat(),
        "space_version": published.space_version,
        "versions": published.versions,
        "rows": {
            "sampled_interactions": sampled.num_rows,
            "item_embeddings": items.num_rows,
            "user_embeddings": users.num_rows,
        },
        "user_id": user["user_id"][0].as_py(),
        "items": [
            {"item_id": item, "score": round(score, 6), "cold": source[item] in _COLD, "source": source[item]}
            for item, score in best
        ],
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_lake(parser)
    parser.add_argument(
        "--date", help="YYYY-MM-DD: the newest publication of this date or before; the newest if left out"
    )
    parser.add_argument("--user", help="user id; the first user if left out")
    parser.add_argument("--top", type=int, default=10, help="how many items (default: %(default)s)")
    parser.add_argument("--index", action="store_true", help="search the exported FAISS index")
    args = parser.parse_args(argv)
    if args.top < 1:
        parser.error(f"--top is {args.top}: at least 1")

    def job() -> dict[str, Any]:
        published = latest(cli.lake(args), parse_run_date(args.date, "--date") if args.date else None)
        answer = recommend(published, args.user, args.top, use_index=args.index)
        log(f"run {answer['run_id']} of {answer['refresh_date']}: the best items for user {answer['user_id']}")
        for rank, item in enumerate(answer["items"], 1):
            log(f"{rank:4}  {item['score']:9.4f}  {'cold' if item['cold'] else '    '}  {item['item_id']}")
        return answer

    return cli.main(job)


if __name__ == "__main__":
    sys.exit(main())
