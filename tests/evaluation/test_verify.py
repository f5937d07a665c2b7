"""Tries to alter a finished run, byte by byte and number by number, without `verify` noticing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from metier import artifacts
from metier.errors import RunError
from metier.evaluation.card import write_card
from metier.evaluation.report import write_report
from metier.evaluation.verify import differences, verify
from metier.model.specialist import Specialist

from .conftest import build_run, classified, judge

LABELS = ["asthma", "fracture", "interest rate"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, specialist: Specialist) -> Path:
    """A run with everything that `metier run` leaves."""
    rows = [*classified(60, "train", LABELS), *classified(45, "test", LABELS, prompt="case")]
    run = build_run(tmp_path_factory.mktemp("verify") / "run", specialist, rows)
    (run / "recipe.yaml").write_text("base: tiny\n")
    for stage, action in (("dataset", "prepare"), ("adapter", "train")):
        artifacts.append_audit(run, action, digest=(artifacts.read_manifest(run / stage) or {})["digest"])
    manifest = judge(run, specialist, forgetting=True)
    artifacts.append_audit(run, "evaluate", digest=manifest["digest"])
    write_card(run)
    pages = ["MODEL_CARD.md", "recipe.yaml", *write_report(run), *(f"{s}/manifest.json" for s in artifacts.STAGES)]
    artifacts.append_audit(run, "report", files={name: artifacts.digest_file(run / name) for name in pages})
    return run


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A copy of it to alter."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_untouched_run_holds(finished: Path) -> None:
    found = verify(finished)
    assert found.problems == []
    assert len(found.checks) == 7
    assert len(found.audit_head) == 64
    assert verify(finished, found.audit_head).problems == []
    assert "not in the chain" in verify(finished, "0" * 64).problems[0]


def test_a_renamed_run_holds(finished: Path, tmp_path: Path) -> None:
    (finished / "recipe.yaml").write_text("base: tiny\nout: runs/first\n")
    assert remake(finished, lambda evidence: None) == []
    assert verify(finished.rename(tmp_path / "carried elsewhere")).problems == []


def test_pages_of_another_version_say_so(finished: Path) -> None:
    path = finished / "evidence" / "manifest.json"
    manifest = json.loads(path.read_text())
    artifacts.write_json(path, {**manifest, "metier_version": "0.0.1"})
    assert remake(finished, lambda evidence: None) == []
    (finished / "report.html").write_text("from then")
    assert any("report.html" in p and "made by metier 0.0.1; this is" in p for p in verify(finished).problems)


def test_every_altered_file_is_found(finished: Path) -> None:
    names = [p.relative_to(finished).as_posix() for p in sorted(finished.rglob("*")) if p.is_file()]
    checked = [n for n in names if "checkpoints/" not in n]
    assert len(checked) == 15
    for name in checked:
        path = finished / name
        before = path.read_bytes()
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        try:
            problems = verify(finished).problems
        except RunError as error:  # a manifest that no longer parses
            problems = [str(error)]
        assert any(name.split("/")[0] in p for p in problems), name
        path.write_bytes(before)
    assert verify(finished).problems == []


def remake(finished: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """Alters evidence.json and everything that would give the change away, but for the answers."""
    path = finished / "evidence" / "evidence.json"
    evidence = json.loads(path.read_text(encoding="utf-8"))
    change(evidence)
    artifacts.write_json(path, evidence)
    manifest = artifacts.read_manifest(finished / "evidence") or {}
    manifest["files"]["evidence.json"] = {"sha256": artifacts.digest_file(path), "bytes": path.stat().st_size}
    carried = {n: f["sha256"] for n, f in manifest["files"].items()}
    manifest["digest"] = artifacts.digest_json(["evidence", manifest["parents"], carried])
    artifacts.write_json(finished / "evidence" / "manifest.json", manifest)
    artifacts.append_audit(finished, "evaluate", digest=manifest["digest"])
    write_card(finished)
    pages = ["MODEL_CARD.md", *write_report(finished), *(f"{s}/manifest.json" for s in artifacts.STAGES)]
    artifacts.append_audit(finished, "report", files={n: artifacts.digest_file(finished / n) for n in pages})
    return verify(finished).problems


def numbers(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all numbers in a JSON value."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in numbers(v, (*path, k))]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in numbers(v, (*path, i))]
    return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_a_number_altered_with_all_its_digests_is_found(finished: Path) -> None:
    def better(evidence: dict[str, Any]) -> None:
        evidence["metrics"]["accuracy"]["adapter"] += 0.01

    problems = remake(finished, better)
    assert len(problems) == 1
    assert problems[0].startswith("evidence/evidence.json: metrics.accuracy.adapter: ")


def test_every_single_number_of_the_evidence_is_compared(finished: Path) -> None:
    evidence = json.loads((finished / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    paths = numbers(evidence)
    assert len(paths) > 300
    for path in paths:
        altered = json.loads(json.dumps(evidence))
        place = altered
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] += 1
        assert len(list(differences(altered, evidence))) == 1, path


def test_an_answer_altered_with_all_its_digests_is_found(finished: Path) -> None:
    path = finished / "evidence" / "items.parquet"
    table = pl.read_parquet(path)
    labels = ["asthma"] * len(table)
    table.with_columns(pl.Series("adapter_label", labels)).write_parquet(path)
    manifest = artifacts.read_manifest(finished / "evidence") or {}
    manifest["files"]["items.parquet"]["sha256"] = artifacts.digest_file(path)
    artifacts.write_json(finished / "evidence" / "manifest.json", manifest)
    assert any("manifest.json" in p for p in verify(finished).problems)
    assert remake(finished, lambda evidence: None) != []


@pytest.mark.parametrize(
    "column", ["reference", "language", "adapter_correct", "base_generated_correct", "adapter_label"]
)
def test_a_column_that_no_number_needs_is_compared_all_the_same(finished: Path, column: str) -> None:
    path = finished / "evidence" / "items.parquet"
    table = pl.read_parquet(path)
    values = table[column].to_list()
    values[0] = not values[0] if isinstance(values[0], bool) else "fracture" if values[0] != "fracture" else "asthma"
    table.with_columns(pl.Series(column, values)).write_parquet(path)
    manifest = artifacts.read_manifest(finished / "evidence") or {}
    manifest["files"]["items.parquet"]["sha256"] = artifacts.digest_file(path)
    artifacts.write_json(finished / "evidence" / "manifest.json", manifest)
    wrong = f"evidence/items.parquet: `{column}` does not follow from records and answers"
    assert wrong in remake(finished, lambda evidence: None)


def test_a_missing_and_an_added_file_are_found(finished: Path) -> None:
    (finished / "evidence" / "notes.txt").write_text("x")
    (finished / "report.html").unlink()
    problems = " ".join(verify(finished).problems)
    assert "evidence/notes.txt: not in the manifest" in problems
    assert "report.html: missing" in problems


def test_a_removed_audit_line_is_found(finished: Path) -> None:
    lines = (finished / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (finished / "audit.jsonl").write_bytes(b"".join(lines[1:]))
    assert "line 1" in verify(finished).problems[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no complete dataset"):
        verify(tmp_path)
