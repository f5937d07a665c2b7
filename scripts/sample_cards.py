"""Prepares the example of each domain and keeps what it says of its data: recipes/cards/NAME.md and NAME.json.

    python scripts/sample_cards.py DATA      # DATA holds banking77/train.csv, banking77/test.csv and medquad.jsonl

The cards are what `metier prepare` writes, DATA_CARD.md and the Croissant JSON-LD, byte for byte. Where a policy
replaces identifiers, the digests in the JSON-LD depend on the key of whoever prepared the data.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from metier import pipeline
from metier.recipe import load_recipe

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "recipes" / "cards"
RECIPES = {
    "banking77": ROOT / "recipes" / "banking77_smollm2-135m_h100.yaml",
    "icd10cm": ROOT / "metier" / "bundled" / "icd10cm.yaml",
    "china_law": ROOT / "metier" / "bundled" / "china_law.yaml",
    "medquad": ROOT / "recipes" / "medquad_smollm2-135m_gpu.yaml",
}


def main() -> None:
    """Writes every card anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with the data sets that are not bundled")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "data").symlink_to(arguments.data.resolve())
        for bundled in (ROOT / "metier" / "bundled").glob("*.csv"):
            shutil.copy(bundled, work)
        for name, recipe in RECIPES.items():
            shutil.copy(recipe, work / f"{name}.yaml")
            made = pipeline.prepare(load_recipe(work / f"{name}.yaml", out=str(work / "runs" / name)))
            shutil.copy(made / "DATA_CARD.md", CARDS / f"{name}.md")
            shutil.copy(made / "croissant.json", CARDS / f"{name}.json")
            print(f"{name}: {CARDS / name}.md and .json")


if __name__ == "__main__":
    main()
