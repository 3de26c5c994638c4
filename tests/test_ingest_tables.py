"""Ingest of Parquet and CSV: columns, types, and what becomes of rows that do not fit."""

from __future__ import annotations

import bz2
import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs import ingest
from jobs.formats.files import BLOCK_BYTES
from schemas.table import table as schema
from tests.ingest_command import run


def rows(lake: Path, table: str) -> list[dict[str, Any]]:
    """By id: a Delta table has no order of its own."""
    read = DeltaTable(lake / table).to_pyarrow_table()
    assert read.schema.names == schema(table).arrow_schema.names
    key = "user_id" if "user_id" in read.schema.names else "item_id"
    return sorted(read.to_pylist(), key=lambda row: (row[key], str(row)))


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


def write_csv(folder: Path, interactions: bytes, items: bytes = b"item_id,title\na,Anchor\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "interactions.csv").write_bytes(interactions)
    (folder / "items.csv").write_bytes(items)
    return folder


def test_parquet_of_any_types_becomes_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    when = [datetime(2024, 1, 2, 3, 4, 5), None, datetime(2024, 1, 2)]
    events = pa.table(
        {
            "who": pa.array([1, 2, None], pa.int32()),
            "item_id": pa.array([7.0, 8.0, 9.0], pa.float64()),
            "ts": pa.array(when, pa.timestamp("ns")),
            "rating": pa.array([5, None, 1], pa.int8()),
            "kind": pa.array(["view", "buy", "view"]).dictionary_encode(),
        }
    )
    pq.write_table(events, source / "interactions.parquet")
    parts = source / "items"
    parts.mkdir()
    for number in (7, 8):
        item = {"item_id": pa.array([str(number)], pa.large_string()), "text": [f"text {number}"]}
        pq.write_table(pa.table(item), parts / f"part-{number}.parquet")
    pairs = {"user_id": ["1"], "item_id": ["7"], "part": ["train"]}
    pq.write_table(pa.table(pairs), source / "split.parquet")
    maps = ["user_id=who", "event_time=ts", "weight=rating", "event_type=kind"]
    options = [o for m in maps for o in ("--map", f"interactions.{m}")]
    status, facts, err = run(capsys, "parquet", "--source", source, "--lake", tmp_path / "lake", *options)
    assert status == 0, err
    assert facts["interactions"]["rejected"] == {"null_user_id": 1}
    assert (facts["interactions"]["rows_in"], facts["interactions"]["rows_out"]) == (3, 2)
    first, second = rows(tmp_path / "lake", "interactions")
    assert first == {
        "user_id": "1",
        "item_id": "7",
        "event_time": utc(2024, 1, 2, 3, 4, 5),
        "event_type": "view",
        "weight": 5.0,
        "seq": None,
    }
    assert (second["event_time"], second["weight"]) == (None, None)
    assert [(r["item_id"], r["title"], r["text"]) for r in rows(tmp_path / "lake", "items")] == [
        ("7", None, "text 7"),
        ("8", None, "text 8"),
    ]
    assert rows(tmp_path / "lake", "split") == [{"user_id": "1", "item_id": "7", "part": "train"}]
    types = DeltaTable(tmp_path / "lake" / "interactions").to_pyarrow_table().schema
    assert types.field("event_time").type == pa.timestamp("us", tz="UTC")


def test_bad_csv_lines_are_rejected_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        b"user_id,item_id,event_time,weight,seq",
        b"u1,a,2024-01-02,1,0",
        b"u1,a",  # too few fields
        b"u1,a,2024-01-02,1,0,9",  # too many
        b"\xffu,a,2024-01-02,1,0",  # broken UTF-8 in an id
        b",a,2024-01-02,1,0",  # no user
        b"u2,,2024-01-02,1,0",  # no item
        b"u2,a,yesterday,1,0",
        b"u2,a,2024-01-02,much,0",
        b"u2,a,2024-01-02,nan,0",
        b"u2,a,2024-01-02,0,0",
        b"u2,a,2024-01-02,-3,0",
        b"u2,a,2024-01-02,1,1.5",
        b"",
        b"u3,a,2024-01-02T03:04:05.25+02:00,2.5,1.0\r",
        b'u4,"a",1704164645,,',
        b"u5,a,1704164645000,,7",
        b'u6,"a,2024-01-02,1,0',  # a quote that is never closed
        b"u7,a,,,",
    ]
    source = write_csv(tmp_path / "in", b"\n".join(lines))
    status, facts, err = run(capsys, "csv", "--source", source, "--lake", tmp_path / "lake")
    assert status == 0, err
    assert facts["interactions"] == {
        "status": "written",
        "version": 0,
        "rows_in": 17,
        "rows_out": 5,
        "rejected": {
            "bad_event_time": 1,
            "bad_seq": 1,
            "bad_weight": 2,
            "broken_utf8": 1,
            "null_item_id": 1,
            "null_user_id": 1,
            "unparseable_line": 3,
            "weight_not_positive": 2,
        },
    }
    assert [tuple(r.values()) for r in rows(tmp_path / "lake", "interactions")] == [
        ("u1", "a", utc(2024, 1, 2), None, 1.0, 0),
        ("u3", "a", utc(2024, 1, 2, 1, 4, 5, 250000), None, 2.5, 1),
        ("u4", "a", utc(2024, 1, 2, 3, 4, 5), None, None, None),
        ("u5", "a", utc(2024, 1, 2, 3, 4, 5), None, None, 7),
        ("u7", "a", None, None, None, None),
    ]
    # Examples for a person, among them the bytes that are no UTF-8.
    assert "event_time='yesterday'" in err
    assert "xffu" in err


