"""Remove trained parts, cached rows and staged files that no night will read again.

    python -m jobs.prune --lake ./lake --keep-days 70 --dry-run

A night removes the staged files and the index of published nights, except those of the newest keep_runs, and of earlier runs of
its date that never published. What is trained (spaces, models, A-LLMRec's parts), what a training or a night that was given up
left half done, what training runs staged and the indexes of nights that were withdrawn stay until this command. It keeps
- what was trained in the `keep_days` days before the newest published night, or later;
- what `runs` says that the nights of these days used, and older nights of which something is still staged (they wait to be
  measured), what a staged stage says that it used, and what all that is built on;
- what was changed less than `keep_days` days ago by the clock, where no date is written.

Of the cache `text_embeddings` it deletes what stands under a model that is not kept, and under one that is, the texts that no
staged snapshot has any more; of `item_scores`, what no unfinished run and no night of the newest week names. A night that is run
or measured again encodes and scores what it lacks then: to delete too much costs time, and changes nothing.
What stays of them, and the rows of `runs`, it puts together in fewer files; of the caches, files that no version of the last week
has go too. The other tables are as any Delta tables: their old partitions and versions are their owner's (DELETE, VACUUM). A
night of before these days that is run again trains, encodes and scores anew. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from pyarrow import fs

from jobs import cli, text_embeddings
from jobs.lake import Lake, where
from jobs.run import KINDS, STAGES, is_run_id, log
from jobs.settings import SettingsError
from jobs.staging import Staging
from schemas.table import table as schema
from udfs.filesystems import located
from udfs.ids import Places

# A scoring's version is of one list of users: on most lakes a few nights have the same, and no later one asks for it again.
_SCORES_DAYS = 7
_CACHE_HOURS = 7 * 24
# A space stands on its own once it is rotated onto the one before; what a run could have chosen is more than what it used.
_NOT_USED = {"aligned_to", "known"}


@dataclass(frozen=True)
class Part:
    """A trained part, at _artifacts/<kind>/<version>; facts: None unless it is complete."""

    kind: str
    version: str
    folder: Staging
    facts: dict[str, Any] | None


def prune(lake: Lake, keep_days: int, now: datetime, *, dry_run: bool = False) -> dict[str, Any]:
    """Remove what the module says, or with `dry_run` only name it; how many of each kind, and their bytes.

    Raises:
        SettingsError: keep_days is less than 1, or there is no such lake.
    """
    if keep_days < 1:
        raise SettingsError(f"--keep-days is {keep_days}: at least the newest day must be kept")
    filesystem, root = located(lake.uri)
    if filesystem.get_file_info(root).type != fs.FileType.Directory:
        raise SettingsError(f"--lake {lake.uri}: there is no such folder")
    rows = lake.read("runs", columns=["refresh_date", "sequence", "run_id", "stage", "counts"]).to_pylist()
    published = [(r["refresh_date"], r["sequence"], r["run_id"]) for r in rows if r["stage"] == "publish"]
    summary: dict[str, Any] = {"lake": lake.uri, "dry_run": dry_run, "removed": {}, "bytes": 0}
    if not published:
        log("nothing is published: nothing is removed")
        return summary
    newest, _, newest_run = max(published)
    since, changed_since = newest - timedelta(days=keep_days), now - timedelta(days=keep_days)
    parts = list(_parts(lake))
    dates = {run_id: refresh_date for refresh_date, _, run_id in published}
    staged = _runs(lake, "_staging")
    abandoned = [name for name, folder in staged.items() if name not in dates and folder.changed() < changed_since]
    waiting = set(staged) - set(abandoned)
    said = _said(rows, since, {name: staged[name] for name in waiting})
    scored_since = max(since, newest - timedelta(days=_SCORES_DAYS))
    scored = _said(rows, scored_since, {name: staged[name] for name in waiting - dates.keys()})
    kept = _kept(parts, said, since, changed_since)

    removed = [(part.kind, part.folder) for part in parts if part.facts is not None and part.version not in kept]
    removed += [
        (part.kind, part.folder) for part in parts if part.facts is None and part.folder.changed() < changed_since
    ]
    removed += [("staged runs", staged[name]) for name in abandoned]
    removed += [
        ("indexes", folder)
        for name, folder in _runs(lake, "_index").items()
        if name not in waiting and dates.get(name, date.min) < since and folder.changed() < changed_since
    ]
    named = set(_strings([*said, *(part.facts for part in parts if part.version in kept)]))
    # At once: a night that is running may take up a part until then.
    for kind, folder in removed:
        size = sum(info.size for info in _files(folder))
        log(f"{'would remove' if dry_run else 'removing'} {folder.uri} ({kind}, {size / 2**20:.1f} MiB)")
        if not dry_run:
            folder.clear()
        summary["removed"][kind] = summary["removed"].get(kind, 0) + 1
        summary["bytes"] += size
    named = {version for one in named for version in one.split("+")}
    _prune_texts(lake, newest_run, set(abandoned), named, summary)
    _prune_cache(lake, "text_embeddings", named, changed_since, summary)
    changed_since = max(changed_since, now - timedelta(days=_SCORES_DAYS))
    _prune_cache(lake, "item_scores", set(_strings(scored)), changed_since, summary)
    if not dry_run:  # eleven files a night, which every reader reads
        _compact("runs", lake.table("runs"))
    told = ", ".join(f"{number} {kind}" for kind, number in summary["removed"].items()) or "nothing"
    log(f"{told}, {summary['bytes'] / 2**20:.1f} MiB; kept is what nights since {since} need")
    return summary


def _runs(lake: Lake, place: str) -> dict[str, Staging]:
    """The folders of runs in `place`; what has another form of name is not this project's."""
    names = filter(is_run_id, Staging(lake.path(place)).children())
    return {name: Staging(lake.path(f"{place}/{name}")) for name in names}


