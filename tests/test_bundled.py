"""Tries to break the bundled data and the recipes: wrong counts, a label twice for one text, a stale digest or path."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest

from metier.artifacts import digest_file
from metier.recipe import load_recipe

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "metier" / "bundled"
RECIPES = sorted([*BUNDLED.glob("*.yaml"), *(ROOT / "recipes").glob("*.yaml")])
# file: columns (text, label, group), number of labels, length of the texts
FILES: dict[str, tuple[list[str], int, tuple[int, int]]] = {
    "icd10cm_chapters.csv": (["term", "chapter", "category"], 22, (3, 80)),
    "china_law_departments.csv": (["text", "department", "law"], 8, (15, 80)),
}


def _read(name: str) -> pl.DataFrame:
    return pl.read_csv(BUNDLED / name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_its_columns_labels_and_lengths(name: str) -> None:
    columns, num_labels, (shortest, longest) = FILES[name]
    table = _read(name)
    assert table.columns == columns
    assert 2900 <= len(table) <= 3100
    assert sum(table.null_count().row(0)) == 0
    assert table[columns[1]].n_unique() == num_labels
    lengths = table[columns[0]].str.len_chars()
    assert lengths.min() == shortest
    assert lengths.max() == longest
    assert table[columns[0]].str.strip_chars().equals(table[columns[0]])


@pytest.mark.parametrize("name", FILES)
def test_no_text_stands_twice(name: str) -> None:
    text = _read(name)[FILES[name][0][0]].str.to_lowercase()
    assert text.is_duplicated().sum() == 0


@pytest.mark.parametrize("name", FILES)
def test_a_group_has_one_label(name: str) -> None:
    _, label, group = FILES[name][0]
    assert _read(name).group_by(group).agg(pl.col(label).n_unique())[label].max() == 1


def test_the_chinese_classes_are_even_where_there_is_enough() -> None:
    counts = dict(_read("china_law_departments.csv")["department"].value_counts().iter_rows())
    small = {"刑法", "宪法"}
    assert {n for label, n in counts.items() if label not in small} == {471}
    assert min(counts.values()) >= 75


def test_no_term_refers_to_codes_only() -> None:
    terms = _read("icd10cm_chapters.csv")["term"]
    assert not terms.str.contains(r"\b[A-Z]\d[0-9A-Z]\b").any()


@pytest.mark.parametrize("name", FILES)
def test_the_readme_states_this_files_digest_and_counts(name: str) -> None:
    readme = (BUNDLED / "README.md").read_text(encoding="utf-8")
    table, group = _read(name), FILES[name][0][2]
    assert digest_file(BUNDLED / name) in readme
    # Once in the table, once in the Chinese paragraph.
    assert readme.count(f"{len(table):,}") >= 2
    assert f"{table[group].n_unique():,}" in readme


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_that_we_ship_is_valid(path: Path) -> None:
    assert load_recipe(path).out.startswith("runs/")


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.yaml")), ids=lambda path: path.name)
def test_a_bundled_recipe_names_columns_that_are_there(path: Path) -> None:
    recipe = load_recipe(path)
    [source] = recipe.data.sources
    columns = pl.read_csv(source).columns
    assert recipe.data.prompt is not None
    named = [*re.findall(r"{(\w+)}", recipe.data.prompt), recipe.data.answer, recipe.data.group_id]
    assert named == columns


def test_the_recipes_readme_lists_every_recipe() -> None:
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert all(readme.count(path.name) >= 2 for path in RECIPES)
