"""Tries to lose rows, or to be led astray, in workbooks, archives, folders and texts; with bombs and bad names."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from metier.data import archives
from metier.data.lines import Row, Source
from metier.data.sources import describe_source, find_sources, read_columns, read_rows
from metier.errors import DataError
from metier.recipe import DataConfig
from tests.data.tiny_xlsx import xlsx

PLAIN = "text,label\n涨停,好\n跌停,坏\n"
ROWS = [{"text": "涨停", "label": "好"}, {"text": "跌停", "label": "坏"}]


def sources_of(path: Path, raw: bytes | None = None, **config: object) -> list[Source]:
    if raw is not None:
        path.write_bytes(raw)
    return find_sources(DataConfig(sources=[str(path)], **config))  # type: ignore[arg-type]


def fields(source: Source) -> list[dict[str, object]]:
    read_columns(source)
    rows = list(read_rows(source))
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [row.fields for row in rows if row.problem is None]


def zipped(members: dict[str, bytes], flag: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def test_a_workbook_gives_text_and_refuses_numbers_that_lost_digits(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["2026 report"], [], ["text", "label", "id", "code", "share", ""],
        ["涨停", "好", 42, "0001", 0.1, None], [], ["跌停", "坏", "110101199003078515", "007", 2.5, None],
        ["lost", "x", 110101199003078515, "1", 1, None],
    ]  # fmt: skip
    (source,) = sources_of(tmp_path / "a.xlsx", xlsx({"Sheet1": rows, "empty": [], "h": [["a"]]}, hidden=("h",)))
    assert source.name == "a.xlsx" and read_columns(source) == ["text", "label", "id", "code", "share"]
    assert fields(source) == [
        {"text": "涨停", "label": "好", "id": "42", "code": "0001", "share": "0.1"},
        {"text": "跌停", "label": "坏", "id": "110101199003078515", "code": "007", "share": "2.5"},
    ]
    lost = list(read_rows(source))[2]
    assert lost.place == "sheet row 7" and "more than 15 digits" in (lost.problem or "")


def test_each_sheet_is_a_source_and_a_given_header_line_wins(tmp_path: Path) -> None:
    table: list[list[object]] = [["text", "label"], ["a", "b"]]
    raw = xlsx({"one": table, "two": [["x", "y"], *table]})
    sources = sources_of(tmp_path / "a.xlsx", raw)
    assert [source.name for source in sources] == ["a.xlsx#one", "a.xlsx#two"]
    assert read_columns(sources[1]) == ["x", "y"]
    assert read_columns(sources_of(tmp_path / "a.xlsx", header_line=2)[1]) == ["text", "label"]


def test_an_old_workbook_is_read(tmp_path: Path) -> None:
    (source,) = sources_of(Path(__file__).with_name("old.xls"))
    assert fields(source) == [{**row, "code": "0001"} for row in ROWS]


def test_gzip_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    (source,) = sources_of(tmp_path / "a.csv.gz", gzip.compress(PLAIN.encode("gb18030")))
    assert fields(source) == ROWS and describe_source(source)["encoding"] == "GB18030 (detected)"
    assert [row.byte_offset for row in read_rows(source)] == [11, 19]


def test_a_zip_gives_its_tables_with_chinese_names_and_notes_the_rest(tmp_path: Path) -> None:
    raw = zipped({"in/b.csv": PLAIN.encode(), "a.jsonl": json.dumps(ROWS[0]).encode(), "x.xlsx": xlsx({"s": [["text", "label"], ["c", "d"]]}), "README.md": b"hi", "__MACOSX/._b.csv": b"", "l.pdf": b""})  # noqa: E501  # fmt: skip
    sources = sources_of(tmp_path / "z.zip", raw)
    assert [source.name for source in sources] == ["z.zip/a.jsonl", "z.zip/in/b.csv", "z.zip/x.xlsx"]
    assert [len(fields(source)) for source in sources] == [1, 2, 1]
    assert describe_source(sources[0])["note"] == "2 other files of the archive left out"
    gbk = zipped({"X123.csv": PLAIN.encode()}).replace(b"X123.csv", "病历".encode("gbk") + b".csv")
    assert [source.name for source in sources_of(tmp_path / "g.zip", gbk)] == ["g.zip/病历.csv"]


@pytest.mark.parametrize("name", ["../a.csv", "/etc/a.csv", "a\\..\\b.csv", "C:a.csv"])
def test_a_member_that_leads_out_of_its_archive_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="leads out of it"):
        sources_of(tmp_path / "z.zip", zipped({name: PLAIN.encode()}))


def test_a_bomb_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 2**20)
    bomb = b"text,label\n" + b"a,b\n" * 2**20
    for name, raw in (("a.csv.gz", gzip.compress(bomb)), ("a.zip", zipped({"a.csv": bomb}))):
        with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
            [fields(source) for source in sources_of(tmp_path / name, raw)]


def test_a_damaged_archive_or_one_with_a_password_is_a_sentence(tmp_path: Path) -> None:
    raw = gzip.compress(PLAIN.encode() * 100)
    with pytest.raises(DataError, match="damaged or cut off"):
        fields(sources_of(tmp_path / "a.csv.gz", raw[:-20])[0])
    good = zipped({"a.csv": PLAIN.encode() * 50})
    broken = bytearray(good)
    broken[60] ^= 0xFF
    with pytest.raises(DataError, match="damaged or cut off"):
        fields(sources_of(tmp_path / "a.zip", bytes(broken))[0])
    locked = bytearray(good)
    locked[6] |= 1
    locked[good.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(DataError, match="password"):
        sources_of(tmp_path / "b.zip", bytes(locked))


def test_a_folder_gives_its_texts_as_passages_of_their_document(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    text = "# 第一章\n\n" + "甲乙丙。" * 30 + "\n\n```\ncode\n\nmore\n```\n\n# 第二章\n\nend\n"
    (tmp_path / "docs" / "a.md").write_text(text, encoding="utf-8")
    (tmp_path / "docs" / "b.txt").write_bytes("第一段\r\n\r\n第二段".encode("gb18030"))
    (tmp_path / "docs" / ".hidden.txt").write_text("x")
    one, two = sources_of(tmp_path / "docs", passage_chars=100)
    rows: list[Row] = list(read_rows(one))
    assert "".join("".join(row.fields["text"].split()) for row in rows) == "".join(text.split())
    assert all(len(row.fields["text"]) <= 100 for row in rows)
    assert {row.fields["document"] for row in rows} == {"a.md"}
    assert any("code\n\nmore" in row.fields["text"] for row in rows)
    raw = text.encode()
    assert all(raw[row.byte_offset :].decode().startswith(("#", "甲", "```")) for row in rows)
    assert fields(two) == [{"text": "第一段\n\n第二段", "document": "b.txt"}]


def test_the_splits_of_a_json_file_stay_what_they_are(tmp_path: Path) -> None:
    raw = json.dumps({"train": ROWS, "test": ROWS[:1]}).encode()
    train, test = sources_of(tmp_path / "a.json", raw)
    assert (train.name, train.is_test, test.name, test.is_test) == ("a.json#train", False, "a.json#test", True)
    assert fields(train) == ROWS and fields(test) == ROWS[:1]


def test_a_named_encoding_wins_and_an_unknown_one_is_a_sentence(tmp_path: Path) -> None:
    raw = "質問,答え\n銀行,はい\n".encode("shift_jis")
    with pytest.raises(DataError, match="its encoding is none of") as caught:
        fields(sources_of(tmp_path / "a.csv", raw)[0])
    assert "data: {encoding:" in (caught.value.hint or "")
    (source,) = sources_of(tmp_path / "a.csv", raw, encoding="shift_jis")
    assert fields(source) == [{"質問": "銀行", "答え": "はい"}]
    assert describe_source(source)["encoding"] == "SHIFT_JIS (named in the recipe)"
    with pytest.raises(DataError, match="there is no encoding `shift-jit`"):
        fields(sources_of(tmp_path / "a.csv", raw, encoding="shift-jit")[0])
