"""Ingest of the data sets' own layouts: small files written as each release has them, and the real ones where they are."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable

from jobs.formats.complete_journey import _describe
from tests.ingest_command import run

RATING_TIME = datetime(1997, 12, 4, 15, 55, 49, tzinfo=UTC)  # 881250949


def rows(lake: Path, table: str) -> list[tuple[Any, ...]]:
    read = DeltaTable(lake / table).to_pyarrow_table()
    return sorted((tuple(r.values()) for r in read.to_pylist()), key=str)


def ml_100k(folder: Path) -> None:
    (folder / "u.data").write_bytes(b"196\t1\t3\t881250949\n186\t2\t4\t881250949\nbroken line\n22\t2\tx\t881250949\n")
    flags = dict.fromkeys(range(19), "0")
    toy = "|".join({**flags, 3: "1", 4: "1", 5: "1"}.values())
    amelie = "|".join({**flags, 0: "1"}.values())
    text = f"1|Toy Story (1995)|01-Jan-1995||http://x|{toy}\n2|Misérables, Les (1995)|01-Jan-1995||http://x|{amelie}\n3|cut\n"
    (folder / "u.item").write_bytes(text.encode("latin-1"))


def ml_dat(encoding: str) -> Any:
    def write(folder: Path) -> None:
        (folder / "ratings.dat").write_bytes(
            b"196::1::3::881250949\n186::2::4::881250949\nbroken\n22::2::x::881250949\n"
        )
        text = (
            "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1995)::(no genres listed)\n3:cut\n"
        )
        (folder / "movies.dat").write_bytes(text.encode(encoding))
        (folder / "users.dat").write_bytes(b"1::F::1::10::48067\n")

    return write


def ml_csv(folder: Path) -> None:
    lines = [
        "userId,movieId,rating,timestamp",
        "196,1,3.0,881250949",
        "186,2,4.0,881250949",
        "broken",
        "22,2,x,881250949",
        "",
    ]
    (folder / "ratings.csv").write_bytes("\r\n".join(lines).encode())
    text = "movieId,title,genres\n1,Toy Story (1995),Animation|Children's|Comedy\n"
    text += '2,"Misérables, Les (1995)",(no genres listed)\n3\n'
    (folder / "movies.csv").write_bytes(text.encode())
    (folder / "tags.csv").write_bytes(b"userId,movieId,tag,timestamp\n1,1,leak,1\n")


@pytest.mark.parametrize("packed", ["folder", "zip"])
@pytest.mark.parametrize(
    "write", [ml_100k, ml_dat("latin-1"), ml_dat("utf-8"), ml_csv], ids=["100k", "1m", "10m", "25m"]
)
def test_movielens(tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Any, packed: str) -> None:
    source = tmp_path / "download"
    release = source / "ml-x"  # as in the zips: the release is a folder of its own
    release.mkdir(parents=True)
    write(release)
    if packed == "zip":
        with zipfile.ZipFile(tmp_path / "ml-x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in release.iterdir():
                archive.write(file, f"ml-x/{file.name}")
                archive.writestr(f"__MACOSX/ml-x/{file.name}", "no data")
        source = tmp_path / "ml-x.zip"
    status, facts, err = run(capsys, "movielens", "--source", source, "--lake", tmp_path / "lake")
    assert status == 0, err
    expected = {"rows_in": 4, "rows_out": 2, "rejected": {"bad_weight": 1, "unparseable_line": 1}}
    assert facts["interactions"] == {"status": "written", "version": 0, **expected}
    assert facts["items"] == {
        "status": "written",
        "version": 0,
        "rows_in": 3,
        "rows_out": 2,
        "rejected": {"unparseable_line": 1},
    }
    assert rows(tmp_path / "lake", "interactions") == [
        ("186", "2", RATING_TIME, "rating", 4.0, None),
        ("196", "1", RATING_TIME, "rating", 3.0, None),
    ]
    assert rows(tmp_path / "lake", "items") == [
        ("1", "Toy Story (1995)", "Animation, Children's, Comedy", None),
        ("2", "Misérables, Les (1995)", None, None),
    ]


def test_movielens_zip_and_folder_are_the_same_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "ml-latest-small"
    release.mkdir()
    ml_csv(release)
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for file in release.iterdir():
            archive.write(file, f"ml-latest-small/{file.name}")
    assert run(capsys, "movielens", "--source", release, "--lake", tmp_path / "lake")[0] == 0
    status, facts, _ = run(capsys, "movielens", "--source", tmp_path / "ml.zip", "--lake", tmp_path / "lake")
    assert status == 0
    assert {t["status"] for t in facts.values()} == {"present"}


def test_movielens_sources_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    for source, message in (
        (tmp_path, "is no MovieLens release"),
        (tmp_path / "readme.txt", "neither a folder nor a zip"),
    ):
        status, _, err = run(capsys, "movielens", "--source", source, "--lake", tmp_path / "lake")
        assert status == 1
        assert message in err
    ml_csv(tmp_path)
    with zipfile.ZipFile(tmp_path / "ml.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in ("ratings.csv", "movies.csv"):
            archive.write(tmp_path / name, name)
    damaged = (tmp_path / "ml.zip").read_bytes().replace(b"196,1,3.0", b"196,1,9.0")
    (tmp_path / "ml.zip").write_bytes(damaged)
    status, _, err = run(capsys, "movielens", "--source", tmp_path / "ml.zip", "--lake", tmp_path / "lake")
    assert status == 1
    assert "may be truncated or damaged" in err
    assert not (tmp_path / "lake" / "interactions" / "_delta_log").exists()


def amazon_2014(folder: Path) -> None:
    good = {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 881250949, "reviewText": "text"}
    reviews = [json.dumps(good), "{cut", json.dumps({**good, "reviewerID": None})]
    (folder / "reviews_Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(reviews).encode()))
    meta = [
        "{'asin': 'B1', 'title': \"Women's &amp; Co <b>Soap</b>\", 'brand': 'Acme', 'categories': [['Beauty', 'Bath']], "
        "'description': 'Soft soap', 'price': 3.5}",
        "{'asin': 'B2', 'categories': [['Beauty']]}",
        "__import__('os').system('true')",
    ]
    (folder / "meta_Beauty.json.gz").write_bytes(gzip.compress("\n".join(meta).encode()))


def amazon_2018(folder: Path) -> None:
    good = {
        "reviewerID": "A1",
        "asin": "B1",
        "overall": 5.0,
        "unixReviewTime": 881250949,
        "vote": "3",
        "style": {"a": "b"},
    }
    reviews = [json.dumps(good), "[1, 2]", json.dumps({**good, "reviewerID": {"no": "id"}})]
    (folder / "Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(reviews).encode()))
    product = {
        "asin": "B1",
        "title": "Women's &amp; Co <b>Soap</b>",
        "brand": "Acme",
        "category": ["Beauty", "Bath"],
        "main_cat": "Beauty",
        "description": ["Soft soap"],
        "feature": [],
        "details": {"x": 1},
    }
    meta = [json.dumps(product), json.dumps({"asin": "B2", "category": ["Beauty"], "description": []}), "{cut"]
    (folder / "meta_Beauty.json.gz").write_bytes(gzip.compress("\n".join(meta).encode()))


def amazon_2023(folder: Path) -> None:
    good = {"rating": 5.0, "asin": "V9", "parent_asin": "B1", "user_id": "A1", "timestamp": 881250949000, "images": []}
    reviews = [json.dumps(good), "", "{} {}", json.dumps({**good, "user_id": None})]
    (folder / "All_Beauty.jsonl").write_text("\n".join(reviews))
    product = {
        "main_category": "Beauty",
        "title": "Women's & Co Soap",
        "features": [],
        "description": ["Soft soap"],
        "store": "Shop",
        "categories": ["Bath"],
        "details": {"Brand": "Acme"},
        "parent_asin": "B1",
    }
    meta = [json.dumps(product), json.dumps({"parent_asin": "B2", "main_category": "Beauty", "title": None}), '{"a": 1']
    (folder / "meta_All_Beauty.jsonl").write_text("\n".join(meta))


@pytest.mark.parametrize("write", [amazon_2014, amazon_2018, amazon_2023])
def test_amazon_reviews(tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Any) -> None:
    source = tmp_path / "amazon"
    source.mkdir()
    write(source)
    status, facts, err = run(capsys, "amazon-reviews", "--source", source, "--lake", tmp_path / "lake")
    assert status == 0, err
    expected = {"rows_in": 3, "rows_out": 1, "rejected": {"null_user_id": 1, "unparseable_line": 1}}
    assert facts["interactions"] == {"status": "written", "version": 0, **expected}
    assert rows(tmp_path / "lake", "interactions") == [("A1", "B1", RATING_TIME, "review", 5.0, None)]
    assert facts["items"]["rejected"] == {"unparseable_line": 1}
    assert rows(tmp_path / "lake", "items") == [
        ("B1", "Women's & Co Soap", "Acme. Beauty, Bath. Soft soap.", None),
        ("B2", None, "Beauty.", None),
    ]


def test_amazon_reviews_fast_and_careful_parsing_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"user_id": f"u{i}", "parent_asin": "B1", "rating": 4.5, "timestamp": 10**12 + i}).encode()
        for i in range(5000)
    ]
    (tmp_path / "meta.jsonl").write_text('{"parent_asin": "B1", "title": "Soap"}')
    bad = [
        b'{"user_id": "\xff", "parent_asin": "B1"}',
        b'{"user_id": "\\ud800", "parent_asin": "B1"}',
        b'{"user_id": "x"}',
    ]
    for name, body in (("fast", lines), ("careful", [*lines, *bad])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(body))
        named = ["--interactions", tmp_path / f"{name}.jsonl", "--items", tmp_path / "meta.jsonl"]
        status, facts, err = run(capsys, "amazon-reviews", *named, "--lake", tmp_path / name)
        assert status == 0, err
    assert facts["interactions"]["rejected"] == {"broken_utf8": 2, "null_item_id": 1}
    assert rows(tmp_path / "fast", "interactions") == rows(tmp_path / "careful", "interactions")
    assert len(rows(tmp_path / "fast", "interactions")) == 5000


def test_amazon_reviews_that_are_cut_or_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "amazon"
    source.mkdir()
    amazon_2014(source)
    whole = (source / "reviews_Beauty_5.json.gz").read_bytes()
    (source / "reviews_Beauty_5.json.gz").write_bytes(whole[:-12])
    status, _, err = run(capsys, "amazon-reviews", "--source", source, "--lake", tmp_path / "lake")
    assert status == 1
    assert "reviews_Beauty_5.json.gz cannot be read to its end" in err
    (source / "reviews_Beauty_5.json.gz").unlink()
    status, _, err = run(capsys, "amazon-reviews", "--source", source, "--lake", tmp_path / "lake")
    assert status == 1
    assert "has ['items']" in err
    assert not (tmp_path / "lake").exists()


def test_citeulike_as_released(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "users.dat").write_bytes(b"2 0 1\n1 1\n3 0 1\n1 x\n")
    head = '"doc.id","title","citeulike.id","raw.title","raw.abstract"\n'
    papers = head + '1,"metabolic",9,"The metabolic world","An abstract, with\na ""break"""\n'
    papers += '2,"caf",8,"Café","n/a"\nx,"a",1,"b","c"\n'
    (tmp_path / "raw-data.csv").write_bytes(papers.encode("latin-1"))
    status, facts, err = run(capsys, "citeulike", "--source", tmp_path, "--lake", tmp_path / "lake")
    assert status == 0, err
    assert facts["interactions"]["rejected"] == {"unparseable_line": 2}
    assert [r[:2] for r in rows(tmp_path / "lake", "interactions")] == [("0", "0"), ("0", "1"), ("1", "1")]
    assert rows(tmp_path / "lake", "items") == [
        ("0", "The metabolic world", 'An abstract, with\na "break"', None),
        ("1", "Café", "n/a", None),
    ]
    assert facts["items"]["rejected"] == {"unparseable_line": 1}


