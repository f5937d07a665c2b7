"""A project of 48 short notes with two labels, for tests that train."""

from __future__ import annotations

from pathlib import Path


def write_project(folder: Path, recipe: str) -> Path:
    """Writes notes.csv and `recipe` beside it into `folder`; returns the recipe's path."""
    rows = [f"note {i} with {'fever ' * (i % 5)}and pain,{('Skin', 'Blood')[i * 7 % 2]}" for i in range(48)]
    (folder / "notes.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n")
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"
