"""Tries to make the readers lose, merge or invent rows: broken quotes and lines, encodings, places in the file."""

from __future__ import annotations

import json
from pathlib import Path

import polars
import pytest

from metier.data.lines import Row
from metier.data.sources import find_sources, read_columns, read_rows
from metier.errors import DataError
from metier.recipe import DataConfig


def rows_of(path: Path, content: bytes | str | None = None) -> list[Row]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    (source,) = find_sources(DataConfig(sources=[str(path)]))
    return list(read_rows(source))


def good(rows: list[Row]) -> list[dict[str, object]]:
    return [row.fields for row in rows if row.problem is None]


def bad(rows: list[Row]) -> list[tuple[int, str, str | None]]:
    return [(row.number, row.place, row.problem) for row in rows if row.problem is not None]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_csv_offsets_point_at_each_row_with_bom_crlf_and_quoted_newlines(tmp_path: Path, mark: bytes, end: str) -> None:
    lines = ["问题,答案", "股票😀,涨", f'"two{end}lines, ""quoted""",b', "", "שלום,مرحبا", "last,one"]
    content = mark + end.join(lines).encode()
    rows = rows_of(tmp_path / "a.csv", content)
    assert [tuple(row.fields.values()) for row in rows] == [
        ("股票😀", "涨"),
        (f'two{end}lines, "quoted"', "b"),
        ("שלום", "مرحبا"),
        ("last", "one"),
    ]
    assert list(rows[0].fields) == ["问题", "答案"]
    starts = ["股票".encode(), b'"two', "שלום".encode(), b"last"]
    assert [content.index(start) for start in starts] == [row.byte_offset for row in rows]
    assert [row.number for row in rows] == [1, 2, 3, 4]
    assert [row.place for row in rows] == ["line 2", "lines 3 to 4", "line 6", "line 7"]


