"""Tries to find documentation that the code has left behind: stale pages, dead links, examples that do not work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from metier.cli import app
from metier.domains import Domain
from metier.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# English and Chinese, equal in content.
PAIRS = [("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/guide.zh-CN.md"),
         ("docs/evidence.md", "docs/evidence.zh-CN.md")]  # fmt: skip
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, "scripts/generate_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_parts(english: str, chinese: str) -> None:
    both = (read(english), read(chinese))
    levels = [[len(mark) for mark in re.findall(r"^(#+) ", BLOCK.sub("", text), re.MULTILINE)] for text in both]
    assert levels[0] == levels[1]
    rows = [len(re.findall(r"^\|", text, re.MULTILINE)) for text in both]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_show_the_same_code(english: str, chinese: str) -> None:
    assert BLOCK.findall(read(english)) == BLOCK.findall(read(chinese))


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_a_readme_stays_on_one_page(name: str) -> None:
    assert read(name).count("\n") <= 150


@pytest.mark.parametrize("page", ["README.md", *PAIRS[1]])
def test_every_recipe_shown_is_valid(page: str, tmp_path: Path) -> None:
    recipes = blocks(read(page), "yaml")
    assert recipes
    for text in recipes:
        if text.startswith("name:"):  # a domain of one's own
            Domain.model_validate(yaml.safe_load(text))
        else:
            parse_recipe(text, name=page, folder=tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_shown_exists_with_its_options(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for block in blocks(page.read_text(encoding="utf-8"), "bash"):
        for verb, rest in re.findall(r"^metier (\w+)(.*)$", block, re.MULTILINE):
            assert verb in commands, f"{page.name}: metier {verb}"
            known = {option for parameter in commands[verb].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{page.name}: metier {verb}{rest}"
        for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), f"{page.name}: make {target}"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_every_measured_row_names_a_results_file(name: str) -> None:
    header, _, *rows = [line for line in read(name).split("\n## ")[5].splitlines() if line.startswith("|")]
    assert "95 %" in header
    for row in rows:
        assert re.search(r"\]\(benchmarks/results/[^)]+\)", row), row


def test_every_decision_is_short_and_complete() -> None:
    for record in (ROOT / "docs" / "adr").glob("*.md"):
        text = record.read_text(encoding="utf-8")
        assert text.count("\n") <= 40, record.name
        for part in ("Status:", "## Context", "## Decision", "## Rejected", "## Consequence"):
            assert part in text, f"{record.name}: {part}"
