"""Tries to make a reader wrong in silence: every hostile kind, a thousand encodings, and whatever hypothesis finds."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metier.data.encodings import Encoding, detect_encoding, sample_lines
from metier.data.lines import Row
from metier.data.sources import find_sources, read_columns, read_rows
from metier.errors import DataError
from metier.recipe import DataConfig
from tests.data.encoding_cases import Case, cases
from tests.data.hostile_cases import CSV, JSON, ROWS, Hostile
from tests.data.tiny_xlsx import xlsx


def rows_of(path: Path, raw: bytes) -> list[Row]:
    path.write_bytes(raw)
    sources = find_sources(DataConfig(sources=[str(path)]))
    for source in sources:
        read_columns(source)
    return [row for source in sources for row in read_rows(source)]


@pytest.mark.parametrize("case", CSV + JSON, ids=lambda case: f"{case.name} {case.kind}")
def test_a_hostile_file_is_right_or_a_sentence(case: Hostile, tmp_path: Path) -> None:
    path = tmp_path / case.name
    if case.sentence:
        with pytest.raises(DataError, match=r"(?s).*") as caught:
            rows_of(path, case.raw)
        assert case.sentence in str(caught.value) and case.name in str(caught.value)
        return
    rows = rows_of(path, case.raw)
    assert [row.fields for row in rows if row.problem is None] == case.rows
    assert sum(row.problem is not None for row in rows) == case.rejected


def detected(case: Case) -> Encoding | None:
    """What is found for a file's bytes; None for a sentence."""
    try:
        return detect_encoding(case.raw[:65536], sample_lines([case.raw], 65536), Path("a.csv"))
    except DataError:
        return None


def test_of_a_thousand_encodings_none_is_wrong_in_silence() -> None:
    right = asked = 0
    for case in cases(1000, seed=7):
        found = detected(case)
        if found is None:
            asked += 1
        else:
            assert case.raw[found.mark :].decode(found.codec) == case.text.removeprefix("\ufeff"), case
            right += 1
    assert right >= 995 and asked == 1000 - right


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("質問,答え\n銀行の口座を開設したいです,はい\n", "shift_jis"),
        ("質問,答え\n銀行の口座を開設したいです,はい\n", "euc_jp"),
        ("질문,답변\n은행 계좌를 개설하고 싶습니다,예\n환자는 열이 있습니다,아니요\n", "euc_kr"),
        ("вопрос,ответ\nПациент жалуется на головную боль,да\n", "cp1251"),
        ("вопрос,ответ\nПациент жалуется на головную боль,да\n", "koi8_r"),
        ("otázka,odpověď\nPacient si stěžuje na příliš vysokou teplotu,ano\n", "cp1250"),
        ("ερώτηση,απάντηση\nΟ ασθενής παραπονιέται για πονοκέφαλο,ναι\n", "cp1253"),
        ("คำถาม,คำตอบ\nผู้ป่วยมีไข้สามวัน,ใช่\n", "tis_620"),
        ("سؤال,جواب\nالمريض يعاني من الحمى منذ ثلاثة أيام,نعم\n", "cp1256"),
        ("question,answer\nLe patient présente une fièvre élevée,oui\n", "mac_roman"),
    ],
)
def test_an_encoding_that_is_not_looked_for_is_a_sentence(text: str, encoding: str) -> None:
    raw = text.encode(encoding)
    with pytest.raises(DataError, match="its encoding is none of|may be"):
        detect_encoding(raw, raw, Path("a.csv"))


def test_one_character_again_and_again_does_not_tell_gb18030_from_big5() -> None:
    raw = "text,label\n跌],a\n跌],b\n跌],a\n跌],b\n".encode("gb18030")
    with pytest.raises(DataError, match="too short to tell"):
        detect_encoding(raw, raw, Path("a.csv"))


@pytest.mark.parametrize("text", ["fz鑡,fz鑡\n", "氐,a\n", "鑡,é\n"])
def test_one_rare_character_is_asked_about_where_another_reading_is_whole(text: str) -> None:
    raw = text.encode("gb18030", "replace")
    with pytest.raises(DataError, match="too short to tell|none of"):
        detect_encoding(raw, raw, Path("a.csv"))


def test_one_accent_in_words_is_western() -> None:
    raw = "nom;ville\nLe très grand hôtel de la gare;Paris\n".encode("cp1252")
    assert detect_encoding(raw, raw, Path("a.csv")).codec == "cp1252"


@pytest.mark.parametrize("text", ["سؤال,جواب\n", "Привет,да\n", "질문,답변\n", "é,a\n", "คำถาม,คำตอบ\n", "😀,👍🏽\n"])
def test_short_utf8_of_any_script_is_utf8(text: str) -> None:
    assert detect_encoding(text.encode(), text.encode(), Path("a.csv")).codec == "utf-8"