def test_ragged_rows_are_rejected_with_their_line(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", "a,b,c\n1,2,3\n1,2\n1,2,3,4\nx\n4,5,6\n")
    assert bad(rows) == [
        (2, "line 3", "2 fields, expected 3"),
        (3, "line 4", "4 fields, expected 3"),
        (4, "line 5", "1 field, expected 3"),
    ]
    assert len(good(rows)) == 2


def test_an_unclosed_quote_stops_with_the_line_where_it_opens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv`, line 3: a quote opens .* never closes"):
        rows_of(tmp_path / "a.csv", 'a,b\n1,2\n3,"open\n4,5\n6,7\n')


def test_a_quote_closed_by_a_later_row_rejects_each_line_it_spans(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", 'a,b\n1,"open\n2,x\n3,"closed"\n4,"fine"\n5,y\n')
    assert [(number, place) for number, place, _ in bad(rows)] == [
        (1, "line 2"),
        (2, "line 3 (in a quote opened on line 2)"),
        (3, "line 4 (in a quote opened on line 2)"),
    ]
    assert good(rows) == [{"a": "4", "b": "fine"}, {"a": "5", "b": "y"}]
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert [row.byte_offset for row in rows] == [4, 12, 16, 27, 36]


def test_text_after_a_closing_quote_is_rejected_and_the_next_row_is_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", 'a,b\n"x" y,2\n3,4\n')
    assert [place for _, place, _ in bad(rows)] == ["line 2"]
    assert good(rows) == [{"a": "3", "b": "4"}]


def test_a_ten_megabyte_field_is_read_whole(tmp_path: Path) -> None:
    long = "长" * 3_500_000
    rows = rows_of(tmp_path / "a.csv", f"a,b\n{long},1\nx,2\n")
    assert rows[0].fields["a"] == long
    assert rows[1].byte_offset == 4 + len(long.encode()) + 3


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_delimiter_is_found_by_the_header(tmp_path: Path, delimiter: str) -> None:
    other = ";" if delimiter != ";" else ","
    content = f"text{delimiter}label\n" + f"one{other} two{delimiter}x\n" * 3
    assert good(rows_of(tmp_path / "a.csv", content))[0] == {"text": f"one{other} two", "label": "x"}


def test_csv_text_stays_as_written(tmp_path: Path) -> None:
    assert good(rows_of(tmp_path / "a.tsv", "id\tv\n0001\t1.50\n")) == [{"id": "0001", "v": "1.50"}]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "is empty"),
        ("a.csv", b"a,b\n", "has a header and no rows"),
        ("a.csv", b"a,,b\n1,2,3\n", "column 2 of 3 has no name"),
        ("a.csv", b"a,b, a\n1,2,3\n", "two columns are named `a`"),
        ("a.csv", b"a\0,b\n1,2\n", "NUL bytes"),
        ("a.json", b"\xef\xbb\xbf[\xff]", "byte 4 does not fit UTF-8"),
        ("a.json", b'[{"a": 1},\n {"a": ]', r"line 2, column 8: not valid JSON: Expecting value"),
        ("a.json", b'{"a": [1]}', "holds no array of objects"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"  ", "is empty"),
        ("a.jsonl", b"\n\n", "is empty"),
        ("a.parquet", b"PAR1 this is none", "not a Parquet file"),
        ("a.xlsx", b"PK", "no Excel workbook, or a damaged one"),
        ("a.zip", b"PK", "no zip archive, or a damaged one"),
        ("a.csv.gz", b"\x1f\x8b damaged", "damaged or cut off"),
        ("a.doc", b"x", r"extension `\.doc`.*\.csv, \.tsv, \.json, \.jsonl, .*\.parquet"),
    ],
)
def test_an_unusable_file_is_a_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        rows_of(tmp_path / name, content)
    assert name in caught.value.message


def test_broken_json_lines_are_rejected_with_line_and_offset(tmp_path: Path) -> None:
    lines = [
        '{"a": "好😀"}',
        "",
        '{"a": 1',
        "[1, 2]",
        '{"a": NaN}',
        '{"a": [{"b": -Infinity}]}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '"text"',
        '{"a": 1} {"a": 2}',
        '{"a": "end"}',
    ]
    content = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    rows = rows_of(tmp_path / "a.jsonl", content)
    assert good(rows) == [{"a": "好😀"}, {"a": "end"}]
    assert [row.number for row in rows] == list(range(1, 11))
    filled = [line for line in lines if line]
    for row, line in zip(rows, filled, strict=True):
        assert content[row.byte_offset :].startswith(line.encode())
    assert bad(rows)[0] == (2, "line 3, column 8", "not valid JSON: Expecting ',' delimiter")
    assert [problem for _, _, problem in bad(rows)][1:7] == [
        "not a JSON object",
        "not valid JSON: NaN is not JSON",
        "not valid JSON: -Infinity is not JSON",
        "not valid JSON: a key appears twice in one object",
        "not valid JSON: nested too deeply",
        "not a JSON object",
    ]


def test_json_numbers_stay_as_they_are_written(tmp_path: Path) -> None:
    digits = "9" * 5000
    rows = rows_of(tmp_path / "a.jsonl", f'{{"a": 1.50, "b": 1e3, "c": -0, "d": {digits}}}\n')
    assert good(rows) == [{"a": "1.50", "b": "1e3", "c": "-0", "d": digits}]


@pytest.mark.parametrize("content", ['[{"a": "x"}, 3, {"a": NaN}]', '{"data": [{"a": "x"}, 3, {"a": NaN}]}'])
def test_json_arrays_are_read_element_by_element(tmp_path: Path, content: str) -> None:
    rows = rows_of(tmp_path / "a.json", content)
    assert good(rows) == [{"a": "x"}]
    assert [(number, problem) for number, _, problem in bad(rows)] == [
        (2, "not a JSON object"),
        (3, "not valid JSON: NaN is not JSON"),
    ]
    places = {(-1, "")} if content.startswith("{") else {(1, "line 1"), (13, "line 1"), (16, "line 1")}
    assert {(row.byte_offset, row.place) for row in rows} == places


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    polars.DataFrame({"q": ["x", None], "m": [[{"role": "user", "content": "c"}], []]}).write_parquet(path)
    assert good(rows_of(path)) == [
        {"q": "x", "m": [{"role": "user", "content": "c"}]},
        {"q": None, "m": []},
    ]


def test_json_columns_are_the_keys_of_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"a": 1} if i < 3000 else {"a": 1, "rare": 2}) + "\n" for i in range(3001)))
    (source,) = find_sources(DataConfig(sources=[str(path)]))
    assert read_columns(source) == ["a", "rare"]


def test_globs_are_sorted_and_names_are_plain_where_unique(tmp_path: Path) -> None:
    for name in ("b/one.csv", "a/two.csv", "a/[x].csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a,b\n1,2\n")
    config = DataConfig(
        sources=[str(tmp_path / "**/*.csv"), str(tmp_path / "a/[x].csv"), str(tmp_path / "a/../b/one.csv")]
    )
    assert [source.name for source in find_sources(config)] == ["[x].csv", "two.csv", "one.csv"]
    (tmp_path / "b/two.csv").write_text("a,b\n1,2\n")
    assert [source.name for source in find_sources(config)] == ["a/[x].csv", "a/two.csv", "b/one.csv", "b/two.csv"]


def test_a_test_file_is_no_training_file_even_when_the_glob_matches_it(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    config = DataConfig(sources=[str(tmp_path / "*.csv")], test_sources=[str(tmp_path / "test.csv")])
    assert [(source.name, source.is_test) for source in find_sources(config)] == [
        ("train.csv", False),
        ("test.csv", True),
    ]
    both = DataConfig(sources=[str(tmp_path / "test.csv")], test_sources=[str(tmp_path / "test.csv")])
    with pytest.raises(DataError, match="nothing is left to train on"):
        find_sources(both)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("none.csv", "there is no source file"),
        ("*.csv", "matches no file"),
        (".", "holds no file that is read"),
        ("*", "matches no file"),
    ],
)
def test_a_missing_source_is_a_sentence(tmp_path: Path, pattern: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        find_sources(DataConfig(sources=[str(tmp_path / pattern)]))
