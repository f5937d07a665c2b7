"""JSON in every form that people write -> rows, after RFC 8259 with little forgiven.

- JSON Lines: one object a line; a broken line is a rejected row.
- Anything else: values one after another, streamed. An array's elements are rows, and so are objects that follow
  each other; a single object is looked into by `json_shapes`.

Forgiven, without a change to any text: a Markdown fence around the file, commas before a closing bracket, // and
/* */ comments, line ends and tabs inside a string. Refused: NaN, Infinity, keys that stand twice, single quotes.
Numbers stay the text they are written in. A broken file that is no JSON Lines is a `DataError` with line and column.

Limits: memory holds one value; that of a file which is one single object is the file. A value is at most 64 MiB in a
stream of several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from metier.data.json_shapes import OTHER_SPLITS, TEST_SPLITS, rows_of_object, split_names
from metier.data.lines import BLOCK_BYTES, MAX_RECORD_BYTES, Row, Source, encoding_of, read_blocks, read_lines
from metier.errors import DataError

SNIFF_LINES = 20
_BLANK = re.compile(r"[ \t\r\n]*")
_FENCE = re.compile(r"\s*```[\w-]*[ \t\r]*(?=\n)")
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"\\]{1,20})"\s*:\s*\[')
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(_STRING + r"|,(?=\s*[\]}])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Invalid:
    """Stands in a parsed JSON value for what RFC 8259 does not allow or leaves open."""

    reason: str


def _json_object(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    return value if len(value) == len(pairs) else _Invalid("a key appears twice in one object")


_JSON = json.JSONDecoder(
    parse_float=str,
    parse_int=str,
    parse_constant=lambda word: _Invalid(f"{word} is not JSON"),
    object_pairs_hook=_json_object,
    strict=False,
)


def parse_json(text: str) -> Any:
    """One JSON value, numbers as the text they are written in.

    Raises ValueError with a reason that quotes no text: NaN, Infinity, repeated keys and deep nesting included.
    """
    value = _parse(text)
    problem = _problem_in(value)
    if problem:
        raise ValueError(problem)
    return value


def _parse(text: str) -> Any:
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        forgiven = _forgive(text)
        if forgiven == text:
            raise
        return _JSON.decode(forgiven)


def _forgive(text: str) -> str:
    """The text with comments and trailing commas as blanks: every character keeps its place."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    return _TRAILING_COMMA.sub(blank, _COMMENT.sub(blank, text))


def _said(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" starting at")


def _problem_in(value: Any) -> str | None:
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, _Invalid):
            return inner.reason
        if isinstance(inner, dict | list):
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
    return None


def read_json(source: Source) -> Iterator[Row]:
    """Every row of a JSON or JSON Lines file, broken ones too. Raises `DataError`."""
    yield from _read_lines(source) if is_json_lines(source) else _read_values(source)


def read_splits(source: Source) -> list[str]:
    """The names of the splits, where the file is one object of nothing else; only a file that begins so is read."""
    match = _FIRST_KEY.match(next(read_blocks(source), ""))
    if not match or match.group(1).casefold() not in (*TEST_SPLITS, *OTHER_SPLITS):
        return []
    values = list(islice(_values(source), 2))
    is_one = len(values) == 1 and isinstance(values[0].value, dict)
    return split_names(values[0].value) if is_one else []


def is_json_lines(source: Source) -> bool:
    """Whether lines are values of their own: most of the first lines are, or the name says so and nothing denies it."""
    try:
        block = next(read_blocks(source), "")
    except DataError:  # a byte that does not fit: lines can go on without it
        block = "".join(line.text for line in islice(read_lines(source), SNIFF_LINES))
    lines = block.split("\n")
    if len(block) >= BLOCK_BYTES // 4:
        lines = lines[:-1] or lines  # the last one may be cut
    first = [line.strip() for line in lines if line.strip()][:SNIFF_LINES]
    if not first:
        raise DataError(f"{source.shown} is empty", hint="take it out of `data.sources`, or export it again")
    whole = sum(_is_whole(line) for line in first)
    if len(first) == 1:
        return first[0].startswith("{") and source.format == "jsonl"
    if source.format == "jsonl":
        return _is_whole(first[0]) or not (first[0].startswith(("[", "```")) or first[0] == "{")
    return whole >= 2 and 2 * whole >= len(first)


def _is_whole(text: str) -> bool:
    try:
        return isinstance(_parse(text), dict | list)
    except ValueError:
        return False


