"""Tries to leave half an artifact behind: kills, full disks, torn lines, damaged manifests, two processes at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from metier.artifacts import (
    append_audit,
    audit_artifacts,
    check_audit,
    complete,
    digest_bytes,
    digest_file,
    digest_json,
    is_current,
    lock_run,
    read_manifest,
    work_folder,
    write_atomic,
    write_json,
)
from metier.errors import RunError

ZERO = "0" * 64


def make(final: Path, key: str = "k", text: str = "result", **details: Any) -> dict[str, Any]:
    work = work_folder(final, key)
    (work / "result.txt").write_text(text)
    return complete(
        work, final, kind="test", key=key, config={"n": 1}, parents={"p": "0"}, started=time.time(), details=details
    )


def python(code: str, *arguments: object, before: str = "") -> subprocess.Popen[str]:
    """A real process that runs `code`; `before` is a shell command that sets its limits."""
    program = textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    if before:
        command = ["sh", "-c", f'{before} && exec "$0" "$@"', *command]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_digest_of_json_depends_on_values_not_on_spelling() -> None:
    assert digest_json({"a": 1, "b": "病"}) == digest_json(json.loads('{"b":  "\\u75c5", "a": 1}'))
    assert digest_json({"a": 1}) != digest_json({"a": 2})
    assert digest_json([1, 2]) != digest_json([2, 1])


def test_a_written_file_is_whole_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", b"old")
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


def test_json_that_others_cannot_read_is_never_written(tmp_path: Path) -> None:
    write_json(tmp_path / "f", {"a": "病"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "f", {"a": float("nan")})
    assert (tmp_path / "f").read_text(encoding="utf-8") == '{\n  "a": "病"\n}\n'


def test_a_manifest_tells_what_was_asked_for_and_what_came_out(tmp_path: Path) -> None:
    manifest = make(tmp_path / "a", seed=3)
    assert read_manifest(tmp_path / "a") == manifest
    assert manifest["files"] == {"result.txt": {"sha256": digest_file(tmp_path / "a" / "result.txt"), "bytes": 6}}
    assert (manifest["kind"], manifest["key"], manifest["seed"]) == ("test", "k", 3)
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "result.txt"]
    assert os.listdir(tmp_path) == ["a"]


def test_the_digest_covers_results_and_parents_but_not_logs_or_checkpoints(tmp_path: Path) -> None:
    def digest(name: str, parent: str = "0", result: str = "r", log: str = "l", checkpoint: str = "c") -> str:
        work = work_folder(tmp_path / name, "k")
        (work / "checkpoints").mkdir()
        for path, text in (("result.txt", result), ("metrics.jsonl", log), ("checkpoints/c", checkpoint)):
            (work / path).write_text(text)
        manifest = complete(
            work, tmp_path / name, kind="t", key="k", config={}, parents={"p": parent}, started=0.0, details={}
        )
        assert "checkpoints/c" not in manifest["files"]
        return str(manifest["digest"])

    first = digest("a")
    assert first == digest("b", log="other", checkpoint="other")
    assert len({first, digest("c", result="other"), digest("d", parent="1")}) == 3


def test_only_the_same_key_with_every_file_in_place_is_current(tmp_path: Path) -> None:
    final = tmp_path / "a"
    assert not is_current(final, "k")
    make(final)
    assert is_current(final, "k")
    assert not is_current(final, "another")
    (final / "result.txt").write_text("cut")
    assert not is_current(final, "k")
    (final / "result.txt").unlink()
    assert not is_current(final, "k")


def test_a_manifest_cut_anywhere_is_no_manifest(tmp_path: Path) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    whole = path.read_bytes()
    for size in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:size])
        assert not is_current(tmp_path / "a", "k")
        assert read_manifest(tmp_path / "a") is None


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"key": "k"}', '{"key": "k", "digest": "d"}', "\x00" * 90])
def test_a_file_that_is_no_manifest_is_no_artifact(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert read_manifest(tmp_path) is None
    assert not is_current(tmp_path, "k")


def test_flipped_bits_in_a_manifest_never_crash(tmp_path: Path) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        is_current(tmp_path / "a", "k")


def test_work_for_another_key_is_thrown_away_and_for_the_same_key_kept(tmp_path: Path) -> None:
    (work_folder(tmp_path / "a", "k") / "half").write_text("x")
    assert (work_folder(tmp_path / "a", "k") / "half").exists()
    assert not (work_folder(tmp_path / "a", "other") / "half").exists()


def test_completing_replaces_the_old_artifact(tmp_path: Path) -> None:
    make(tmp_path / "a", "1", "old")
    make(tmp_path / "a", "2", "new")
    assert is_current(tmp_path / "a", "2")
    assert (tmp_path / "a" / "result.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


# Kills its own process just before the n-th call that changes a name; the old artifact was made for key 1.
COMPLETE_AND_DIE = """
    import os, pathlib, signal, sys, time
    from metier import artifacts
    final, n = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    work = artifacts.work_folder(final, "2")
    (work / "result.txt").write_text("new")
    calls = 0
    replace = os.replace
    def counted(*arguments):
        global calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
    os.replace = counted
    artifacts.complete(work, final, kind="test", key="2", config={}, parents={}, started=time.time(), details={})
