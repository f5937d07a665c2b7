"""Tries to miss a record of a person, to leave one behind, to let one come back, or to lose count of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars
import pytest
from typer.testing import CliRunner

from metier import artifacts, pipeline
from metier.cli import app
from metier.data.lineage import forget, trace
from metier.errors import DataError, RunError
from metier.keys import keyed_hash
from metier.recipe import Recipe, load_recipe

KEY = bytes(range(32))


def prepared(folder: Path, **sections: Any) -> tuple[Recipe, Path]:
    """A run with a data set: 20 patients with 5 notes each; P3 also stands in another's note, and twice in one row."""
    lines = ["note,chapter,patient"]
    for i in range(100):
        note = f"note {i} with a cough that lasted {i} days in ward {i * 7 % 13}" + (" seen with P3" if i == 77 else "")
        lines.append(f"{note},{'ab'[i % 2]},P{i // 5}")
    lines.append(lines[16])  # a copy of a note of P3's
    (folder / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = folder / "recipe.yaml"
    values = {
        "base": "none",
        "data": {"sources": ["a.csv"], "group_id": "patient"},
        "dedup": {"near": "ignore"},
        **sections,
    }
    recipe.write_text(json.dumps({"out": str(folder / "run"), **values}))
    loaded = load_recipe(recipe)
    pipeline.prepare(loaded)
    return loaded, folder / "run"


def adapter_of(run: Path) -> None:
    """An adapter that says it was trained on the run's data set."""
    manifest = artifacts.read_manifest(run / "dataset")
    assert manifest
    work = artifacts.work_folder(run / "adapter", "k")
    (work / "adapter_config.json").write_text("{}")
    artifacts.complete(
        work, run / "adapter", kind="adapter", key="k", config={}, parents={"dataset": manifest["digest"]}, started=0.0,
        details={},
    )  # fmt: skip


def ids(run: Path) -> set[str]:
    return set(polars.read_parquet(run / "dataset" / "records.parquet")["record_id"].to_list())


@pytest.mark.parametrize("named", ["P3", "Ｐ3", keyed_hash("P3", KEY)])
def test_a_person_is_found_by_id_text_copies_and_what_was_made_of_them(tmp_path: Path, named: str) -> None:
    _, run = prepared(tmp_path, augment={"methods": ["typo"]})
    found = trace(named, run, KEY)
    of_source = found.records.filter(polars.col("parent_id").is_null())
    expected = {16, 17, 18, 19, 20} | (set() if len(named) == 32 else {78})
    assert set(of_source["source_row"].to_list()) == expected
    assert found.merged["source_row"].to_list() == [101]
    records = polars.read_parquet(run / "dataset" / "records.parquet")
    children = records.filter(polars.col("parent_id").is_in(of_source["record_id"].to_list()))
    assert set(found.records["record_id"]) == set(of_source["record_id"]) | set(children["record_id"])
    assert len(trace("P33", run, KEY).records) == 0


def test_a_record_and_a_row_can_be_named(tmp_path: Path) -> None:
    _, run = prepared(tmp_path)
    one = trace("a.csv:42", run, KEY).records
    assert one["source_row"].to_list() == [42]
    assert trace(one["record_id"][0], run, KEY).records.equals(one)


def test_what_is_forgotten_is_gone_stays_gone_and_marks_the_adapter(tmp_path: Path) -> None:
    recipe, run = prepared(tmp_path, augment={"methods": ["typo"]})
    adapter_of(run)
    before = ids(run)
    found = forget("P3", run, KEY)
    gone = set(found.records["record_id"].to_list())
    assert ids(run) == before - gone and not len(trace("P3", run, KEY).records)
    for path in (path for path in run.rglob("*") if path.suffix in (".json", ".jsonl", ".md")):
        assert "P3" not in path.read_text(encoding="utf-8"), path
    manifest = artifacts.read_manifest(run / "dataset")
    assert manifest and manifest["rejected_by_reason"]["forgotten on request"] == 7
    counts = manifest["counts"]
    assert counts["rows"] == 101 == counts["kept"] + counts["merged"] + counts["rejected"]
    assert artifacts.is_whole(run / "dataset", manifest)
    [mark] = json.loads((run / "adapter" / "revoked.json").read_text())
    assert mark["records"] == int((found.records["split"] == "train").sum()) and mark["subject_hash"]
    pipeline.prepare(recipe)  # from the sources, which still hold the person
    again = artifacts.read_manifest(run / "dataset")
    assert (
        again
        and not len(trace("P3", run, KEY).records)
        and {**again["counts"], "synthetic": 0} == {**counts, "synthetic": 0}
    )
    pipeline.prepare(recipe)
    assert artifacts.read_manifest(run / "dataset") == again


def test_evidence_that_shows_the_person_goes_too(tmp_path: Path) -> None:
    _, run = prepared(tmp_path)
    (run / "evidence").mkdir()
    polars.DataFrame({"record_id": sorted(ids(run))}).write_parquet(run / "evidence" / "items.parquet")
    for page in ("report.html", "report.zh.html", "report.en.html", "MODEL_CARD.md"):
        (run / page).write_text("P3")
    assert forget("P3", run, KEY).in_evidence == 6
    assert not (run / "evidence").exists() and not list(run.glob("report*")) and not (run / "MODEL_CARD.md").exists()


def test_a_second_person_is_known_to_have_been_learned_before_it_is_trained_again(tmp_path: Path) -> None:
    _, run = prepared(tmp_path)
    adapter_of(run)
    records = polars.read_parquet(run / "dataset" / "records.parquet")
    seen = records.group_by("group_id").agg((polars.col("split") == "train").all().alias("train")).sort("group_id")
    held_out, learned = seen.filter(~polars.col("train"))["group_id"][0], seen.filter("train")["group_id"][0]
    assert forget(held_out, run, KEY).models == [] and not (run / "adapter" / "revoked.json").exists()
    found = forget(learned, run, KEY)
    assert found.learned == 5 and found.models == [run / "adapter"]
    assert len(json.loads((run / "adapter" / "revoked.json").read_text())) == 1
    assert trace(learned, run, KEY).forgotten == 5


def test_an_adapter_of_a_data_set_that_is_gone_is_marked_too(tmp_path: Path) -> None:
    recipe, run = prepared(tmp_path)
    adapter_of(run)
    (run / "adapter").rename(run / "full")
    adapter_of(run)
    pipeline.prepare(load_recipe(tmp_path / "recipe.yaml", ["seed=9"]))
    found = forget("P3", run, KEY)
    assert found.learned is None and found.models == [run / "adapter", run / "full"]
    assert json.loads((run / "full" / "revoked.json").read_text())[0]["records"] is None


def test_other_files_of_the_data_set_lose_the_person_too(tmp_path: Path) -> None:
    _, run = prepared(tmp_path)
    folder = run / "dataset"
    records = polars.read_parquet(folder / "records.parquet")
    hashed = keyed_hash("13800138000", KEY)
    listed = {"record_id": records["record_id"][:2], "subject_hash": [hashed, keyed_hash("x", KEY)]}
    polars.DataFrame(listed).write_parquet(folder / "subjects.parquet")
    places = records.select("source_file", "source_row").head(3).to_dicts()
    (folder / "privacy_review.jsonl").write_text("".join(json.dumps(place) + "\n" for place in places))
    found = forget("13800138000", run, KEY)
    assert found.records["why"].to_list() == ["found by de-identification"]
    assert (
        polars.read_parquet(folder / "subjects.parquet")["record_id"].to_list() == records["record_id"][1:2].to_list()
    )
    left = [json.loads(line) for line in (folder / "privacy_review.jsonl").read_text().splitlines()]
    assert left == places[1:]


def test_a_changed_source_and_a_damaged_list_stop_the_work(tmp_path: Path) -> None:
    recipe, run = prepared(tmp_path)
    forget("a.csv:42", run, KEY)
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace("note 0", "note zero"))
    with pytest.raises(DataError, match="was changed after a person was forgotten in it: row 42"):
        pipeline.prepare(recipe)
    (run / "forgotten.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        pipeline.prepare(recipe)


def test_the_verbs_tell_and_log_without_the_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "key"))
    _, run = prepared(tmp_path)
    shown = CliRunner().invoke(app, ["trace", "--subject", "P3", str(run)])
    assert shown.exit_code == 0 and "6 records, 1 rows merged" in shown.output and "a.csv, row 16" in shown.output
    done = CliRunner().invoke(app, ["forget", "--subject", "P3", str(run)])
    assert done.exit_code == 0 and f"metier run {run / 'recipe.yaml'} --out {run}" in done.output
    last = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [entry["action"] for entry in last] == ["recipe", "prepare", "forget", "prepare"]
    assert artifacts.check_audit(run) == [] and "P3" not in (run / "audit.jsonl").read_text()
    none = CliRunner().invoke(app, ["forget", "--subject", "nobody here", str(run)])
    assert none.exit_code == 0 and "0 records" in none.output
    wrong = CliRunner().invoke(app, ["trace", "--subject", "P3", str(tmp_path / "no run")])
    assert isinstance(wrong.exception, RunError) and not (tmp_path / "no run").exists()