def test_citeulike_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "citeulike", "--source", tmp_path, "--lake", tmp_path / "lake")
    assert status == 1
    assert "holds no citeulike-a" in err


def test_citeulike_parquet_with_its_split_and_without_its_tags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path
) -> None:
    status, facts, err = run(capsys, "citeulike", "--source", shared_data / "citeulike-a", "--lake", tmp_path / "lake")
    assert status == 0, err
    assert {t: (f["rows_in"], f["rows_out"]) for t, f in facts.items()} == {
        "items": (16_980, 16_980),
        "split": (204_986, 204_986),
        "interactions": (204_986, 204_986),
    }
    assert sorted(p.name for p in (tmp_path / "lake").iterdir()) == ["interactions", "items", "split"]
    items = DeltaTable(tmp_path / "lake" / "items").to_pyarrow_table()
    first = items.filter(pc.equal(items["item_id"], "0")).to_pylist()[0]
    assert first["title"] == "The metabolic world of Escherichia coli is not small"
    assert "wireing_digrams" not in first["text"]  # one of its tags


@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-games", "amazon-toys"])
def test_shared_parquet_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shared_data: Path, name: str
) -> None:
    maps = ["--map", "interactions.event_time=ts", "--map", "interactions.weight=rating"]
    status, facts, err = run(capsys, "parquet", "--source", shared_data / name, "--lake", tmp_path / "lake", *maps)
    assert status == 0, err
    assert all(f["rows_in"] == f["rows_out"] > 10_000 for f in facts.values())
    users = DeltaTable(tmp_path / "lake" / "interactions").to_pyarrow_table(columns=["user_id", "seq"])
    expected = {"amazon-beauty": 22_363, "amazon-games": 50_546, "amazon-toys": 19_412}
    assert pc.count_distinct(users["user_id"]).as_py() == expected[name]
    assert users["seq"].null_count == 0