"""


def test_what_a_killed_write_left_beside_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "a", "k")
    (work / "checkpoints" / ".step-1.tmp").mkdir(parents=True)
    for name in (".result.txt.tmp", "checkpoints/.step-1.tmp/.state.tmp"):
        (work / name).write_text("half")
    assert make(tmp_path / "a")["digest"] == make(tmp_path / "b")["digest"]
    assert list((tmp_path / "a").glob("*.tmp")) == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_completion_killed_between_any_two_renames_leaves_one_whole_artifact(tmp_path: Path, n: int) -> None:
    final = tmp_path / "a"
    make(final, "1", "old")
    process = python(COMPLETE_AND_DIE, final, n)
    _, trouble = process.communicate()
    assert process.returncode == -signal.SIGKILL, trouble
    work = work_folder(final, "2")  # what the next run does first
    assert is_current(final, "1")
    assert (final / "result.txt").read_text() == "old"
    assert (work / "result.txt").read_text() == "new"
    complete(work, final, kind="test", key="2", config={}, parents={}, started=time.time(), details={})
    assert is_current(final, "2")
    assert os.listdir(tmp_path) == ["a"]


def test_a_completion_is_killed_at_the_end_only_when_it_is_done(tmp_path: Path) -> None:
    make(tmp_path / "a", "1", "old")
    process = python(COMPLETE_AND_DIE, tmp_path / "a", 4)
    _, trouble = process.communicate()
    assert process.returncode == 0, trouble
    assert is_current(tmp_path / "a", "2")


def read_chain(out: Path) -> list[dict[str, Any]]:
    """The audit's entries, after checking that each line names the digest of the one before."""
    lines = (out / "audit.jsonl").read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    assert [e["previous"] for e in entries] == [ZERO, *(digest_bytes(line) for line in lines[:-1])]
    return entries


def test_audit_lines_form_a_chain(tmp_path: Path) -> None:
    for n in range(4):
        append_audit(tmp_path, "train", number=n, note="病")
    entries = read_chain(tmp_path)
    assert [e["number"] for e in entries] == [0, 1, 2, 3]
    assert {"time", "user_id", "action", "previous"} <= entries[0].keys()


@pytest.mark.parametrize("line", [0, 1, 2])
def test_an_altered_or_missing_audit_line_breaks_the_chain(tmp_path: Path, line: int) -> None:
    for n in range(4):
        append_audit(tmp_path, "train", number=n)
    lines = (tmp_path / "audit.jsonl").read_bytes().splitlines(keepends=True)
    altered = [*lines[:line], lines[line].replace(b'"number"', b'"numbre"'), *lines[line + 1 :]]
    for changed in (altered, lines[:line] + lines[line + 1 :]):
        (tmp_path / "audit.jsonl").write_bytes(b"".join(changed))
        with pytest.raises(AssertionError):
            read_chain(tmp_path)


def test_a_torn_last_audit_line_is_removed_and_the_chain_goes_on(tmp_path: Path) -> None:
    append_audit(tmp_path, "prepare")
    append_audit(tmp_path, "train")
    whole = (tmp_path / "audit.jsonl").read_bytes()
    for size in range(whole.index(b"\n") + 2, len(whole), 9):
        (tmp_path / "audit.jsonl").write_bytes(whole[:size])
        append_audit(tmp_path, "evaluate")
        assert [e["action"] for e in read_chain(tmp_path)] == ["prepare", "evaluate"]