def _parts(lake: Lake) -> Iterator[Part]:
    for kind in sorted(KINDS):
        for version in Staging(lake.path(f"_artifacts/{kind}")).children():
            folder = Staging(lake.path(f"_artifacts/{kind}/{version}"))
            yield Part(kind, version, folder, folder.facts() if folder.is_complete() else None)


def _said(rows: list[dict[str, Any]], since: date, staged: dict[str, Staging]) -> list[Any]:
    """What the `rows` of `runs` say of the days from `since` on and of the runs `staged`, and what these runs' stages say."""
    said = [json.loads(row["counts"]) for row in rows if row["refresh_date"] >= since or row["run_id"] in staged]
    for _, folder in sorted(staged.items()):
        stages = (Staging(folder.path(stage)) for stage in folder.children())
        said += [stage.facts() for stage in stages if stage.is_complete()]
    return said


def _kept(parts: list[Part], said: list[Any], since: date, changed_since: datetime) -> set[str]:
    """Versions of complete parts that are young (by date or, as a backfill's, by the clock), or named by `said` (JSON), and of
    all that these name in turn.
    """
    facts = {part.version: part.facts for part in parts if part.facts is not None}
    pending = {version for version, own in facts.items() if date.fromisoformat(own["trained_on"]) >= since}
    pending |= {part.version for part in parts if part.facts is not None and part.folder.changed() >= changed_since}
    pending |= facts.keys() & {name for one in said for name in _strings(one)}
    kept: set[str] = set()
    while pending:
        kept |= pending
        pending = facts.keys() & {name for version in pending for name in _strings(facts[version])} - kept
    return kept


