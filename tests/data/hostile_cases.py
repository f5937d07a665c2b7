# ruff: noqa: E501  (one case a line)
"""Files as departments export them and as people break them: 38 CSV and 34 JSON kinds, with what is right for each.

`rows` are the exact rows that must come out (all text), `rejected` how many must be rejected beside them; where a
sentence is right, `sentence` is part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hostile:
    kind: str
    name: str
    raw: bytes
    rows: list[dict[str, object]] = field(default_factory=list)
    rejected: int = 0
    sentence: str = ""


ROWS: list[dict[str, object]] = [{"text": "涨停 up", "label": "好"}, {"text": "跌 down", "label": "坏"}]
PLAIN = "text,label\n涨停 up,好\n跌 down,坏\n"
HANT = "text,label\n漲停的股票,好\n跌停的股票,壞\n"
HANT_ROWS: list[dict[str, object]] = [
    {"text": "漲停的股票", "label": "好"},
    {"text": "跌停的股票", "label": "壞"},
]
LONG = "长" * 200_000
ID = "110101199003078515"


def _csv(kind: str, text: str | bytes, rows: list[dict[str, object]] | None = None, **more: object) -> Hostile:
    raw = text if isinstance(text, bytes) else text.encode()
    wanted = ([] if "sentence" in more else ROWS) if rows is None else rows
    name = str(more.pop("name", "a.csv"))
    return Hostile(kind, name, raw, wanted, **more)  # type: ignore[arg-type]


def _fields(**values: object) -> dict[str, object]:
    return dict(values)


CSV = [
    _csv("plain", PLAIN),
    _csv("semicolons", PLAIN.replace(",", ";")),
    _csv("tabs in .csv", PLAIN.replace(",", "\t")),
    _csv("tabs in .tsv", PLAIN.replace(",", "\t"), name="a.tsv"),
    _csv("bars", PLAIN.replace(",", "|")),
    _csv("full-width commas", PLAIN.replace(",", "\uff0c")),
    _csv("every cell quoted", '"text","label"\n"涨停 up","好"\n"跌 down","坏"\n'),
    _csv("delimiter in quotes", 'text,label\n"a, b",x\n"c, d",y\n', [{"text": "a, b", "label": "x"}, {"text": "c, d", "label": "y"}]),
    _csv("line end in quotes", 'text,label\n"a\nb",x\nc,y\n', [{"text": "a\nb", "label": "x"}, {"text": "c", "label": "y"}]),
    _csv("quotes written twice", 'text,label\n"say ""hi""",x\n', [{"text": 'say "hi"', "label": "x"}]),
    _csv("quotes after a backslash", 'text,label\n"say \\"hi\\", ok",x\nC:\\new,y\n', [{"text": 'say "hi", ok', "label": "x"}, {"text": "C:\\new", "label": "y"}]),
    _csv("single quotes", "'text','label'\n'涨停 up','好'\n'跌 down','坏'\n"),
    _csv("quote inside a plain cell", 'text,label\n5" disc,x\nc,y\n', [{"text": '5" disc', "label": "x"}, {"text": "c", "label": "y"}]),
    _csv("UTF-8 with mark", b"\xef\xbb\xbf" + PLAIN.encode()),
    _csv("GB18030", PLAIN.encode("gb18030")),
    _csv("Big5", HANT.encode("big5"), HANT_ROWS),
    _csv("cp1252", "text,label\nCrédit refusé,été\nFrançois paie,non\n".encode("cp1252"), [{"text": "Crédit refusé", "label": "été"}, {"text": "François paie", "label": "non"}]),
    _csv("UTF-16 LE with mark", PLAIN.encode("utf-16")),
    _csv("UTF-16 BE without mark", PLAIN.encode("utf-16-be")),
    _csv("CRLF", PLAIN.replace("\n", "\r\n")),
    _csv("CR alone", PLAIN.replace("\n", "\r")),
    _csv("preamble of comments", "# exported 2026-11-24\n# by: ward 3\n" + PLAIN),
    _csv("title row, padded", "2026 年度报表,\n" + PLAIN),
    _csv("title row, bare, and a blank line", "2026 年度报表\n\n" + PLAIN),
    _csv("title row above unknown columns", "Report\nfirst,second\na,b\nc,d\n", sentence="data.header_line"),
    _csv("sep=;", "sep=;\n" + PLAIN.replace(",", ";")),
    _csv("ragged rows", PLAIN + "short\nlong,er,row\n", rejected=2),
    _csv("trailing delimiter", "text,label,\n涨停 up,好,\n跌 down,坏,\n"),
    _csv("NUL in a cell", PLAIN + "nul\0,x\n", [*ROWS, {"text": "nul\0", "label": "x"}]),
    _csv("one bad byte", PLAIN.encode() + b"bad \xff byte,x\n", rejected=1),
    _csv("cell of 200,000 characters", f"text,label\n{LONG},x\n", [{"text": LONG, "label": "x"}]),
    _csv("two columns of one name", "text,text\na,b\n", sentence="two columns are named `text`"),
    _csv("padded header", " text , label \n涨停 up,好\n跌 down,坏\n"),
    _csv("empty", "", sentence="is empty"),
    _csv("header alone", "text,label\n", sentence="has a header and no rows"),
    _csv("identifiers", f"text,label,id,code\na,b,{ID},0001\n", [_fields(text="a", label="b", id=ID, code="0001")]),
    _csv("NA, null and 1e5 as text", "text,label\nNA,null\n1e5,1.50\n", [{"text": "NA", "label": "null"}, {"text": "1e5", "label": "1.50"}]),
    _csv("a quote that never closes", 'text,label\n"open,x\nc,y\n', sentence="line 2: a quote opens"),
]  # fmt: skip