HOLD = """
    import pathlib, sys
    from metier.artifacts import lock_run
    with lock_run(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_a_second_process_cannot_enter_a_run_and_can_after_the_first(tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = python(HOLD, out)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="another metier process is working in"), lock_run(out):
        pass
    holder.communicate("")
    with lock_run(out):
        pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    holder = python(HOLD, tmp_path / "run")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with lock_run(tmp_path / "run"):
        pass


def test_a_run_never_mixes_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(RunError, match="is in use: it holds 1 other file "), lock_run(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["thesis.docx"]


def test_a_file_where_the_run_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(RunError, match="is a file, and a run needs a folder"), lock_run(tmp_path / "out"):
        pass
    with pytest.raises(RunError, match="could not be written: Not a directory"), lock_run(tmp_path / "out" / "run"):
        pass


def test_a_run_that_is_there_can_be_entered_again(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"):
        (tmp_path / "run" / "recipe.yaml").write_text("x")
        (tmp_path / "run" / "report.html").write_text("x")
    with lock_run(tmp_path / "run"):
        pass


# A disk of 64 KiB that really is full, in a mount namespace of its own.
SMALL_DISK = """
    import errno, pathlib, shutil, sys, time
    from metier import artifacts
    from metier.errors import RunError
    disk = pathlib.Path(sys.argv[1])
    final = disk / "a"

    def make(key, size):
        work = artifacts.work_folder(final, key)
        artifacts.write_atomic(work / "result.bin", b"x" * size)
        artifacts.complete(work, final, kind="t", key=key, config={}, parents={}, started=time.time(), details={})

    make("1", 20_000)
    artifacts.append_audit(disk, "train")
    try:
        make("2", 60_000)
        sys.exit("the disk took more than it has")
    except RunError as error:
        assert error.__cause__.errno == errno.ENOSPC, error
        print(error.message)
    assert artifacts.is_current(final, "1")
    assert (final / "result.bin").stat().st_size == 20_000
    assert not list((disk / ".a.partial").glob("*.tmp")) + list((disk / ".a.partial").glob(".*.tmp"))
    make("3", 8_000)
    assert artifacts.is_current(final, "3")

    lines = (disk / "audit.jsonl").read_bytes()
    filler = (disk / "filler").open("wb")
    try:
        while filler.write(b"x" * 512) and not filler.flush():
            pass
    except OSError:
        pass
    try:
        for _ in range(200):
            artifacts.append_audit(disk, "train", note="n" * 500)
        sys.exit("the disk took more than it has")
    except RunError as error:
        assert error.__cause__.errno == errno.ENOSPC, error
    assert (disk / "audit.jsonl").read_bytes().startswith(lines)
"""


def test_a_full_disk_is_a_sentence_and_keeps_the_good_artifact(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1) to mount a small disk")
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts of one's own")
    inner = f'{mount} && exec "{sys.executable}" -c "$0" "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inner, textwrap.dedent(SMALL_DISK), tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"the disk is full: `.*result.bin` could not be written\n", done.stdout)


WRITE_TOO_MUCH = """
    import pathlib, sys
    from metier.artifacts import write_atomic
    from metier.errors import RunError
    path = pathlib.Path(sys.argv[1])
    try:
        write_atomic(path, b"x" * 100_000)
    except RunError as error:
        print(error.message)
"""


def test_a_limit_on_file_size_is_a_sentence_and_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    process = python(WRITE_TOO_MUCH, tmp_path / "f", before="ulimit -f 8")
    talk, trouble = process.communicate()
    assert process.returncode == 0, trouble
    assert talk.endswith("could not be written: File too large\n")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_without_permission_is_a_sentence(tmp_path: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="no permission to write"):
        write_atomic(tmp_path / "f", b"x")


def test_every_altered_audit_line_is_found_and_stops_the_work(tmp_path: Path) -> None:
    for n in range(4):
        append_audit(tmp_path, "train", number=n)
    whole = (tmp_path / "audit.jsonl").read_bytes()
    assert check_audit(tmp_path) == []
    lines = whole.splitlines(keepends=True)
    for i in range(len(lines)):
        (tmp_path / "audit.jsonl").write_bytes(
            b"".join([*lines[:i], lines[i].replace(b"train", b"trail"), *lines[i + 1 :]])
        )
        assert any(f"line {i + 1}: altered" in problem for problem in check_audit(tmp_path))
        before = (tmp_path / "audit.jsonl").read_bytes()
        with pytest.raises(RunError, match="tampered"):
            append_audit(tmp_path, "train")
        assert (tmp_path / "audit.jsonl").read_bytes() == before
        if i + 1 < len(lines):
            (tmp_path / "audit.jsonl").write_bytes(b"".join([*lines[:i], *lines[i + 1 :]]))
            assert any("missing" in problem for problem in check_audit(tmp_path))


def test_a_stage_whose_line_was_lost_to_a_kill_gets_it_at_the_next_start(tmp_path: Path) -> None:
    make(tmp_path / "dataset", "1", "one")
    assert [p for p in check_audit(tmp_path) if "`dataset`" in p]
    audit_artifacts(tmp_path, recovered=True)
    [entry] = read_chain(tmp_path)
    manifest = read_manifest(tmp_path / "dataset")
    assert manifest and entry["action"] == "prepare" and entry["digest"] == manifest["digest"] and entry["recovered"]
    audit_artifacts(tmp_path, recovered=True)
    assert len(read_chain(tmp_path)) == 1 and check_audit(tmp_path) == []
