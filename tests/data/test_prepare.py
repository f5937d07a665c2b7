"""Tries to make a data set that loses a row, leaks test records, differs between runs or tells secrets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import polars
import pytest

from metier import artifacts
from metier.data.prepare import dataset_key, prepare
from metier.errors import DataError
from metier.recipe import DataConfig, Recipe


def recipe_of(config: DataConfig, *, seed: int = 0, **sections: Any) -> Recipe:
    return Recipe(base="no base", out="nowhere", seed=seed, data=config, **sections)


def key_of(config: DataConfig, *, seed: int = 0) -> str:
    return dataset_key(recipe_of(config, seed=seed), Path("nowhere/dataset"))[0]


def make(folder: Path, config: DataConfig, *, seed: int = 0, **sections: Any) -> dict[str, Any]:
    recipe = recipe_of(config, seed=seed, **sections)
    return prepare(recipe, out=folder / "dataset", progress=lambda line: None)


def table(folder: Path, name: str = "records") -> polars.DataFrame:
    return polars.read_parquet(folder / "dataset" / f"{name}.parquet")


def write_csv(path: Path, rows: list[tuple[str, ...]], header: str = "text,label") -> str:
    path.write_text(header + "\n" + "".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int, labels: int = 2) -> list[tuple[str, ...]]:
    return [(f"text {i}", f"label {i % labels}") for i in range(count)]


def test_every_row_is_kept_or_rejected_with_its_place(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = []
    for i in range(500):
        lines.append(rng.choice([f"好 {i},b", f"q {i},", f"q {i},b,c", f"q {i}", f",b{i}", f"😀 {i},a", f'"q" {i},b']))
    content = "text,label\n" + "\n".join(lines) + "\n"
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": "b"}\n{"text": 1\n{"text": "y"}\n', encoding="utf-8")
    manifest = make(tmp_path, DataConfig(sources=[str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")]))
    records, rejected = table(tmp_path), table(tmp_path, "rejected")
    merged = table(tmp_path, "merged")
    assert manifest["counts"] == {
        "rows": 503, "kept": len(records), "merged": len(merged), "rejected": len(rejected), "synthetic": 0
    }  # fmt: skip
    assert sum(manifest["rejected_by_reason"].values()) == len(rejected)
    assert manifest["rejected_by_reason"]["3 fields, expected 2"] == sum(line.count(",") == 2 for line in lines)
    places = {
        (file, row) for t in (records, merged, rejected) for file, row in t.select("source_file", "source_row").rows()
    }
    assert places == {("a.csv", i) for i in range(1, 501)} | {("b.jsonl", i) for i in range(1, 4)}
    raw = content.encode()
    for row in rejected.filter(source_file="a.csv").to_dicts():
        line = lines[row["source_row"] - 1]
        assert raw[row["byte_offset"] :].startswith(line.encode() + b"\n")
        assert row["reason"].startswith(f"line {row['source_row'] + 1}: ")
    for entry in manifest["sources"]:
        assert entry["rows"] == entry["kept"] + entry["merged"] + entry["rejected"]
        assert entry["sha256"] == artifacts.digest_file(tmp_path / entry["file"])


def test_records_have_the_agreed_columns_and_no_path_of_this_machine(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", labelled(20))
    manifest = make(tmp_path, DataConfig(sources=[source]))
    records = table(tmp_path)
    assert dict(records.schema) == {
        "record_id": polars.String,
        "split": polars.String,
        "group_id": polars.String,
        "messages": polars.List(polars.Struct({"role": polars.String, "content": polars.String})),
        "label": polars.String,
        "language": polars.String,
        "source_file": polars.String,
        "source_row": polars.Int64,
        "parent_id": polars.String,
        "method": polars.String,
        "weight": polars.Float64,
    }
    assert records["record_id"].n_unique() == 20 and set(records["record_id"].str.len_chars()) == {16}
    assert records["group_id"].null_count() == records["parent_id"].null_count() == 20
    assert records["messages"][0].to_list() == [
        {"role": "user", "content": "text 0"},
        {"role": "assistant", "content": "label 0"},
    ]
    assert manifest["splits"] == {"train": 16, "val": 2, "test": 2}
    assert manifest["labels"] == ["label 0", "label 1"] and manifest["task"] == "classification"
    assert manifest["roles"] == {"prompt": "text", "answer": "label", "how": "found"}
    assert manifest["kind"] == "dataset" and manifest["seed"] == 0
    for name in ("records.parquet", "rejected.parquet", "DATA_CARD.md"):
        assert str(tmp_path).encode() not in (tmp_path / "dataset" / name).read_bytes()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [*labelled(300), ("x", ""), ("y",)])
    for name in ("one", "two", "other"):
        make(tmp_path / name, DataConfig(sources=[source]), seed=int(name == "other"))
    for file in ("records.parquet", "rejected.parquet", "DATA_CARD.md"):
        one, two = ((tmp_path / run / "dataset" / file).read_bytes() for run in ("one", "two"))
        assert one == two
    assert not table(tmp_path / "one").equals(table(tmp_path / "other"))


def test_the_key_follows_files_config_and_seed(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", labelled(20))
    config = DataConfig(sources=[source])
    manifest = make(tmp_path, config)
    key = key_of(config)
    assert key == manifest["key"] and artifacts.is_current(tmp_path / "dataset", key)
    assert len({key, key_of(config, seed=1), key_of(DataConfig(sources=[source], val=0.2))}) == 3
    write_csv(tmp_path / "a.csv", labelled(21))
    assert key_of(config) != key
    (tmp_path / "a.csv").unlink()
    with pytest.raises(DataError, match="there is no source file"):
        key_of(config)


def test_a_failed_prepare_leaves_the_earlier_data_set_as_it_was(tmp_path: Path) -> None:
    config = DataConfig(sources=[write_csv(tmp_path / "a.csv", labelled(20))])
    make(tmp_path, config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()}
    write_csv(tmp_path / "a.csv", [("secret patient", "")] * 20)
    with pytest.raises(DataError) as caught:
        make(tmp_path, config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()} == before
    assert "secret" not in str(caught.value)


def test_no_group_crosses_a_split(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [(f"text {i}", rng.choice("ab"), f"patient {rng.randrange(40)}") for i in range(600)]
    source = write_csv(tmp_path / "a.csv", [*rows, ("lost", "a", " ")], header="text,label,patient")
    manifest = make(tmp_path, DataConfig(sources=[source], group_id="patient"))
    splits = table(tmp_path).group_by("group_id").agg(polars.col("split").n_unique())
    assert len(splits) == 40 and splits["split"].max() == 1
    assert manifest["rejected_by_reason"] == {"group_id is empty": 1}
    assert manifest["roles"]["group_id"] == "patient"


def test_identical_prompts_never_cross_a_split(tmp_path: Path) -> None:
    rng = random.Random(2)
    rows = [(f"text {rng.randrange(80)}", rng.choice("ab")) for _ in range(600)]
    make(tmp_path, DataConfig(sources=[write_csv(tmp_path / "a.csv", rows)]))
    prompts = table(tmp_path).with_columns(prompt=polars.col("messages").list.first().struct.field("content"))
    assert prompts.group_by("prompt").agg(polars.col("split").n_unique())["split"].max() == 1


def test_a_conversation_stays_with_its_own_beginning(tmp_path: Path) -> None:
    lines = []
    for i in range(200):
        chat = [{"role": "user", "content": f"q {i // 2}"}, {"role": "assistant", "content": f"a {i}"}]
        more = [{"role": "user", "content": "and then?"}, {"role": "assistant", "content": f"b {i}"}]
        lines.append(json.dumps({"messages": chat + more * (i % 2)}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    make(tmp_path, DataConfig(sources=[str(tmp_path / "a.jsonl")]))
    first = table(tmp_path).with_columns(first=polars.col("messages").list.first().struct.field("content"))
    assert first.group_by("first").agg(polars.col("split").n_unique())["split"].max() == 1


def test_test_sources_are_the_test_split_and_nothing_of_them_is_trained_on(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", [*labelled(100), ("held out", "label 0")])
    test = write_csv(tmp_path / "test.csv", [("held out", "label 1"), ("text 3", "label 1"), ("new", "label 0")])
    manifest = make(tmp_path, DataConfig(sources=[train], test_sources=[test], test=0.5))
    records = table(tmp_path)
    assert manifest["rejected_by_reason"] == {"same prompt as a test record": 2}
    assert manifest["splits"] == {"train": 89, "val": 10, "test": 3}
    assert set(records.filter(split="test")["source_file"]) == {"test.csv"}
    assert table(tmp_path, "rejected")["source_row"].to_list() == [4, 101]
    assert table(tmp_path, "rejected")["reason"][0] == "line 5: same prompt as a test record"


def test_a_group_of_the_test_file_is_not_trained_on(tmp_path: Path) -> None:
    train = write_csv(
        tmp_path / "train.csv", [(f"t {i}", "ab"[i % 2], f"p{i // 5}") for i in range(100)], "text,label,p"
    )
    test = write_csv(tmp_path / "test.csv", [("new", "a", "p0")], "text,label,p")
    manifest = make(tmp_path, DataConfig(sources=[train], test_sources=[test], group_id="p"))
    assert manifest["rejected_by_reason"] == {"same group_id as a test record": 5}


@pytest.mark.parametrize(
    ("rows", "task", "expected"),
    [
        (labelled(20), "auto", "classification"),
        (labelled(20), "generation", "generation"),
        ([(f"t {i}", f"answer {i}") for i in range(20)], "auto", "generation"),
        ([(f"t {i}", f"answer {i}") for i in range(20)], "classification", "classification"),
        ([(f"t {i}", "ab"[i % 2] * 101) for i in range(20)], "auto", "generation"),
        (labelled(257 * 5, 257), "auto", "generation"),
        (labelled(256 * 5, 256), "auto", "classification"),
        ([(f"t {i}", "same") for i in range(19)], "auto", "generation"),
        ([(f"t {i}", "same") for i in range(30)], "generation", "generation"),
    ],
)
def test_the_task_goes_by_how_the_answers_repeat(tmp_path: Path, rows: Any, task: Any, expected: str) -> None:
    manifest = make(tmp_path, DataConfig(sources=[write_csv(tmp_path / "a.csv", rows)], task=task))
    assert manifest["task"] == expected
    assert manifest["labels"] == sorted(manifest["labels"])
    assert bool(manifest["labels"]) == (expected == "classification") == (table(tmp_path)["label"].null_count() == 0)


@pytest.mark.parametrize(("count", "task"), [(20, "auto"), (5, "classification")])
def test_only_one_class_is_a_sentence(tmp_path: Path, count: int, task: Any) -> None:
    source = write_csv(tmp_path / "a.csv", [(f"t {i}", "secret") for i in range(count)])
    with pytest.raises(DataError, match=f"only one class: all {count} records") as caught:
        make(tmp_path, DataConfig(sources=[source], task=task))
    assert "secret" not in str(caught.value)


def test_all_rows_rejected_names_the_three_most_common_reasons(tmp_path: Path) -> None:
    rows = [("q", "")] * 5 + [("q",)] * 3 + [("", "a")] * 2 + [("q", "a", "b", "c")]
    with pytest.raises(DataError, match=r"all 11 rows") as caught:
        make(tmp_path, DataConfig(sources=[write_csv(tmp_path / "a.csv", rows)]))
    assert "answer is empty (5); 1 field, expected 2 (3); prompt is empty (2)" in caught.value.message
    assert not (tmp_path / "dataset").exists()


def test_files_of_different_kinds_are_a_sentence_and_optional_columns_are_not(tmp_path: Path) -> None:
    one = write_csv(tmp_path / "one.csv", labelled(20), "instruction,output")
    two = write_csv(tmp_path / "two.csv", [("a", "b", "c"), ("d", "", "e")], "instruction,input,output")
    manifest = make(tmp_path, DataConfig(sources=[one, two]))
    assert manifest["roles"]["input"] == "input" and manifest["counts"]["kept"] == 22
    other = write_csv(tmp_path / "three.csv", labelled(20), "question,answer")
    with pytest.raises(DataError, match="do not hold the same kind of records"):
        make(tmp_path, DataConfig(sources=[one, other]))


def test_plain_text_becomes_text_records(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"第 {i} 条"}) + "\n" for i in range(20)))
    manifest = make(tmp_path, DataConfig(sources=[str(tmp_path / "a.jsonl")]))
    assert manifest["task"] == "text" and manifest["labels"] == [] and manifest["languages"]["zh"] == 20
    assert table(tmp_path)["messages"][0].to_list() == [{"role": "text", "content": "第 0 条"}]
    with pytest.raises(DataError, match="plain text without labels"):
        make(tmp_path, DataConfig(sources=[str(tmp_path / "a.jsonl")], task="classification"))


def test_json_parquet_and_jsonl_of_the_same_rows_give_the_same_messages(tmp_path: Path) -> None:
    rows = [{"问题": f"问 {i} 😀", "答案": f"答 {i}"} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    polars.DataFrame(rows).write_parquet(tmp_path / "c.parquet")
    tables = []
    for name in ("a.json", "b.jsonl", "c.parquet"):
        make(tmp_path / name[:1], DataConfig(sources=[str(tmp_path / name)]))
        tables.append(table(tmp_path / name[:1])["messages"].to_list())
    assert tables[0] == tables[1] == tables[2]


def test_the_card_reconciles_with_the_manifest(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a|b.csv", [*labelled(40), ("x", ""), ("y", ""), ("z",)])
    make(tmp_path, DataConfig(sources=[source], prompt="Classify: {text}", answer="label"))
    card = (tmp_path / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    assert 'language: ["en"]' in front and "task_categories: [text-classification]" in front
    assert "43 source rows: 40 kept as records, 0 merged into others, 3 rejected" in card
    assert "源数据共 43 行：保留 40 条记录，合并重复 0 行，拒绝 3 行" in card
    assert "| answer is empty | 2 |" in card and "| 1 field, expected 2 | 1 |" in card
    assert "| a\\|b.csv | csv | 43 | 40 | 0 | 3 |" in card and "| prompt | Classify: {text} |" in card
    assert "named in the recipe" in card and "text 1" not in card


def test_a_ten_megabyte_record_and_right_to_left_text_come_through(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    rows = [(long, "a"), ("שלום", "b"), *[(f"مرحبا {i}", "ab"[i % 2]) for i in range(10)]]
    manifest = make(tmp_path, DataConfig(sources=[write_csv(tmp_path / "a.csv", rows)]))
    assert table(tmp_path)["messages"][0][0]["content"] == long
    assert manifest["languages"] == {"zh": 0, "en": 1, "other": 11}


def test_croissant_names_the_files_as_they_are_and_the_counts(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [*labelled(40), ("text 1", "label 1"), ("x", "")])
    manifest = make(tmp_path, DataConfig(sources=[source]))
    described = json.loads((tmp_path / "dataset" / "croissant.json").read_text(encoding="utf-8"))
    files = {entry["@id"]: entry["sha256"] for entry in described["distribution"]}
    assert files == {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".parquet")}
    assert {field["name"] for field in described["recordSet"][0]["field"]} == set(table(tmp_path).columns)
    assert described["description"].startswith("42 source rows: 40 kept, 1 merged, 1 rejected; 0 synthetic records")


def test_croissant_is_valid_and_reads_the_records(tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    make(tmp_path, DataConfig(sources=[write_csv(tmp_path / "a.csv", [("question 0", "a"), *labelled(40)])]))
    described = mlcroissant.Dataset(tmp_path / "dataset" / "croissant.json")  # raises for what is not valid
    first = next(iter(described.records("records")))
    turns = [turn["records/messages/content"].decode() for turn in first["records/messages"]]
    assert turns == ["question 0", "a"] and first["records/source_row"] == 1