def test_quoted_fields_hold_newlines_delimiters_and_long_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 2_100_000  # 10.5 MB: more than a block
    body = 'item_id;title;text\n1;"a ""quoted""; one";"two\nlines"\n2;plain;"' + long + '"\n3;"open\n4;d;\n'
    (tmp_path / "items.csv.gz").write_bytes(gzip.compress(body.encode(), 1))
    (tmp_path / "e.csv.bz2").write_bytes(bz2.compress(b"user_id;item_id\nu;1\n"))
    args = ["--items", tmp_path / "items.csv.gz", "--interactions", tmp_path / "e.csv.bz2", "--delimiter", ";"]
    status, facts, err = run(capsys, "csv", *args, "--lake", tmp_path / "lake")
    assert status == 0, err
    assert facts["items"]["rejected"] == {"unparseable_line": 1}
    read = rows(tmp_path / "lake", "items")
    assert [(r["item_id"], r["title"]) for r in read] == [("1", 'a "quoted"; one'), ("2", "plain"), ("4", "d")]
    assert [r["text"] for r in read] == ["two\nlines", long, None]


def test_a_quoted_record_that_spans_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The quote opens before the end of the first block of 2 MB, and closes in the next one.
    filler = b"".join(b"%d,title %d\n" % (i, i) for i in range(90_000))
    record = b'x,"' + b"line\n" * 100_000 + b'end"\nlast,one\n'
    source = write_csv(tmp_path / "in", b"user_id,item_id\nu,x\n", b"item_id,title\n" + filler + record)
    assert len(filler) < BLOCK_BYTES < len(filler) + len(record)
    status, facts, err = run(capsys, "csv", "--source", source, "--lake", tmp_path / "lake")
    assert status == 0, err
    assert (facts["items"]["rows_in"], facts["items"]["rejected"]) == (90_002, {})
    titles = {r["item_id"]: r["title"] for r in rows(tmp_path / "lake", "items") if not r["item_id"].isdigit()}
    assert titles == {"x": "line\n" * 100_000 + "end", "last": "one"}


def test_fast_and_careful_parsing_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = b"".join(b"u%d,a,%d,%d.5\r\n" % (i, 1_600_000_000 + i, i) for i in range(20_000))
    head = b"user_id,item_id,event_time,weight\n"
    for name, body in (("plain", plain), ("quoted", plain.replace(b",a,", b',"a",'))):
        source = write_csv(tmp_path / name, head + body)
        assert run(capsys, "csv", "--source", source, "--lake", tmp_path / f"lake-{name}")[0] == 0
    assert rows(tmp_path / "lake-plain", "interactions") == rows(tmp_path / "lake-quoted", "interactions")
    assert len(rows(tmp_path / "lake-plain", "interactions")) == 20_000


def test_broken_utf8_in_a_parquet_string_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    bytes_ = pa.array([b"fine", b"br\xffken", b"also fine"])
    titles = pa.StringArray.from_buffers(3, bytes_.buffers()[1], bytes_.buffers()[2])
    pq.write_table(pa.table({"item_id": ["1", "2", "3"], "title": titles}), source / "items.parquet")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["1"]}), source / "interactions.parquet")
    status, facts, err = run(capsys, "parquet", "--source", source, "--lake", tmp_path / "lake")
    assert status == 0, err
    assert facts["items"]["rejected"] == {"broken_utf8": 1}
    assert [r["title"] for r in rows(tmp_path / "lake", "items")] == ["fine", "also fine"]


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        (None, "1704164645", utc(2024, 1, 2, 3, 4, 5)),
        (None, "1704164645000", utc(2024, 1, 2, 3, 4, 5)),
        (None, "1704164645000000", utc(2024, 1, 2, 3, 4, 5)),
        (None, "1704164645000000000", utc(2024, 1, 2, 3, 4, 5)),
        (None, "1704164645.5", utc(2024, 1, 2, 3, 4, 5, 500000)),
        ("ms", "86400000", utc(1970, 1, 2)),
        ("s", "9999999999999", None),  # no such year
        (None, "2024-02-30", None),
        (None, "inf", None),
        (None, "2024-01-02 03:04:05", utc(2024, 1, 2, 3, 4, 5)),
        (None, "2024-01-02T03:04:05Z", utc(2024, 1, 2, 3, 4, 5)),
    ],
)
def test_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str | None, value: str, expected: datetime | None
) -> None:
    source = write_csv(tmp_path / "in", f"user_id,item_id,event_time\nu,a,{value}\nu,a,\n".encode())
    options = ["--time-unit", unit] if unit else []
    status, facts, err = run(capsys, "csv", "--source", source, "--lake", tmp_path / "lake", *options)
    assert status == 0, err
    times = [r["event_time"] for r in rows(tmp_path / "lake", "interactions")]
    assert set(times) == ({expected, None} if expected else {None})
    assert facts["interactions"]["rejected"] == ({} if expected else {"bad_event_time": 1})


