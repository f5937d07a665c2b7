"""Tries to make a reader wrong in silence: every hostile kind, a thousand encodings, and whatever hypothesis finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.data.lines import Row
from metier.data.sources import find_sources, read_columns, read_rows
from metier.errors import DataError
from metier.recipe import DataConfig
from tests.data.hostile_cases import CSV, JSON, Hostile


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
