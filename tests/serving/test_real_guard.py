"""Tries to get personal data out of a served run: its policy redacts what it would have taken out in training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from metier.cli.serve import _redaction
from metier.serving.guard import Acts
from metier.serving.models import open_models

RECIPE = """
base: {base}
out: run
domain: {domain}
data: {{sources: [x.csv]}}
serve: {{notice: false}}
"""


@pytest.mark.parametrize(
    ("domain", "text", "kept"),
    [
        ("medicine", "Call Dr. John Smith at (415) 555-0133. The dose is 5 mg.", "5 mg"),
        ("finance", "请联系王小明，电话13812345678。年利率为3%。", "3%"),
    ],
)
def test_an_answer_is_redacted_by_the_policy_of_the_runs_domain(
    adapters: dict[str, Path], tiny_base: Path, tmp_path: Path, domain: str, text: str, kept: str
) -> None:
    shutil.copytree(adapters["red"], tmp_path / "run" / "adapter")
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE.format(base=tiny_base, domain=domain), encoding="utf-8")
    models = open_models([str(tmp_path / "run")], device="cpu", precision="fp32", redact_by=_redaction())
    guard = models.by_name["run"].guard
    assert guard.as_json() == {"domain": domain, "redact": True, "notice": False, "refuse": True}
    assert models.base.guard == guard
    acts = Acts()
    redactor = guard.redactor(acts)
    shown = redactor.push(text) + redactor.end()
    assert kept in shown and "Smith" not in shown and "王小明" not in shown and "555" not in shown
    assert "1381234" not in shown and acts.redacted["PHONE_NUMBER"] == 1
