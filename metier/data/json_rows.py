"""JSON Lines (streamed) and JSON arrays (read whole) -> rows, after RFC 8259.

NaN, Infinity and keys that stand twice in one object are refused, which Python's parser lets pass; numbers stay the
text they are written in. A broken line of JSON Lines is a rejected row, a broken JSON file a `DataError`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from metier.data.lines import Row, Source, decode, read_lines
from metier.errors import DataError


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


def _problem_in(value: Any) -> str | None:
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, _Invalid):
            return inner.reason
        if isinstance(inner, dict | list):
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
    return None


def read_jsonl(source: Source) -> Iterator[Row]:
    """Every line that is not blank, broken ones too."""
    number = 0
    for line, offset, text in read_lines(source):
        if not text.strip():
            continue
        number += 1
        place = f"line {line}"
        try:
            value = parse_json(text.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            yield Row(number, offset, f"{place}, column {error.colno}", problem=f"not valid JSON: {error.msg}")
        except ValueError as error:
            yield Row(number, offset, place, problem=f"not valid JSON: {error}")
        else:
            yield _json_row(number, offset, place, value)


def _json_row(number: int, offset: int, place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, offset, place, value)
    return Row(number, offset, place, problem="not a JSON object")


def read_json(source: Source) -> Iterator[Row]:
    """Every element of the array. Raises `DataError` where the file is no JSON or holds no array."""
    raw = source.path.read_bytes()
    mark = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    text = decode(raw[mark:], source.path, mark)
    if not text.strip():
        raise DataError(f"`{source.path}` is empty", hint="take it out of `data.sources`, or export it again")
    try:
        value = _parse(text)
    except json.JSONDecodeError as error:
        hint = (
            "one object a line is JSON Lines: name the file .jsonl" if error.msg == "Extra data" else "export it again"
        )
        raise DataError(
            f"`{source.path}`, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}", hint=hint
        ) from None
    except ValueError as error:
        raise DataError(f"`{source.path}`: not valid JSON: {error}") from None
    values = value.get("data") if isinstance(value, dict) else value
    if not isinstance(values, list):
        raise DataError(
            f"`{source.path}` holds no array of objects",
            hint='expected [{"prompt": ..., "answer": ...}, ...], or the array under one key `data`',
        )
    for number, value in enumerate(values, start=1):
        problem = _problem_in(value)
        yield Row(number, problem=f"not valid JSON: {problem}") if problem else _json_row(number, -1, "", value)
