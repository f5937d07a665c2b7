"""Tries to leave a removed value anywhere in the data set, or to rewrite in silence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import polars
import pytest

from metier import artifacts
from metier.data.prepare import dataset_key, prepare
from metier.errors import DataError, RecipeError
from metier.keys import keyed_hash, load_key
from metier.recipe import Recipe, parse_recipe

WORDS = [
    "胸闷",
    "头痛",
    "发热",
    "咳嗽",
    "腹痛",
    "乏力",
    "眩晕",
    "失眠",
    "心悸",
    "水肿",
    "皮疹",
    "耳鸣",
    "便秘",
    "腹泻",
    "呕吐",
    "气促",
    "背痛",
    "牙痛",
    "鼻塞",
    "咽痛",
]


@pytest.fixture(autouse=True)
def _key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "secret" / "key"))


def _secrets(i: int) -> tuple[str, str, str]:
    """A name, a phone number and a patient number of row i."""
    return f"王小{'明华丽强军'[i % 5]}", f"138001{i:05d}", f"P{70000 + i}"


def _recipe(folder: Path, privacy: str, rows: int = 60) -> Recipe:
    with (folder / "notes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "code", "patient", "doctor", "age"])
        for i in range(rows):
            name, phone, patient = _secrets(i)
            symptom = WORDS[i % 20] + WORDS[i * 7 % 20] + str(i)
            note = f"患者{name}主诉{symptom},电话{phone},复诊医师Zqxwv{i % 3}。"
            writer.writerow([note, "ABC"[i % 3], patient, f"Zqxwv{i % 3}", 30 + i % 4])
    text = "base: smollm2-135m\nout: run\ndata: {sources: [notes.csv], prompt: note, answer: code, group_id: patient}\n"
    return parse_recipe(text + privacy, name="r.yaml", folder=folder)


def _prepare(folder: Path, privacy: str) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    manifest = prepare(_recipe(folder, privacy), out=folder / "dataset", progress=said.append)
    return manifest, said


def _everything(folder: Path) -> str:
    """The text of every file of the data set."""
    found = ""
    for path in sorted((folder / "dataset").rglob("*")):
        if path.suffix == ".parquet":
            found += polars.read_parquet(path).write_json()
        elif path.is_file():
            found += path.read_text(encoding="utf-8")
    return found


def test_no_file_of_the_data_set_holds_what_was_removed(tmp_path: Path) -> None:
    manifest, said = _prepare(tmp_path, "privacy: {policy: pipl, columns: {doctor: PERSON}}\n")
    everything = _everything(tmp_path) + "\n".join(said)
    for i in range(60):
        assert not any(secret in everything for secret in _secrets(i))
    assert "Zqxwv" not in everything
    assert manifest["privacy"]["replaced"]["PHONE_NUMBER"] == {"count": 60, "operator": "label"}
    assert manifest["privacy"]["records_touched"] == 60
    assert "anonymous" not in everything and "匿名" not in everything
    assert any("identifiers in 60 of 60 records were replaced" in line for line in said)


def test_removed_values_are_found_by_their_keyed_hash_alone(tmp_path: Path) -> None:
    _prepare(tmp_path, "privacy: {policy: pipl}\n")
    subjects = polars.read_parquet(tmp_path / "dataset" / "subjects.parquet")
    records = polars.read_parquet(tmp_path / "dataset" / "records.parquet")
    hashed = keyed_hash(_secrets(7)[1], load_key())
    rows = subjects.filter(polars.col("subject_hash") == hashed)
    assert rows["entity_type"].to_list() == ["PHONE_NUMBER"] and rows["record_id"][0] in records["record_id"].to_list()
    assert keyed_hash(_secrets(7)[2], load_key()) in records["group_id"].to_list()


def test_without_a_policy_the_suspected_identifiers_are_told(tmp_path: Path) -> None:
    manifest, said = _prepare(tmp_path, "")
    assert manifest["privacy"]["policy"] == "none" and manifest["privacy"]["suspected_by_type"]["PHONE_NUMBER"] == 60
    told = next(line for line in said if line.startswith("privacy:"))
    assert "nothing was taken out" in told and "PHONE_NUMBER 60" in told
    assert not any(secret in told for i in range(60) for secret in _secrets(i))


def test_the_same_key_gives_the_same_bytes_and_another_key_another_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = "privacy: {policy: gdpr-pseudonymised}\n"
    recipe = _recipe(tmp_path, privacy)
    first, _ = _prepare(tmp_path, privacy)
    bytes_of = {path.name: path.read_bytes() for path in (tmp_path / "dataset").glob("*.parquet")}
    assert artifacts.is_current(tmp_path / "dataset", dataset_key(recipe, tmp_path / "dataset")[0])
    again, _ = _prepare(tmp_path, privacy)
    assert bytes_of == {path.name: path.read_bytes() for path in (tmp_path / "dataset").glob("*.parquet")}
    assert first["key"] == again["key"]
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "other"))
    assert dataset_key(recipe, tmp_path / "dataset")[0] != first["key"]


def test_residual_risk_is_in_the_manifest_and_the_card(tmp_path: Path) -> None:
    manifest, _ = _prepare(tmp_path, "privacy: {policy: pipl, quasi_identifiers: [age], review: 5}\n")
    found = manifest["privacy"]
    assert found["looked_at"] == 60 and {row["what"] for row in found["planted"]} == {"name", "number"}
    for row in found["planted"]:
        assert row["planted"] == 500 and row["missed"] < 200
        assert row["upper_bound"] == 0.006 if row["missed"] == 0 else row["upper_bound"] > row["missed"] / 500
    assert found["k_anonymity"] == {"k": 15, "groups": 4, "rows_below_5": 0, "rows": 60}
    lines = (tmp_path / "dataset" / "privacy_review.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 5 and all("suspected" in json.loads(line) for line in lines)
    card = (tmp_path / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8")
    assert "## Personal data" in card and "PHONE_NUMBER" in card and "pipl" in card


@pytest.mark.parametrize(
    ("privacy", "error", "says"),
    [
        ("privacy: {policy: hippa-safe-harbor}\n", RecipeError, "did you mean `hipaa-safe-harbor`"),
        ("privacy: {policy: pipl, columns: {docter: PERSON}}\n", DataError, "did you mean `doctor`"),
        ("privacy: {policy: pipl, columns: {doctor: PERSN}}\n", RecipeError, "did you mean `PERSON`"),
        ("privacy: {policy: pipl, operators: {DAT: drop}}\n", RecipeError, "did you mean `DATE`"),
    ],
)
def test_a_wrong_privacy_section_is_a_sentence(tmp_path: Path, privacy: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        _prepare(tmp_path, privacy)
    assert not (tmp_path / "dataset").exists()
