"""Tries to slip past a gate of the recipe, or to get a run that `verify` does not accept out of the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier import pipeline
from metier.errors import RunError
from metier.evaluation.verify import verify
from metier.recipe import Recipe


def test_a_gate_fails_the_run_after_the_report_and_again_when_up_to_date(tmp_path: Path, tiny_base: Path) -> None:
    rows = [f"note {i},{'heart' if i % 2 else 'lung'}" for i in range(60)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    values = {
        "base": str(tiny_base), "out": str(tmp_path / "run"),
        "data": {"sources": [str(tmp_path / "a.csv")], "prompt": "{text}", "answer": "label", "canaries": 1},
        "train": {"max_steps": 2, "precision": "fp32", "device": "cpu"},
        "evaluate": {
            "max_new_tokens": 2, "bootstrap_samples": 100, "forgetting": False,
            "gates": {"exposure_bits": 9.97, "membership_auc": 0.0},
        },
    }  # fmt: skip
    recipe = Recipe(**values)
    for _ in range(2):
        with pytest.raises(RunError, match="does not pass the recipe's gates: membership_auc is 0"):
            pipeline.run(recipe)
        assert verify(tmp_path / "run").problems == []
    assert "Not to be released" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