def test_a_file_of_two_encodings_gives_rejected_rows_not_wrong_ones(tmp_path: Path) -> None:
    good, other = "股票上涨的消息很多,好\n", "患者今天已经出院回家了,坏\n"
    for first, second in (("utf-8", "gb18030"), ("gb18030", "utf-8")):
        rows = rows_of(tmp_path / "a.csv", b"text,label\n" + (good * 40).encode(first) + (other * 3).encode(second))
        assert [row.fields["text"] for row in rows if row.problem is None] == [good.split(",")[0]] * 40
        assert [row.problem is None for row in rows] == [True] * 40 + [False] * 3


@functools.cache
def _parquet() -> bytes:
    buffer = io.BytesIO()
    polars.DataFrame(ROWS).write_parquet(buffer)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.csv", "text,label\na,b\n")
    return buffer.getvalue()


WHOLE: dict[str, Callable[[], bytes]] = {
    "a.xlsx": lambda: xlsx({"s": [["text", "label"], ["a", "b"]]}),
    "a.xls": lambda: Path(__file__).with_name("old.xls").read_bytes(),
    "a.parquet": _parquet,
    "a.zip": _zip,
    "a.jsonl.gz": lambda: gzip.compress(b'{"text": "a"}\n' * 9),
}
PIECES = [b",", b'"', b"\n", b"\r", b"\r\n", b";", b"\t", b"text", b"label", b"a", b"1", b"\\", b"'", b" ",
          b"\0", b"#", b"\xff", b"\xfe", "好".encode(), "好".encode("gbk"), b"\xef\xbb\xbf",
          b"sep=;", b"\xef\xbc\x8c"]  # fmt: skip
JSON_PIECES = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b'"text"', b'{"text": "a"}', b"1", b"NaN", b"//", b"/*",
               b"```", b"\\", b" ", b"\xff", "好".encode(), b"null", b'{"a": [1, {"b": 2}]}', b"'"]  # fmt: skip


def check_nothing_is_lost(path: Path, raw: bytes) -> None:
    """Every row has its number in turn, and a line or a place; or the file is a sentence."""
    try:
        rows = rows_of(path, raw)
    except DataError as error:
        assert error.message and path.name in error.message
        return
    assert rows and [row.number for row in rows] == list(range(1, len(rows) + 1))
    offsets = [row.byte_offset for row in rows]
    assert offsets == sorted(offsets) and (len(set(offsets)) == len(offsets) or offsets[0] == -1)
    assert all(bool(row.fields) != bool(row.problem) or row.fields == {} for row in rows)
    assert path.suffix in (".gz", ".zip") or all(offset < len(raw) for offset in offsets)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join), st.sampled_from(["a.csv", "a.tsv", "a.txt", "a.md"])
)
def test_no_bytes_break_the_readers_of_lines(tmp_path: Path, raw: bytes, name: str) -> None:
    check_nothing_is_lost(tmp_path / name, raw)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(JSON_PIECES), max_size=25).map(b"".join), st.sampled_from(["a.json", "a.jsonl"]))
def test_no_bytes_break_the_json_reader(tmp_path: Path, raw: bytes, name: str) -> None:
    check_nothing_is_lost(tmp_path / name, raw)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(["a.csv", "a.json", "a.jsonl", "a.parquet", "a.zip", "a.csv.gz", "a.md"]))  # noqa: E501  # fmt: skip
def test_no_noise_breaks_a_reader(tmp_path: Path, raw: bytes, name: str) -> None:
    check_nothing_is_lost(tmp_path / name, raw)


@pytest.mark.parametrize("name", ["a.xlsx", "a.xls", "a.parquet", "a.zip", "a.jsonl.gz"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_breaks_a_reader(tmp_path: Path, name: str, data: st.DataObject) -> None:
    good = bytearray(WHOLE[name]())
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    check_nothing_is_lost(tmp_path / name, bytes(good[: data.draw(st.integers(1, len(good)))]))


def test_a_workbook_of_a_later_zip_version_is_a_sentence_or_rows(tmp_path: Path) -> None:
    raw = bytearray(WHOLE["a.xlsx"]())
    raw[raw.index(b"PK\x01\x02") + 6] = 251
    check_nothing_is_lost(tmp_path / "a.xlsx", bytes(raw))


cell = st.text(st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cell, cell).filter(lambda row: any(c.strip() for c in row)), min_size=1, max_size=8),
       st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["\n", "\r\n"]))  # fmt: skip
def test_what_a_csv_writer_wrote_comes_back(
    tmp_path: Path, table: list[tuple[str, str]], delimiter: str, end: str
) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerows([("text", "label"), *table])
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + buffer.getvalue().encode())
    (source,) = find_sources(DataConfig(sources=[str(path)]))
    assert [tuple(row.fields.values()) for row in read_rows(source)] == table
