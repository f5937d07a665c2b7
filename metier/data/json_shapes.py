"""One JSON object -> the rows in it: the object itself, an array under a key, splits, or columns.

Nested arrays are looked for two keys deep. Where several arrays of objects stand side by side and are no splits,
nobody can tell which is meant: `DataError` names them.
"""

from __future__ import annotations

from typing import Any

from metier.data.lines import Source
from metier.data.roles import CONVERSATIONS
from metier.errors import DataError

TEST_SPLITS = ("test", "testing", "测试", "测试集")
OTHER_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "eval", "训练", "训练集", "验证", "验证集")


def split_names(value: dict[str, Any]) -> list[str]:
    """The names of the splits, if the object is nothing but splits with arrays of objects."""
    folded = [name.casefold() for name in value]
    is_split = all(name in (*TEST_SPLITS, *OTHER_SPLITS) for name in folded)
    return list(value) if value and is_split and all(_is_rows(rows) for rows in value.values()) else []


def rows_of_object(value: dict[str, Any], source: Source) -> list[Any]:
    """The rows in the one object of a file; `source.part` names the split. Raises `DataError`."""
    if source.part:
        return list(value[source.part])
    if any(_is_conversation(name, inner) for name, inner in value.items()):
        return [value]
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        names = value["columns"]
        return [dict(zip(names, row, strict=True)) if _fits(row, names) else row for row in value["data"]]
    if columns := _columns(value):
        return columns
    found = _arrays(value, "", 2)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        listed = ", ".join(f"`{name}`" for name in found)
        raise DataError(f"{source.shown} holds several arrays of objects: {listed}", hint="write each to its own file")
    if any(isinstance(inner, list) for inner in value.values()):
        raise DataError(
            f"{source.shown} holds no array of objects",
            hint='expected [{"prompt": ..., "answer": ...}, ...], or the array under one key',
        )
    return [value]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_conversation(name: str, value: Any) -> bool:
    return name.casefold() in CONVERSATIONS and _is_rows(value)


def _fits(row: Any, names: list[Any]) -> bool:
    return isinstance(row, list) and len(row) == len(names) and all(isinstance(name, str) for name in names)


def _columns(value: dict[str, Any]) -> list[Any]:
    """Rows of {column: [values]} or {column: {row: value}}, where the columns are as long as each other."""
    inner = list(value.values())
    if len(inner) < 2:
        return []
    if all(isinstance(column, list) and not _is_rows(column) for column in inner):
        if len({len(column) for column in inner}) != 1:
            return []
        return [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)]
    if all(isinstance(column, dict) and column for column in inner):
        keys = list(inner[0])
        if all(list(column) == keys for column in inner) and all(key.isdigit() for key in keys):
            return [{name: column[key] for name, column in value.items()} for key in keys]
        if all(name.isdigit() for name in value):
            return inner
    return []


def _arrays(value: dict[str, Any], path: str, depth: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, inner in value.items():
        if isinstance(inner, list) and inner and sum(isinstance(row, dict) for row in inner) * 2 > len(inner):
            found[f"{path}{name}"] = inner
        elif isinstance(inner, dict) and depth > 1:
            found |= _arrays(inner, f"{path}{name}.", depth - 1)
    return found