def _strings(value: Any) -> Iterator[str]:
    """All strings in JSON, but those under a key of _NOT_USED."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key not in _NOT_USED:
                yield from _strings(one)


def _prune_cache(lake: Lake, name: str, named: set[str], changed_since: datetime, summary: dict[str, Any]) -> None:
    """Delete the partitions of a cache that are neither `named` nor young, and add them to the summary; compact what is named."""
    if not lake.exists(name):
        return
    (key,), delta = schema(name).partition_by, lake.table(name)
    files = pa.table(delta.get_add_actions(flatten=True)).group_by(f"partition.{key}")
    sizes = files.aggregate([("size_bytes", "sum"), ("modification_time", "max")]).to_pylist()
    old = {
        str(one[f"partition.{key}"]): one["size_bytes_sum"]
        for one in sizes
        if one[f"partition.{key}"] not in named and one["modification_time_max"] < 1000 * changed_since.timestamp()
    }
    for version, size in sorted(old.items()):
        log(f"{'would delete' if summary['dry_run'] else 'deleting'} {version} from {name} ({size / 2**20:.1f} MiB)")
        summary["removed"][name] = summary["removed"].get(name, 0) + 1
        summary["bytes"] += size
    if summary["dry_run"]:
        return
    if old:
        delta.delete(where(key, sorted(old)))
    # A file a shard and night. What no night names any more is left to grow old: a file that is written anew is young.
    stays = sorted({str(one[f"partition.{key}"]) for one in sizes} & named)
    if stays:
        _compact(name, delta, [(key, "in", stays)])
    # Nobody reads a cache at an older version than that of the stage which is running.
    delta.vacuum(retention_hours=_CACHE_HOURS, dry_run=False)


def _prune_texts(lake: Lake, newest: str, abandoned: set[str], named: set[str], summary: dict[str, Any]) -> None:
    """Delete, under the versions that are `named`, the texts that no staged snapshot has, and add them to the summary; nothing
    where the snapshot of `newest`, the last run that published, is gone.

    No file's age counts: when files are put together, all rows of a version come into a young one.
    """
    name = text_embeddings.TABLE
    if not lake.exists(name):
        return
    # First the table, then the snapshots: a run stages its own before it encodes.
    delta = lake.table(name)
    staged = {run_id: Staging(run.path(STAGES[0])) for run_id, run in _runs(lake, "_staging").items()}
    snapshots = {run_id: one for run_id, one in staged.items() if run_id not in abandoned and one.is_complete()}
    if newest not in snapshots:
        log(f"the snapshot of {newest}, the newest published run, is gone: no text of a model in use is deleted")
        return
    wanted = pa.array([], pa.large_string())
    for one in snapshots.values():
        shas = one.read("items_labelled", ["text_sha256"])["text_sha256"].cast(pa.large_string())
        wanted = pc.unique(pa.chunked_array([wanted, *shas.drop_null().chunks]))
    places, at, files = Places(wanted), delta.version(), pa.table(delta.get_add_actions(flatten=True))
    sizes = files.group_by("partition.model_version").aggregate([("size_bytes", "sum")]).to_pylist()
    for model, size in sorted((str(one["partition.model_version"]), one["size_bytes_sum"]) for one in sizes):
        if model not in named:
            continue
        rows, found = 0, []
        for batch in lake.batches(name, columns=["text_sha256"], version=at, model_version=model):
            rows += batch.num_rows
            found += batch["text_sha256"].filter(pa.array(places(batch["text_sha256"]) < 0)).chunks
        gone = pa.chunked_array(found, pa.string())
        if not len(gone):
            continue
        part = size * len(gone) // rows
        told = f"{len(gone)} of {rows} texts of {model} from {name} ({part / 2**20:.1f} MiB)"
        log(f"{'would delete' if summary['dry_run'] else 'deleting'} {told}")
        if summary["dry_run"] or _delete_texts(delta, model, pc.unique(gone)):
            summary["removed"]["texts"] = summary["removed"].get("texts", 0) + len(gone)
            summary["bytes"] += part


def _delete_texts(delta: DeltaTable, model: str, gone: pa.Array) -> bool:
    """Delete the rows of a model with these hashes, unless another writer has changed its rows; whether it did."""
    # A predicate of many values overflows the stack of delta-rs; a join does not, and streams the vectors.
    same = f"{where('model_version', model)} AND there.text_sha256 = gone.text_sha256"
    merger = delta.merge(pa.table({"text_sha256": gone}), same, source_alias="gone", target_alias="there")
    try:
        merger.when_matched_delete().execute()
    except CommitFailedError:
        log(f"another writer changed `{text_embeddings.TABLE}`: texts of {model} are deleted next time")
        return False
    return True


def _compact(name: str, delta: DeltaTable, partitions: list[tuple[str, str, Any]] | None = None) -> None:
    """Put the small files of the table, or of these partitions, together."""
    try:
        delta.optimize.compact(partition_filters=partitions)
    except CommitFailedError:
        log(f"another writer changed `{name}`: its files are put together next time")


def _files(folder: Staging) -> list[fs.FileInfo]:
    filesystem, root = located(folder.uri)
    found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return [info for info in found if info.type == fs.FileType.File]


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_lake(parser)
    parser.add_argument(
        "--keep-days",
        type=int,
        default=70,
        help="days before the newest published night whose parts are kept (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed")
    args = parser.parse_args(argv)
    return cli.main(lambda: prune(cli.lake(args), args.keep_days, datetime.now(UTC), dry_run=args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