def test_numbers_in_parquet_that_are_no_times_or_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    events = {
        "user_id": pa.array([1.0, 2.5, 3.0, 4.0, 5.0]),  # 2.5 is no id
        "item_id": ["a"] * 5,
        "event_time": pa.array([1.7e9, 1.7e9, float("inf"), 1.7e9, None]),
        "weight": pa.array([1.0, 1.0, 1.0, float("nan"), 2.0]),
        "seq": pa.array([0.0, 0.0, 0.0, 0.0, float("nan")]),
    }
    pq.write_table(pa.table(events), source / "interactions.parquet")
    pq.write_table(pa.table({"item_id": ["a"], "title": ["t"]}), source / "items.parquet")
    status, facts, err = run(capsys, "parquet", "--source", source, "--lake", tmp_path / "lake")
    assert status == 0, err
    assert facts["interactions"]["rejected"] == {"bad_event_time": 1, "bad_user_id": 1, "bad_weight": 1}
    kept = [(r["user_id"], r["seq"]) for r in rows(tmp_path / "lake", "interactions")]
    assert kept == [("1", 0), ("5", None)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "interactions.event_time=when"], "no column 'when' for interactions.event_time; it has ['user_id'"),
        (["--map", "interactions.colour=x"], "'interactions' has no column 'colour'"),
        (["--map", "event_time=x"], "expected TABLE.COLUMN=NAME"),
        (["--delimiter", ";;"], "must be one character"),
        (["--delimiter", ";"], "has no column 'user_id' for interactions.user_id"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    source = write_csv(tmp_path / "in", b"user_id,item_id\nu,a\n")
    status, _, err = run(capsys, "csv", "--source", source, "--lake", tmp_path / "lake", *options)
    assert status == 1
    assert message in err
    assert not (tmp_path / "lake").exists()


def test_sources_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = tmp_path / "lake"

    def fails(message: str, *args: str | Path) -> None:
        status, _, err = run(capsys, *args, "--lake", lake)
        assert status == 1
        assert message in err
        assert not (lake / "interactions").exists()

    fails("no such source", "csv", "--source", tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails("no table in", "csv", "--source", empty)
    fails("no table named", "parquet")
    fails("is missing", "movielens")
    fails("does not know ['--map']", "movielens", "--source", empty, "--map", "items.title=x")
    source = write_csv(tmp_path / "in", b"user_id,item_id\n")
    fails("table 'interactions' would be empty: 0 rows read", "csv", "--source", source)
    write_csv(source, b"user_id,item_id\n,a\n,b\n")
    fails("2 rows read, none usable (2 null_user_id; for example user_id='None'", "csv", "--source", source)
    write_csv(source, b"")
    fails("is empty: it has not even a line of column names", "csv", "--source", source)
    write_csv(source, b"user_id,item_id,user_id\nu,a,u\n")
    fails("several columns called ['user_id']", "csv", "--source", source)
    (source / "interactions.tsv").write_bytes(b"user_id\titem_id\nu\ta\n")
    fails("several candidates for table 'interactions'", "csv", "--source", source)
    (source / "interactions.parquet").write_bytes(b"no Parquet")
    fails("is no readable Parquet file", "parquet", "--source", source)
    pq.write_table(pa.table({"user_id": [["u"]], "item_id": ["a"]}), source / "interactions.parquet")
    pq.write_table(pa.table({"item_id": ["a"], "title": ["t"]}), source / "items.parquet")
    fails(
        "interactions.user_id must be a string, and the source's column for it holds list",
        "parquet",
        "--source",
        source,
    )
    (source / "interactions.parquet").unlink()
    fails("has table 'interactions': name a file for each", "parquet", "--source", source)


def test_an_unknown_format_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ingest.main(["netflix", "--lake", "x"])
    err = capsys.readouterr().err
    assert "netflix" in err
    assert "movielens" in err