def test_a_prepared_run_is_verified_as_far_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "key"))
    _, run = prepared(tmp_path)
    shown = CliRunner().invoke(app, ["verify", str(run)])
    assert shown.exit_code == 0 and "there is no adapter and evidence yet" in shown.output
    lines = (run / "audit.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        other = [*lines[: number - 1], line.replace('"action": "', '"action": "x'), *lines[number:]]
        (run / "audit.jsonl").write_text("".join(other), encoding="utf-8")
        assert f"line {number}: altered" in CliRunner().invoke(app, ["verify", str(run)]).output
    (run / "audit.jsonl").write_text("".join(lines), encoding="utf-8")
    (run / "dataset" / "records.parquet").write_bytes(b"other")
    assert "records.parquet: its bytes are not those" in CliRunner().invoke(app, ["verify", str(run)]).output
    adapter_of(run)
    (run / "adapter" / "revoked.json").write_text("[]")
    assert "was forgotten; `metier run` trains anew" in CliRunner().invoke(app, ["verify", str(run)]).output


def test_a_person_whose_row_became_another_persons_record_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "key").write_text(KEY.hex())
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "key"))
    notes = [f"note {i} about a cough in ward {i * 7919 % 997}" for i in range(40)]
    rows = [{"text": f"{note}, phone 415-555-{1000 + i}", "label": "ab"[i % 2]} for i, note in enumerate(notes)]
    rows.append({"text": f"{notes[3]}, phone 415-555-7777", "label": "b"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"base": "none", "out": str(tmp_path / "run"), "data": {"sources": ["a.jsonl"]}}
    text |= {"dedup": {"near": "ignore"}, "privacy": {"policy": "hipaa-safe-harbor"}}
    (tmp_path / "r.yaml").write_text(json.dumps(text))
    pipeline.prepare(load_recipe(tmp_path / "r.yaml"))
    found = trace("415-555-7777", tmp_path / "run", KEY)
    assert found.records["source_row"].to_list() == [4] and found.merged["source_row"].to_list() == [41]
    assert trace("415-555-1003", tmp_path / "run", KEY).records["source_row"].to_list() == [4]
