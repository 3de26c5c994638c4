"""Format `movielens`: a folder or zip of any release (100k, 1M, 10M, 20M, 25M, 32M, latest, latest-small).

A rating is an interaction with the rating as its weight. An item's text is its genres; tags are never read: people gave
them after they had seen the film.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from jobs.formats import delimited
from jobs.formats.contract import FormatError, Request, TableSource, Tally, need, text_batch
from jobs.formats.files import SourceFile, decoded, lines

OPTIONS = ()
_RATING = ["user_id", "item_id", "weight", "event_time"]
# Used where a 100k release comes without its u.genre; the order of the flags in u.item.
# fmt: off
_GENRES_100K = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on
_ROWS = 4096


def open_source(request: Request) -> dict[str, TableSource]:
    """Raises FormatError if there is no release of MovieLens at `--source`."""
    source = request.folder("a folder or zip of a MovieLens release, such as ml-25m or ml-25m.zip")
    found = _members(source)
    if {"u.data", "u.item"} <= set(found):
        genres = _genres(found.get("u.genre"))
        ratings = _ratings(found["u.data"], "\t")
        films = (found["u.item"], *([found["u.genre"]] if "u.genre" in found else []))
        items = TableSource(films, partial(_lines, found["u.item"], partial(_item_100k, genres)))
    elif {"ratings.dat", "movies.dat"} <= set(found):
        ratings = _ratings(found["ratings.dat"], "::")
        items = TableSource((found["movies.dat"],), partial(_lines, found["movies.dat"], _item_dat))
    elif {"ratings.csv", "movies.csv"} <= set(found):
        ratings = _ratings_csv(found["ratings.csv"])
        items = TableSource((found["movies.csv"],), partial(_items_csv, found["movies.csv"]))
    else:
        raise FormatError(
            f"{source} is no MovieLens release: expected u.data and u.item (100k), ratings.dat and movies.dat (1M, 10M) or "
            f"ratings.csv and movies.csv (20M and later); found {sorted(found)[:20]}"
        )
    return {"interactions": ratings, "items": items}


def _members(source: Path) -> dict[str, SourceFile]:
    """File name -> file, of the folder or zip, or of the only folder in it that holds a release."""
    if source.is_dir():
        files = [p for pattern in ("*", "*/*") for p in sorted(source.glob(pattern)) if p.is_file()]
        found = {p.name: SourceFile(p) for p in reversed(files)}
        return found
    if not zipfile.is_zipfile(source):
        raise FormatError(f"{source} is neither a folder nor a zip file")
    with zipfile.ZipFile(source) as archive:
        names = [i.filename for i in archive.infolist() if not i.is_dir() and "__MACOSX" not in i.filename]
    return {name.rsplit("/", 1)[-1]: SourceFile(source, name) for name in reversed(names)}


def _ratings(file: SourceFile, delimiter: str) -> TableSource:
    def read(tally: Tally) -> Iterator[pa.RecordBatch]:
        wanted = {name: name for name in _RATING}
        yield from map(
            _rated, delimited.read(file, _RATING, wanted, tally, delimiter=delimiter, has_header=False, quoted=False)
        )

    return TableSource((file,), read)


def _ratings_csv(file: SourceFile) -> TableSource:
    names = delimited.header(file, ",")
    wanted = dict(zip(_RATING, ["userId", "movieId", "rating", "timestamp"], strict=True))
    need(file.name, names, wanted.values())

    def read(tally: Tally) -> Iterator[pa.RecordBatch]:
        yield from map(_rated, delimited.read(file, names, wanted, tally))

    return TableSource((file,), read)


def _rated(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.append_column("event_type", pa.array(["rating"] * batch.num_rows))


def _genres(file: SourceFile | None) -> list[str]:
    if file is None:
        return _GENRES_100K
    pairs = [line.decode("latin-1").split("|") for line in lines(file)]
    named = {int(pair[1]): pair[0] for pair in pairs if len(pair) == 2 and re.fullmatch("[0-9]{1,3}", pair[1])}
    return [named.get(i, "unknown") for i in range(max(named, default=-1) + 1)]


# Of items, 10M is UTF-8; 100k and 1M are Latin-1.
def _item_100k(genres: list[str], line: bytes) -> tuple[str, str, str] | None:
    fields = decoded(line).split("|")
    if len(fields) != 5 + len(genres):
        return None
    flagged = [genre for genre, flag in zip(genres, fields[5:], strict=True) if flag == "1"]
    return fields[0], fields[1], "|".join(flagged)


def _item_dat(line: bytes) -> tuple[str, str, str] | None:
    # A title may hold "::" itself.
    match = re.fullmatch(r"(.*?)::(.*)::(.*)", decoded(line))
    return (match[1], match[2], match[3]) if match else None


def _lines(
    file: SourceFile, parse: Callable[[bytes], tuple[str, str, str] | None], tally: Tally
) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[str, str, str]] = []
    for line in lines(file):
        tally.rows_in += 1
        row = parse(line)
        if row is None:
            tally.reject("unparseable_line", decoded(line))
            continue
        rows.append(row)
        if len(rows) == _ROWS:
            yield _items(rows)
            rows = []
    if rows:
        yield _items(rows)


def _items(rows: list[tuple[str, str, str]]) -> pa.RecordBatch:
    described = [(item, title.strip(), _genre_text(genres)) for item, title, genres in rows]
    return text_batch(described, ["item_id", "title", "text"])


def _genre_text(genres: str) -> str:
    """`Animation|Children's` -> `Animation, Children's`."""
    named = [g.strip() for g in genres.split("|")]
    return ", ".join(g for g in named if g and g not in ("(no genres listed)", "unknown"))


def _items_csv(file: SourceFile, tally: Tally) -> Iterator[pa.RecordBatch]:
    names = delimited.header(file, ",")
    wanted = {"item_id": "movieId", "title": "title", "text": "genres"}
    need(file.name, names, wanted.values())
    for batch in delimited.read(file, names, wanted, tally):
        # Genres are ASCII; what is not stays as it is, and cleaning rejects it.
        genres = [g and _genre_text(g.decode("utf-8", "surrogateescape")) for g in batch.column("text").to_pylist()]
        coded = [g and g.encode("utf-8", "surrogateescape") for g in genres]
        yield batch.set_column(2, "text", pa.array(coded, pa.binary()))