def _read_lines(source: Source) -> Iterator[Row]:
    number = 0
    for line, offset, text, problem in read_lines(source):
        if not text.strip():
            continue
        number += 1
        place = f"line {line}"
        if problem:
            yield Row(number, offset, place, problem=problem)
            continue
        try:
            value = parse_json(text.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            yield Row(number, offset, f"{place}, column {error.colno}", problem=f"not valid JSON: {_said(error)}")
        except ValueError as error:
            yield Row(number, offset, place, problem=f"not valid JSON: {error}")
        else:
            yield _json_row(number, offset, place, value)


def _json_row(number: int, offset: int, place: str, value: Any) -> Row:
    problem = _problem_in(value)
    if problem:
        return Row(number, offset, place, problem=f"not valid JSON: {problem}")
    if isinstance(value, dict):
        return Row(number, offset, place, value)
    return Row(number, offset, place, problem="not a JSON object")


class _Value(NamedTuple):
    """A value of the stream; `depth` is 1 for an array's element, 0 for a value of its own."""

    depth: int
    value: Any
    offset: int
    line: int


def _read_values(source: Source) -> Iterator[Row]:
    stream = _values(source)
    first = next(stream, None)
    if first is None:
        raise DataError(f"{source.shown} holds no rows", hint="take it out of `data.sources`, or export it again")
    second = next(stream, None)
    if second is None and first.depth == 0:
        if not isinstance(first.value, dict):
            problem = _problem_in(first.value)
            said = f"not valid JSON: {problem}" if problem else "it holds no object"
            raise DataError(f"{source.shown}: {said}", hint='expected [{"prompt": ..., "answer": ...}, ...]')
        for number, row in enumerate(rows_of_object(first.value, source), start=1):
            yield _json_row(number, -1, "", row)
        return
    begun = [first] if second is None else [first, second]
    for number, value in enumerate(chain(begun, stream), start=1):
        yield _json_row(number, value.offset, f"line {value.line}", value.value)


def _values(source: Source) -> Iterator[_Value]:
    """The values of the file in order; a top array's elements one by one."""
    text = _Text(source)
    text.skip_fence()
    while text.next_character():
        if text.next_character() != "[":
            yield text.value(0)
            text.skip(",")
            continue
        text.skip("[")
        while text.next_character() != "]":
            if not text.next_character():
                raise text.error("the file ends inside the array", text.at)
            yield text.value(1)
            if not text.skip(",") and text.next_character() != "]":
                raise text.error("Expecting ',' delimiter", text.at)
        text.skip("]")
        text.skip(",")


class _Text:
    """The file's text with a place in it; blocks are read as they are needed and forgotten when passed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._blocks = read_blocks(source)
        encoding = encoding_of(source)
        self._codec = encoding.codec
        self._text = ""
        self._clean = ""  # the same, with what is forgiven as blanks once something had to be
        self._forgives = False
        self.at = 0
        self._is_whole = False
        # The place of self._known in the file.
        self._known, self._offset, self._line, self._column = 0, encoding.mark, 1, 1

    def _place(self, at: int) -> tuple[int, int, int]:
        """(byte offset, line, column) of a place that is not before the last one asked for."""
        passed = self._text[self._known : at]
        self._offset += len(passed.encode(self._codec))
        newline = passed.rfind("\n")
        self._line += passed.count("\n")
        self._column = self._column + len(passed) if newline < 0 else len(passed) - newline
        self._known = at
        return self._offset, self._line, self._column

    def _more(self, atleast: int = 1) -> bool:
        """Reads on, and forgets what is passed."""
        self._place(self.at)
        parts, size = [self._text[self.at :]], 0
        while size < atleast and not self._is_whole:
            block = next(self._blocks, "")
            self._is_whole = not block
            parts.append(block)
            size += len(block)
        self._text, self.at, self._known = "".join(parts), 0, 0
        self._clean = _forgive(self._text) if self._forgives else self._text
        return size > 0

    def next_character(self) -> str:
        """The next one that is no blank and in no comment; empty at the end (a closing fence is one)."""
        while True:
            blank = _BLANK.match(self._clean, self.at)
            self.at = blank.end() if blank else self.at
            rest = self._clean[self.at : self.at + 3]
            if len(rest) < 3 and not self._is_whole:
                self._more()
                continue
            if rest == "```":
                return ""
            if rest[:2] not in ("//", "/*"):
                return rest[:1]
            end = "\n" if rest[:2] == "//" else "*/"
            while (found := self._clean.find(end, self.at)) < 0 and self._more():
                pass
            self.at = len(self._clean) if found < 0 else found + len(end)

    def skip_fence(self) -> None:
        """Passes the line that opens a Markdown fence."""
        while not self._text.strip() and self._more():
            pass
        fence = _FENCE.match(self._text)
        self.at = fence.end() if fence else 0

    def skip(self, character: str) -> bool:
        """Passes the next character, if it is this one."""
        if self.next_character() != character:
            return False
        self.at += 1
        return True

    def value(self, depth: int) -> _Value:
        """The value that begins here. Raises `DataError` with its place."""
        while True:
            try:
                value, end = self._decode()
            except RecursionError:
                raise self.error("nested too deeply", self.at) from None
            except json.JSONDecodeError as error:
                size = len(self._text) - self.at
                if self._is_whole or (size > MAX_RECORD_BYTES and depth == 1):
                    raise self.error(_said(error), error.pos) from None
                self._more(size)
                continue
            # A number or word may go on in the next block.
            if end >= len(self._text) and not self._is_whole:
                self._more(len(self._text) - self.at)
                continue
            offset, line, _ = self._place(self.at)
            self.at = end
            if end > BLOCK_BYTES // 4:
                self._place(end)
                self._text, self._clean = self._text[end:], self._clean[end:]
                self.at = self._known = 0
            return _Value(depth, value, offset, line)

    def _decode(self) -> tuple[Any, int]:
        try:
            return _JSON.raw_decode(self._clean, self.at)
        except json.JSONDecodeError:
            if self._forgives:
                raise
            clean = self._text[: self.at] + _forgive(self._text[self.at :])
            value, end = _JSON.raw_decode(clean, self.at)
            self._clean, self._forgives = clean, True
            return value, end

    def error(self, what: str, at: int) -> DataError:
        """What is wrong at a place in the text that is held."""
        _, line, column = self._place(at)
        return DataError(
            f"{self._source.shown}, line {line}, column {column}: not valid JSON: {what}",
            hint="one object a line is JSON Lines, where a broken line costs no more than itself; or export it again",
        )
