"""Tries to get a traceback, a silent success, a leaked record or a spoiled run out of every command, by bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metier import cli
from metier.artifacts import digest_file, read_manifest
from metier.model import load
from metier.training import cards

SECRET = "SECRETTEXT"
LABELS = ("heart", "lung")
Cli = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def rows_of(number: int, text: str = f"{SECRET} note") -> str:
    """A CSV of `number` records with two labels."""
    return "text,label\n" + "".join(f"{text} {i},{LABELS[i % 2]}\n" for i in range(number))


def tree(folder: Path) -> dict[str, str]:
    """Every name under `folder`, with its digest where it is a file; the lock's own file is none of the run's."""
    found = {}
    for path in folder.rglob("*"):
        if path.name != ".lock":
            found[path.relative_to(folder).as_posix()] = digest_file(path) if path.is_file() else "folder"
    return found


def recipe_text(source: Path | str, base: Path | str, **changes: Any) -> str:
    """A recipe that trains 2 steps in a second; `changes` replace whole sections, or entries of `data`."""
    data = {"sources": [str(source)], "prompt": "Note: {text}", "answer": "label", "val": 4, "test": 8}
    values = {
        "base": str(base), "out": "run", "data": data | changes.pop("data", {}), "adapter": {"rank": 2},
        "train": {"max_steps": 2, "micro_batch_size": 4, "precision": "fp32", "device": "cpu"},
        "evaluate": {"max_items": 4, "max_new_tokens": 2, "bootstrap_samples": 100},
    }  # fmt: skip
    return yaml.safe_dump(values | changes, sort_keys=False, allow_unicode=True)


@contextlib.contextmanager
def signals_as_they_were() -> Iterator[None]:
    """The command line takes over two signals; the test run needs them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def call(*argv: str | Path) -> int:
    """`metier ARGV` in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, signals_as_they_were(), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["metier", *map(str, argv)])
        # What the command line would set for the rest of the process.
        for name, value in {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}.items():
            patch.setenv(name, value)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        cli.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with data.csv and the finished run of it, made by the command line itself."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data.csv").write_text(rows_of(48))
    (folder / "recipe.yaml").write_text(recipe_text(folder / "data.csv", tiny_base))
    with contextlib.chdir(folder):
        assert call("run", "recipe.yaml") == 0
    assert (folder / "run" / "report.html").exists()
    return folder


@pytest.fixture
def here(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of the finished run and its recipe; what `metier run recipe.yaml` finds done."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy(finished / "recipe.yaml", tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def metier(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the command line with `stdin`."""

    def run(*argv: str | Path, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = call(*argv)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2 and a sentence with `words`, without a traceback or a record's text."""
    assert result.code == 2, result
    assert result.err.strip()
    for word in words:
        assert word in result.err, result.err
    for text in (result.out, result.err):
        assert "Traceback" not in text
        assert SECRET not in text


def assert_refused_twice(metier: Cli, here: Path, argv: list[str], *words: str, is_late: bool = False) -> None:
    """Refused over a finished run, which stays as it was, and in a fresh folder, where nothing half-made is left.

    `is_late` is for what shows after the data set was made: that one then stays, complete.
    """
    before = tree(here)
    assert_refused(metier(*argv), *words)
    assert tree(here) == before
    assert_refused(metier(*argv, "--out", "runs/fresh"), *words)
    if is_late:
        assert {p.name for p in (here / "runs/fresh").iterdir()} == {"dataset", "recipe.yaml", "audit.jsonl", ".lock"}
        assert read_manifest(here / "runs/fresh/dataset") is not None
        shutil.rmtree(here / "runs")
    assert tree(here) == before


def test_the_finished_run_is_up_to_date_to_begin_with(metier: Cli, here: Path) -> None:
    before = tree(here)
    result = metier("run", "recipe.yaml")
    assert result.code == 0
    assert result.err.splitlines() == ["dataset: up to date", "adapter: up to date", "evidence: up to date"]
    assert tree(here) == before


BAD_RECIPES: dict[str, tuple[str | bytes, list[str]]] = {
    "broken yaml": ("base: [x\nout: run\n", ["bad.yaml, line 2: not valid YAML"]),
    "a tab": ("base: x\n\tout: run\n", ["bad.yaml, line 2: not valid YAML"]),
    "empty": ("", ["`bad.yaml` holds no recipe", "hint: "]),
    "a list": ("- base\n- out\n", ["`bad.yaml` holds no recipe"]),
    "two documents": ("base: x\n---\nbase: y\n", ["bad.yaml", "not valid YAML"]),
    "not utf-8": ("base: 模型\n".encode("gb18030"), ["`bad.yaml` is not UTF-8 (byte 8)"]),
    "nested beyond sense": ("base: " + "[" * 2000, ["`bad.yaml`", "nested too deeply"]),
    "an object": ("base: !!python/object:os.system {}\n", ["bad.yaml, line 1: not valid YAML"]),
    "an impossible date": ("base: 2024-13-45\n", ["bad.yaml: not valid YAML"]),
    "a key twice": ("base: x\nbase: y\n", ["bad.yaml, line 2", "`base` stands on line 1 already"]),
    "a number as key": ("base: x\nout: y\n7: z\ndata: {sources: [a.csv]}\n", ["bad.yaml", "7"]),
    "nothing required": ("seed: 1\n", ["`base` is missing", "`out` is missing", "`data` is missing"]),
    "a NUL in the folder": ('base: x\nout: "a\\0b"\ndata: {sources: [a.csv]}\n', ["bad.yaml", "NUL"]),
    "a surrogate": ('base: x\nout: "\\uD800"\ndata: {sources: [a.csv]}\n', ["bad.yaml, line 2", "`out`"]),
    "an unknown user's home": (
        "base: x\nout: run\ndata: {sources: [~nobody-x/a.csv]}\n",
        ["no source file", "~nobody-x"],
    ),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_be_read_is_refused(metier: Cli, here: Path, case: str) -> None:
    text, words = BAD_RECIPES[case]
    (here / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(here)
    for command in ("run", "prepare", "train", "evaluate", "inspect"):
        if case == "an unknown user's home" and command in ("train", "evaluate"):
            continue  # they do not read the sources
        assert_refused(metier(command, "bad.yaml"), *words)
    assert tree(here) == before


BAD_VALUES: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("train.epoch=1", ["unknown key `train.epoch`", "did you mean `epochs`"]),
    "unknown section": ("trian.epochs=1", ["unknown key `trian`", "did you mean `train`"]),
    "text for a number": ("train.epochs=many", ["`train.epochs` is 'many'", "valid number"]),
    "a list for text": ("base=[a]", ["`base` is ['a']", "valid string"]),
    "text for a list": ("data.sources=data.csv", ["`data.sources` is 'data.csv'", "valid list"]),
    "a section for a value": ("data=5", ["`data` is 5"]),
    "no sources": ("data.sources=[]", ["`data.sources` is []", "at least 1 item"]),
    "rank 0": ("adapter.rank=0", ["`adapter.rank` is 0", "greater than or equal to 1"]),
    "no target modules": ("adapter.target_modules=[]", ["`adapter.target_modules` is []"]),
    "negative learning rate": ("train.learning_rate=-1e-4", ["`train.learning_rate` is -0.0001", "greater than 0"]),
    "infinite learning rate": ("train.learning_rate=.inf", ["`train.learning_rate` is inf", "finite"]),
    "NaN": ("train.weight_decay=.nan", ["`train.weight_decay` is nan", "finite"]),
    "cosine upwards": ("train.min_learning_rate=1", ["train.min_learning_rate is above"]),
    "unknown precision": ("train.precision=int4", ["`train.precision` is 'int4'", "'fp32'"]),
    "unknown device": ("train.device=tpu", ["`train.device` is 'tpu'"]),
    "unknown preset": ("preset=fast", ["`preset` is 'fast'"]),
    "a share above 1": ("data.test=1.5", ["`data.test` is 1.5"]),
    "a truth for a number": ("seed=true", ["`seed` is True"]),
    "two shapes at once": ("data.messages=m", ["name either prompt and answer, or messages, or text"]),
    "max_seq_len 1": ("train.max_seq_len=1", ["`train.max_seq_len` is 1"]),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_wrong_value_is_refused_with_its_place(metier: Cli, here: Path, case: str) -> None:
    override, words = BAD_VALUES[case]
    extra = ["--set", "train.learning_rate=1e-3"] if case == "cosine upwards" else []
    assert_refused_twice(metier, here, ["run", "recipe.yaml", *extra, "--set", override], *words)


def test_a_wrong_value_in_the_file_is_told_with_its_line(metier: Cli, here: Path) -> None:
    text = (here / "recipe.yaml").read_text().replace("rank: 2", "rank: 0")
    (here / "bad.yaml").write_text(text)
    line = 1 + text[: text.index("rank: 0")].count("\n")
    assert_refused_twice(metier, here, ["run", "bad.yaml"], f"bad.yaml, line {line}: `adapter.rank` is 0")


@pytest.mark.parametrize("override", ["train.epochs", "=1", ""])
def test_an_override_without_key_and_value_is_refused(metier: Cli, here: Path, override: str) -> None:
    argv = ["run", "recipe.yaml", "--set", override]
    assert_refused_twice(metier, here, argv, f"`--set {override}`: expected key=value")


def jsonl(*rows: Any) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


MESSAGES = {"prompt": None, "answer": None, "messages": "messages"}
NO_RECORD = "no record is left to train on"
# name, content, changes to the recipe's `data`, words
BAD_DATA: dict[str, tuple[str, str | bytes | None, dict[str, Any], list[str]]] = {
    "missing": ("no.csv", None, {}, ["there is no source file", "no.csv", "hint: sources are relative"]),
    "no match": ("*.tsv", None, {}, ["*.tsv` matches no file"]),
    "another format": ("a.doc", b"PK", {}, ["extension `.doc`", ".csv"]),
    "a damaged spreadsheet": ("a.xlsx", b"PK", {}, ["no Excel workbook, or a damaged one"]),
    "a damaged archive": ("a.csv.gz", b"\x1f\x8b", {}, ["a.csv.gz` is damaged or cut off"]),
    "wrong column in the template": (
        "a.csv",
        rows_of(40),
        {"prompt": "Note: {txt}"},
        ["`data.prompt`", "no column `txt` (did you mean `text`?)"],
    ),
    "wrong answer column": (
        "a.csv",
        rows_of(40),
        {"answer": "lable"},
        ["`data.answer`", "no column `lable`", "`label`"],
    ),
    "wrong group column": ("a.csv", rows_of(40), {"group_id": "pid"}, ["`data.group_id`", "no column `pid`"]),
    "a template of nothing": ("a.csv", rows_of(40), {"prompt": "{}"}, ["`data.prompt`", "no column ``"]),
    "a lone brace": ("a.csv", rows_of(40), {"prompt": "{text"}, ["`data.prompt`: a brace stands alone"]),
    "every row ragged": (
        "a.csv",
        "text,label\n" + f"{SECRET},a,b,c\n" * 30,
        {},
        [NO_RECORD, "4 fields, expected 2 (30)"],
    ),
    "a quote without end": ("a.csv", rows_of(9) + f'"{SECRET}\n' + rows_of(9), {}, ["a.csv`, line 11: a quote opens"]),
    "two columns of one name": ("a.csv", f"text,text\n{SECRET},b\n", {}, ["two columns are named `text`"]),
    "a column without name": ("a.csv", f",text,label\n0,{SECRET},b\n", {}, ["column 1 of 3 has no name"]),
    "every json line broken": (
        "a.jsonl",
        ('{"text": "' + SECRET + "\n") * 30,
        {},
        ["no row could be read", "line 1, column"],
    ),
    "json lines of lists": ("a.jsonl", f'["{SECRET}"]\n' * 30, {}, ["no row could be read; line 1: not a JSON object"]),
    "a broken json file": (
        "a.json",
        f'[{{"text": "{SECRET}", "label" 1}}]',
        {},
        ["a.json`, line 1, column", "not valid JSON"],
    ),
    "half a surrogate in a key": (
        "a.jsonl",
        '{"\\ud800": "' + SECRET + '", "label": "x"}\n',
        {"prompt": None, "answer": None},
        ["half of a surrogate"],
    ),
    "no parquet": ("a.parquet", f"{SECRET} is no parquet".encode(), {}, ["a.parquet` is not a Parquet file"]),
    "every answer empty": ("a.csv", "text,label\n" + f"{SECRET},\n" * 30, {}, [NO_RECORD, "answer is empty (30)"]),
    "every prompt empty": ("a.csv", "text,label\n" + " ,heart\n" * 30, {}, [NO_RECORD, "prompt is empty"]),
    "every text NaN": ("a.csv", "text,label\n" + "NaN,heart\n" * 30, {}, [NO_RECORD, "NaN"]),
    "every answer NaN": ("a.jsonl", jsonl({"text": SECRET, "label": float("nan")}) * 30, {}, ["NaN is not JSON"]),
    "one class": ("a.csv", rows_of(40).replace("lung", "heart"), {}, ["only one class: all 40 records"]),
    "an encoding that is none of ours": (
        "a.csv",
        rows_of(40, f"{SECRET}カルテ").encode("shift_jis"),
        {},
        ["a.csv`: its encoding is none of UTF-8", "encoding: shift_jis"],
    ),
    "an unknown encoding": ("a.csv", rows_of(40), {"encoding": "gb1803"}, ["there is no encoding `gb1803`"]),
    "empty": ("a.csv", "", {}, ["a.csv` is empty"]),
    "empty json lines": ("a.jsonl", "\n\n", {}, ["a.jsonl`"]),
    "header only": ("a.csv", "text,label\n", {}, ["a.csv` has a header and no rows"]),
    "too few groups": (
        "a.csv",
        "text,label\n" + f"{SECRET},a\n{SECRET},b\n" * 10,
        {},
        ["in 1 group, too few for train"],
    ),
    "a test split above the data": ("a.csv", rows_of(20), {"test": 500}, ["asks for 500", "of 20 records"]),
    "unclear columns": (
        "a.csv",
        f"a,b,c\n{SECRET},2,3\n",
        {"prompt": None, "answer": None},
        ["not clear which column", "`a`, `b`, `c`"],
    ),
    "no header, long text": (
        "a.csv",
        f"{'x' * 50}{SECRET},b,c\n1,2,3\n",
        {"prompt": None, "answer": None},
        ["not clear which column"],
    ),
    "bad roles": (
        "a.jsonl",
        jsonl(talk(("doctor", SECRET), ("assistant", "b"))) * 30,
        MESSAGES,
        [NO_RECORD, "role is none of"],
    ),
    "no answer": ("a.jsonl", jsonl(talk(("user", SECRET))) * 30, MESSAGES, [NO_RECORD, "not the assistant's"]),
    "system in the middle": (
        "a.jsonl",
        jsonl(talk(("user", SECRET), ("system", "s"), ("assistant", "b"))) * 30,
        MESSAGES,
        [NO_RECORD, "system"],
    ),
    "messages of text": ("a.csv", "messages\n" + f"{SECRET}\n" * 30, MESSAGES, [NO_RECORD, "not valid JSON"]),
    "text as classification": (
        "a.csv",
        rows_of(40),
        {"prompt": None, "answer": None, "text": "text", "task": "classification"},
        ["`data.task`"],
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_records_that_cannot_be_used_are_refused(metier: Cli, here: Path, tiny_base: Path, case: str) -> None:
    name, content, changes, words = BAD_DATA[case]
    if content is not None:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (here / "bad.yaml").write_text(recipe_text(name, tiny_base, data=changes), encoding="utf-8")
    assert_refused_twice(metier, here, ["run", "bad.yaml"], *words)
    before = tree(here)
    assert_refused(metier("inspect", "bad.yaml"), *words)
    assert_refused(metier("prepare", "bad.yaml", "--out", "prepared"), *words)
    assert tree(here) == before


def test_a_test_file_that_is_the_only_source_is_refused(metier: Cli, here: Path, tiny_base: Path) -> None:
    (here / "a.csv").write_text(rows_of(40))
    (here / "bad.yaml").write_text(recipe_text("a.csv", tiny_base, data={"test_sources": ["a.csv"]}))
    assert_refused_twice(
        metier, here, ["run", "bad.yaml"], "every file of `data.sources` is also in `data.test_sources`"
    )


def test_an_empty_test_split_is_told_before_training(metier: Cli, here: Path, tiny_base: Path) -> None:
    (here / "few.csv").write_text(rows_of(30), encoding="utf-8")
    (here / "few.yaml").write_text(recipe_text(here / "few.csv", tiny_base, out="few", data={"test": 0}))
    for verb in ("run", "sweep"):
        assert_refused(metier(verb, "few.yaml"), "no test records", "`data.test`")
        assert (here / "few" / "dataset" / "manifest.json").exists()
        assert not list((here / "few").glob("*adapter*")) and not list((here / "few").glob("*sweep*"))
    assert metier("train", "few.yaml").code == 0  # an adapter without a verdict is made by its own verb


def test_a_file_name_that_is_not_utf8_is_refused(metier: Cli, here: Path, tiny_base: Path) -> None:
    name = os.fsdecode(b"\xb2\xa1\xc0\xfa.csv")
    try:
        (here / name).write_text(rows_of(40))
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (here / "bad.yaml").write_text(recipe_text("*.csv", tiny_base))
    assert_refused_twice(
        metier, here, ["run", "bad.yaml"], r"\udcb2\udca1\udcc0\udcfa.csv' is not UTF-8", "hint: rename"
    )
    (here / name).unlink()
    folder = here / os.fsdecode(b"\xb2")
    folder.mkdir()
    (folder / "data.csv").write_text(rows_of(40))
    (folder / "bad.yaml").write_text(recipe_text("data.csv", tiny_base))
    assert_refused_twice(metier, here, ["run", str(folder / "bad.yaml")], "is not UTF-8", "hint: rename")
    assert_refused(metier("run", "recipe.yaml", "--out", os.fsdecode(b"\xb2out")), "`out`")


@pytest.mark.parametrize("verb", ["run", "train", "evaluate"])
@pytest.mark.parametrize("place", [0.3, 0.999])
def test_a_damaged_data_set_of_the_same_size_is_a_sentence(metier: Cli, here: Path, verb: str, place: float) -> None:
    path = here / "run/dataset/records.parquet"
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * place)] ^= 0xFF
    path.write_bytes(raw)
    words = ["run/dataset/records.parquet` is damaged", "hint: remove", "metier prepare"]
    assert_refused(metier(verb, "recipe.yaml", "--set", "train.epochs=2"), *words)


SOME_ROWS_BROKEN = {
    "ragged": ("a.csv", rows_of(40) + f"{SECRET},a,b\n", 1, "line 42: 3 fields, expected 2"),
    "NaN": ("a.csv", rows_of(40) + f"{SECRET},NaN\n", 1, "line 42: answer is NaN or infinite"),
    "broken json": (
        "a.jsonl",
        jsonl(*({"text": f"{SECRET} {i}", "label": LABELS[i % 2]} for i in range(40)), '{"text": "' + SECRET + "\n"),
        1,
        "line 41, column 10: not valid JSON: Unterminated string",
    ),
    "10 MB of broken json": (
        "a.jsonl",
        jsonl(*({"text": f"{SECRET} {i}", "label": LABELS[i % 2]} for i in range(40)), '{"text": "' + SECRET * 2**20),
        1,
        "line 41, column 10: not valid JSON: Unterminated string",
    ),
    "10 MB in a csv cell": ("a.csv", rows_of(40) + f"{SECRET * 2**20},\n", 1, "line 42: answer is empty"),
    "a good 10 MB row": ("a.csv", rows_of(40) + f"{SECRET * 2**20},heart\n", 0, None),
    "a byte-order mark and CRLF": ("a.csv", "\ufeff" + rows_of(40).replace("\n", "\r\n"), 0, None),
    "gb18030": ("a.csv", rows_of(40, "病历记录").encode("gb18030"), 0, None),
    "utf-16": ("a.csv", rows_of(40, "病历").encode("utf-16"), 0, None),
}


@pytest.mark.parametrize("case", SOME_ROWS_BROKEN)
def test_a_broken_row_among_good_ones_is_rejected_and_counted(
    metier: Cli, here: Path, tiny_base: Path, case: str
) -> None:
    import polars

    name, content, number, reason = SOME_ROWS_BROKEN[case]
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (here / "some.yaml").write_text(recipe_text(name, tiny_base))
    result = metier("prepare", "some.yaml", "--out", "other")
    assert result.code == 0, result.err
    assert SECRET not in result.out + result.err
    assert f" + {number} rejected" in result.out
    rejected = polars.read_parquet(here / "other/dataset/rejected.parquet")["reason"].to_list()
    assert rejected == ([reason] if number else [])


@pytest.mark.parametrize(
    ("case", "text", "label"),
    [("emoji", "😀 patient 👩🏽‍⚕️ is fine", "🫀"), ("right to left", "السعال الحاد 50% שלום", "القلب")],
)
def test_emoji_and_right_to_left_text_go_the_whole_way(
    metier: Cli, here: Path, tiny_base: Path, case: str, text: str, label: str
) -> None:
    (here / "a.csv").write_text(rows_of(40, text).replace("heart", label), encoding="utf-8")
    (here / "good.yaml").write_text(recipe_text("a.csv", tiny_base), encoding="utf-8")
    result = metier("run", "good.yaml", "--out", f"runs/{case} {label}")
    assert result.code == 0, result.err
    assert "verdict: " in result.out
    run = here / f"runs/{case} {label}"
    assert label in read_manifest(run / "dataset")["labels"]  # type: ignore[index]
    result = metier("generate", run, "--prompt", text, "--max-new-tokens", "2")
    assert result.code == 0, result.err


HAS_NO_GPU = not torch.cuda.is_available()
BAD_TRAINING: dict[str, tuple[list[str], list[str]]] = {
    "target module": (
        ["adapter.target_modules=[q_prj]"],
        ["no linear layer `q_prj` (did you mean `q_proj`?)", "all-linear"],
    ),
    "fp16 on a cpu": (["train.precision=fp16"], ["`precision: fp16` needs a GPU", "hint: "]),
    "fp8 on a cpu": (
        ["train.precision=fp8", "train.device=cpu"],
        ["`precision: fp8` needs a CUDA GPU", "hint: `precision: auto`"],
    ),
    "nf4 on a cpu": (["train.precision=nf4", "train.device=cpu"], ["`precision: nf4` needs a CUDA GPU", "hint: "]),
    "no gpu": (["train.device=cuda"], ["`device: cuda` was asked for", "hint: `device: auto`"]),
    "too short for every record": (["train.max_seq_len=8"], ["none of ", "above train.max_seq_len 8", "hint: raise"]),
    "missing base": (["base=./models/llama"], ["there is no base model at", "models/llama`"]),
    "missing alias": (["base=smollm2-135"], ["`smollm2-135` is no base model", "did you mean `smollm2-135m`?"]),
    "hub id while offline": (
        ["base=meta-llama/Llama-2-7b-hf"],
        ["`meta-llama/Llama-2-7b-hf` is not", "HF_HUB_OFFLINE"],
    ),
    "revision of a folder": (["revision=main"], ["is no hub model", "revision `main`"]),
    "an empty base folder": (["base=./empty"], ["empty` is no model: it has no config.json", "hint: name the folder"]),
    "a base without weights": (["base=./config"], ["config` has a config.json but no *.safetensors"]),
    "a pickle": (["base=./pickle"], ["pickle` holds pickled weights only", "hint: convert it"]),
    "a base that is a file": (["base=./recipe.yaml"], ["recipe.yaml` is a file, and no GGUF file"]),
    "damaged weights": (["base=./damaged"], ["model.safetensors` is damaged"]),
    "an adapter as base": (["base=./run/adapter"], ["run/adapter` holds an adapter"]),
    "a hub id of dots": (["base=a/../b"], ["there is no base model at `a/../b`"]),
}


@pytest.fixture
def bad_bases(here: Path, tiny_base: Path) -> None:
    """Folders that are no base models."""
    for name in ("empty", "config", "pickle", "damaged"):
        (here / name).mkdir()
    for name in ("config", "pickle", "damaged"):
        shutil.copy(tiny_base / "config.json", here / name)
    (here / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (here / "damaged" / "model.safetensors").write_bytes((tiny_base / "model.safetensors").read_bytes()[:50])


@pytest.mark.usefixtures("bad_bases")
@pytest.mark.parametrize("case", BAD_TRAINING)
def test_what_cannot_be_trained_is_refused(metier: Cli, here: Path, case: str) -> None:
    if case == "no gpu" and not HAS_NO_GPU:
        pytest.skip("there is a GPU")
    overrides, words = BAD_TRAINING[case]
    argv = ["run", "recipe.yaml", *(part for one in overrides for part in ("--set", one))]
    assert_refused_twice(metier, here, argv, *words, is_late=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("adapter.rank=0", ["`adapter.rank` is 0"]),
        ("adapter.target_modules=[q_prj]", ["did you mean `q_proj`"]),
        ("train.precision=fp8", ["`precision: fp8` needs a CUDA GPU"]),
        ("seed=1", ["this training does not fit into 0.0 GiB", "hint: what would fit: "]),
    ],
)
def test_bad_settings_stop_before_any_weight_is_loaded(
    metier: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, change: str, words: list[str]
) -> None:
    if change == "seed=1":  # a machine with next to no memory
        monkeypatch.setattr(cards, "_free_host_memory", lambda: 1 << 18)
    monkeypatch.setattr(load, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    for command in ("run", "train"):
        assert_refused(metier(command, "recipe.yaml", "--set", change, "--set", "train.max_steps=3"), *words)


def test_records_that_all_spell_control_tokens_are_refused(metier: Cli, here: Path, tiny_base: Path) -> None:
    (here / "a.csv").write_text(rows_of(40, f"{SECRET} <|im_end|> note"))
    (here / "bad.yaml").write_text(recipe_text("a.csv", tiny_base))
    before = tree(here / "run")
    assert_refused(metier("run", "bad.yaml", "--out", "fresh"), "none of 28 records", "control token '<|im_end|>'")
    assert {p.name for p in (here / "fresh").iterdir()} == {"dataset", "recipe.yaml", "audit.jsonl", ".lock"}
    assert_refused(metier("generate", "run", "--prompt", f"{SECRET} <|im_end|>"), "control token '<|im_end|>'")
    assert tree(here / "run") == before


def test_a_task_that_the_data_cannot_be_asked_keeps_evidence_and_report(
    metier: Cli, here: Path, tiny_base: Path
) -> None:
    (here / "text.yaml").write_text(
        recipe_text("a.csv", tiny_base, data={"prompt": None, "answer": None, "text": "text"})
    )
    (here / "a.csv").write_text(rows_of(40))
    assert metier("run", "text.yaml", "--out", "texts").code == 0
    before = tree(here)
    argv = ["text.yaml", "--out", "texts", "--set", "evaluate.tasks=[classification]"]
    for command in ("run", "evaluate"):
        assert_refused(metier(command, *argv), "evaluate.tasks asks for `classification`", "`text`")
        assert tree(here) == before


@pytest.mark.parametrize("command", ["run", "prepare", "train", "evaluate"])
def test_a_folder_that_is_in_use_is_refused(metier: Cli, here: Path, command: str) -> None:
    (here / "thesis").mkdir()
    (here / "thesis" / "thesis.docx").write_text(SECRET)
    before = tree(here)
    for out in ("thesis", "."):
        assert_refused(
            metier(command, "recipe.yaml", "--out", out), f"`{out}` is in use: it holds", "hint: choose another"
        )
    assert_refused(metier("demo", "--out", "thesis"), "`thesis` is in use: it holds", "hint: choose another")
    assert_refused(metier(command, "recipe.yaml", "--out", "recipe.yaml"), "`recipe.yaml` is a file", "hint: choose")
    assert_refused(metier(command, "recipe.yaml", "--out", "recipe.yaml/run"), "could not be written: Not a directory")
    assert tree(here) == before


def test_the_users_own_recipe_and_dataset_folder_are_no_run(metier: Cli, here: Path) -> None:
    own = here / "own"
    (own / "dataset").mkdir(parents=True)
    shutil.copy(here / "recipe.yaml", own)
    (own / "dataset" / "data.csv").write_text(rows_of(40))
    before = tree(here)
    assert_refused(metier("run", own / "recipe.yaml", "--out", "own"), "`own` is in use: it holds 2 other files")
    shutil.rmtree(own / "dataset")
    assert_refused(metier("run", own / "recipe.yaml", "--out", "own"), "`own` is in use: it holds 1 other file ")
    (own / "dataset").mkdir()
    (own / "dataset" / "data.csv").write_text(rows_of(40))
    assert tree(here) == before


def test_a_run_that_was_copied_without_its_lock_is_still_a_run(metier: Cli, here: Path) -> None:
    (here / "run" / ".lock").unlink()
    before = tree(here)
    assert metier("run", "recipe.yaml").code == 0
    assert tree(here) == before


def test_an_empty_folder_of_the_users_stays_after_a_refusal(metier: Cli, here: Path) -> None:
    (here / "mine").mkdir()
    assert_refused(metier("train", "recipe.yaml", "--out", "mine"), "`mine/dataset` is not there")
    assert list((here / "mine").iterdir()) == []


def test_a_folder_without_permission_is_refused(metier: Cli, here: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    (here / "locked").mkdir(mode=0o500)
    assert_refused(metier("run", "recipe.yaml", "--out", "locked/run"), "no permission to write", "hint: choose")


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
METIER = [sys.executable, "-c", "from metier.cli import main; main()"]
HOLD = """
import pathlib, sys
from metier.artifacts import lock_run
with lock_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate()
    return Result(process.returncode, out, err)


def start(*argv: str | Path, **options: Any) -> subprocess.Popen[str]:
    """`metier ARGV` as a process of its own, strict about its stdin."""
    env = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"}
    return subprocess.Popen(
        [*METIER, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options
    )


@pytest.mark.parametrize("command", ["run", "prepare", "train", "evaluate"])
def test_a_run_that_another_process_holds_is_refused(metier: Cli, here: Path, command: str) -> None:
    before = tree(here)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert_refused(metier(command, "recipe.yaml"), "another metier process is working in `run`", "hint: wait")
    assert tree(here) == before
    holder.communicate("")
    assert metier(command, "recipe.yaml").code == 0


def test_of_two_runs_at_once_one_works_and_the_other_is_refused(here: Path) -> None:
    results = [finish(p) for p in [start("prepare", "recipe.yaml", "--out", "both") for _ in range(2)]]
    assert {r.code for r in results} <= {0, 2}
    assert any(r.code == 0 for r in results), results
    for result in results:
        if result.code:
            assert_refused(result, "`both")
    assert read_manifest(here / "both/dataset") is not None


def test_a_refused_run_never_removes_the_lock_of_another(here: Path) -> None:
    loop = """
import contextlib, os, pathlib, sys
from metier.artifacts import lock_run
from metier.errors import RunError
out, entered = pathlib.Path(sys.argv[1]), 0
while entered < 300:
    with contextlib.suppress(RunError), lock_run(out):
        entered += 1
        mine = os.open(out / "mine", os.O_CREAT | os.O_EXCL)  # fails when another is inside
        os.close(mine)
        (out / "mine").unlink()
"""
    both = [
        subprocess.Popen([sys.executable, "-c", loop, "shared"], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    for process in both:
        _, trouble = process.communicate()
        assert process.returncode == 0, trouble
    assert list(here.glob("shared/*")) == []


def test_a_full_disk_is_refused_and_nothing_half_made_stays(here: Path, tiny_base: Path) -> None:
    (here / "a.csv").write_text(rows_of(3000))
    (here / "large.yaml").write_text(recipe_text("a.csv", tiny_base))

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    before = tree(here)
    result = finish(start("prepare", "large.yaml", preexec_fn=little))
    assert_refused(result, "` could not be written: File too large")
    assert tree(here) == before
    result = finish(start("prepare", "large.yaml", "--out", "fresh", preexec_fn=little))
    assert_refused(result, "` could not be written: File too large")
    assert tree(here) == before


LONG = "x" * 300
BAD_CALLS: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["trian", "recipe.yaml"], ["No such command 'trian'"]),
    "unknown option": (["run", "recipe.yaml", "--epochs", "1"], ["No such option", "--epochs"]),
    "no recipe named": (["run"], ["Missing argument 'recipe'"]),
    "missing recipe": (["run", "nowhere.yaml"], ["there is no recipe at `nowhere.yaml`", "hint: `metier demo`"]),
    "a folder as recipe": (["run", "run"], ["`run` is a folder"]),
    "demo data": (["demo", "--data", "icd10"], ["no demo data `icd10` (did you mean `icd10cm`?)", "china-law"]),
    "records": (["inspect", "recipe.yaml", "--records", "0"], ["--records", "greater than or equal to 1"]),
    "no prompt": (["generate", "run"], ["there is no prompt", "hint: give --prompt"]),
    "generate from nowhere": (["generate", "runs/none", "--prompt", SECRET], ["`runs/none`", "hint: "]),
    "a user who is not there": (["generate", "~nobody-here/x", "--prompt", SECRET], ["`~nobody-here/x`", "hint: "]),
    "chat with nowhere": (["chat", "./none"], ["there is no base model at `./none`", "hint: "]),
    "no tokens": (["generate", "run", "--max-new-tokens", "0", "--prompt", "a"], ["--max-new-tokens"]),
    "cold": (["generate", "run", "--temperature", "-1", "--prompt", "a"], ["--temperature"]),
    "top_p": (["generate", "run", "--top-p", "1.5", "--prompt", "a"], ["--top-p"]),
    "a number": (["generate", "run", "--seed", "x", "--prompt", "a"], ["--seed"]),
    "train before prepare": (
        ["train", "recipe.yaml", "--out", "new/er"],
        ["`new/er/dataset` is not there", "metier prepare"],
    ),
    "evaluate before prepare": (
        ["evaluate", "recipe.yaml", "--out", "new"],
        ["`new/dataset` is not there", "metier prepare"],
    ),
    "a prompt of bytes": (["generate", "run", "--prompt", os.fsdecode(b"\xb2")], ["the prompt is not UTF-8", "hint: "]),
    "a system message of bytes": (
        ["generate", "run", "--prompt", SECRET, "--system", os.fsdecode(b"\xb2")],
        ["the system message is not UTF-8"],
    ),
    "a long name of an out": (["run", "recipe.yaml", "--out", LONG], ["could not be written: File name too long"]),
    "a long name of a recipe": (["run", LONG], ["cannot be read: File name too long"]),
    "a long name of a source": (["run", "recipe.yaml", "--set", f"data.sources=[{LONG}]"], [": File name too long"]),
    "a long name of a base": (["run", "recipe.yaml", "--set", f"base={LONG}"], ["File name too long"]),
    "a long name of a run": (["generate", LONG, "--prompt", SECRET], [": File name too long"]),
    "an empty out": (["run", "recipe.yaml", "--out", ""], ["`out` is ''"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_wrong_call_is_refused(metier: Cli, here: Path, case: str) -> None:
    argv, words = BAD_CALLS[case]
    before = tree(here)
    assert_refused(metier(*argv), *words)
    assert tree(here) == before


def test_a_question_that_is_not_utf8_is_refused(metier: Cli, here: Path) -> None:
    before = tree(here)
    for command, what in (("generate", "a line of stdin"), ("chat", "the line")):
        process = start(command, "run", stdin=subprocess.PIPE, encoding="utf-8", errors="surrogateescape")
        out, err = process.communicate("\udcb2\udca1\n")
        assert_refused(Result(process.returncode, out, err), f"{what} is not UTF-8", "hint: set the terminal")
    assert tree(here) == before


def test_a_stage_before_its_turn_is_refused(metier: Cli, here: Path) -> None:
    assert metier("prepare", "recipe.yaml", "--out", "new").code == 0
    before = tree(here)
    assert_refused(metier("evaluate", "recipe.yaml", "--out", "new"), "`new/adapter` is not there", "metier train")
    assert_refused(
        metier("generate", "new", "--prompt", "a"), "the run in `new` has no adapter yet", "hint: metier run"
    )
    assert_refused(metier("chat", "new"), "the run in `new` has no adapter yet", "hint: metier run")
    assert tree(here) == before


def test_an_adapter_of_another_data_set_is_not_evaluated(metier: Cli, here: Path) -> None:
    assert metier("prepare", "recipe.yaml", "--set", "seed=1").code == 0
    assert_refused(metier("evaluate", "recipe.yaml"), "`run/adapter` was trained on another data set", "metier train")


def test_a_damaged_parent_is_refused_and_run_makes_it_anew(metier: Cli, here: Path) -> None:
    (here / "run/dataset/records.parquet").write_bytes(b"PAR1")
    (here / "run/adapter/manifest.json").write_text('{"key": 1, "digest": 2, "files": []}')
    before = tree(here)
    assert_refused(metier("train", "recipe.yaml"), "`run/dataset` is not there or not complete", "metier prepare")
    assert_refused(metier("evaluate", "recipe.yaml"), "`run/dataset` is not there or not complete", "metier prepare")
    assert tree(here) == before
    assert metier("run", "recipe.yaml").code == 0
    assert metier("generate", "run", "--prompt", "a", "--max-new-tokens", "1").code == 0