_A, _B = '{"text": "涨停 up", "label": "好"}', '{"text": "跌 down", "label": "坏"}'
_ARRAY = f"[{_A}, {_B}]"


def _json(kind: str, text: str | bytes, rows: list[dict[str, object]] | None = None, **more: object) -> Hostile:
    return _csv(kind, text, rows, **{"name": "a.json", **more})


JSON = [
    _json("array", _ARRAY),
    _json("array over lines", f"[\n  {_A},\n  {_B}\n]\n"),
    _json("array, one object a line", f"[\n{_A},\n{_B}\n]"),
    _json("lines", f"{_A}\n{_B}\n", name="a.jsonl"),
    _json("lines named .json", f"{_A}\n{_B}\n"),
    _json("array named .jsonl", f"[\n{_A},\n{_B}\n]", name="a.jsonl"),
    _json("UTF-8 with mark", b"\xef\xbb\xbf" + _ARRAY.encode()),
    _json("GB18030", _ARRAY.encode("gb18030")),
    _json("UTF-16", _ARRAY.encode("utf-16")),
    _json("nested under data", f'{{"data": {_ARRAY}}}'),
    _json("nested two deep, with counts", f'{{"count": 2, "result": {{"rows": {_ARRAY}}}}}'),
    _json("two arrays", f'{{"a": {_ARRAY}, "b": {_ARRAY}}}', sentence="several arrays of objects: `a`, `b`"),
    _json("columns", '{"text": ["涨停 up", "跌 down"], "label": ["好", "坏"]}'),
    _json("columns by row", '{"text": {"0": "涨停 up", "1": "跌 down"}, "label": {"0": "好", "1": "坏"}}'),
    _json("rows by number", f'{{"0": {_A}, "1": {_B}}}'),
    _json("columns and data", '{"columns": ["text", "label"], "index": [0, 1], "data": [["涨停 up", "好"], ["跌 down", "坏"]]}'),
    _json("concatenated", f"{_A}{_B}"),
    _json("objects over lines, one after another", f"{_A}\n{_B}\n".replace(", ", ",\n")),
    _json("trailing commas", '[{"text": "涨停 up", "label": "好",}, ' + _B + ",]"),
    _json("comments", f"// export\n[{_A}, /* the second: http://x */ {_B}]"),
    _json("Markdown fence", f"```json\n{_ARRAY}\n```\n"),
    _json("single quotes", "[{'text': 'a', 'label': 'b'}]", sentence="line 1, column 3"),
    _json("NaN", '[{"text": NaN, "label": "x"}, ' + _A + "]", ROWS[:1], rejected=1),
    _json("cut off", f"[{_A}, {_B[:20]}", sentence="line 1, column"),
    _json("one broken line", f'{_A}\n{{"text": "x\n{_B}\n', rejected=1, name="a.jsonl"),
    _json("NUL in a string", '{"text": "a\\u0000", "label": "x"}\n', [{"text": "a\0", "label": "x"}], name="a.jsonl"),
    _json("line end inside a string", '[{"text": "a\nb", "label": "x"}]', [{"text": "a\nb", "label": "x"}]),
    _json("keys missing here and there", '[{"text": "a"}, {"text": "b", "label": "x"}]', [{"text": "a"}, {"text": "b", "label": "x"}]),
    _json("numbers as written", f'[{{"text": 1.50, "label": {ID}}}]', [{"text": "1.50", "label": ID}]),
    _json("conversation", '[{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]', [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]),
    _json("a key twice", '{"text": "a", "text": "b"}\n' + _A + "\n", ROWS[:1], rejected=1, name="a.jsonl"),
    _json("values that are no objects", f'["a", 3, {_A}]', ROWS[:1], rejected=2),
    _json("empty", " \n", sentence="is empty"),
    _json("nested a hundred thousand deep", "[" * 100_000, sentence="nested too deeply"),
]  # fmt: skip