def test_complete_journey_from_the_package_without_running_it(tmp_path: Path) -> None:
    # In a process of its own, so that what it imports can be told.
    code = (
        "import sys; from jobs import ingest; status = ingest.main(sys.argv[1:]); "
        "assert not [m for m in sys.modules if m.startswith('completejourney')]; sys.exit(status)"
    )
    lake = tmp_path / "lake"
    done = subprocess.run(
        [sys.executable, "-c", code, "complete-journey", "--lake", str(lake)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["tables"]
    assert facts["items"]["rows_in"] == 92_331
    assert facts["items"]["left_out"]["never_sold"] == 92_331 - facts["items"]["rows_out"]
    assert facts["interactions"]["rows_in"] == 1_469_307
    assert facts["interactions"]["rejected"] == {"weight_not_positive": 1_469_307 - facts["interactions"]["rows_out"]}
    assert "1,048,576 rows read" in done.stderr
    events = DeltaTable(lake / "interactions").to_pyarrow_table(columns=["user_id", "item_id", "event_time"])
    assert pc.count_distinct(events["user_id"]).as_py() == 2_469
    first, last = pc.min_max(events["event_time"]).as_py().values()
    assert (first.isoformat(), last.isoformat()) == ("2017-01-01T11:53:26+00:00", "2018-01-01T04:01:20+00:00")
    items = DeltaTable(lake / "items").to_pyarrow_table()
    sold, listed = set(events["item_id"].to_pylist()), set(items["item_id"].to_pylist())
    assert listed <= sold
    assert len(sold - listed) == 3  # sold, and in no product list
    assert items["title"].null_count == 0
    ice = items.filter(pc.equal(items["item_id"], "25671")).to_pylist()
    assert [(i["title"], i["text"]) for i in ice] == [
        ("Frozen ice: ice - crushed/cubed", "National brand; 22 lb; grocery")
    ]


def test_complete_journey_texts_are_readable() -> None:
    row = {
        "product_category": "REFRGRATD DOUGH PRODUCTS",
        "product_type": "REFRIGERATED SPECILATY ROLLS",
        "brand": "Private",
        "package_size": "R      2 OZ",
        "department": "DRUG GM",
    }
    expected = (
        "Refrigerated dough products: refrigerated specialty rolls",
        "Private brand; r 2 oz; drug general merchandise",
    )
    assert _describe(row) == expected
    empty = {**dict.fromkeys(row), "department": "MISCELLANEOUS"}
    assert _describe(empty) == ("Miscellaneous", "Miscellaneous")


def test_complete_journey_from_a_folder_that_lacks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "complete-journey", "--source", tmp_path, "--lake", tmp_path / "lake")
    assert status == 1
    assert "transactions.parquet" in err
