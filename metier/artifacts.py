"""An artifact is a folder of public formats with a manifest.json; it is visible only when complete.

A stage writes into a folder beside the final one, fsyncs, and renames. The manifest's `key` says what
the stage was asked for (its config and its parents' digests): the same key means there is nothing to
do. Its `digest` says what came out: it covers the files that carry the result, not logs and timings,
so that a run that was killed and resumed has the same digest as one that was not.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metier.errors import RunError

MANIFEST = "manifest.json"
# It records how the work went, so it differs between two runs with the same result.
LOGS = ("metrics.jsonl",)
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "polars")
STAGES = ("dataset", "adapter", "evidence")
# All that a run's folder holds, but for what is hidden while a stage or a write is at work.
PAGES = ("report.html", "report.en.html", "report.zh.html", "MODEL_CARD.md")
RUN_NAMES = {
    "recipe.yaml", ".lock", *STAGES, *PAGES, "sweep", "audit.jsonl", "tensorboard", "forgotten.json", "export", "full",
}  # fmt: skip
# In an adapter's folder: it learned from someone who was forgotten since.
REVOKED = "revoked.json"
AT_WORK = (".partial", ".old", ".tmp")


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical spelling (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return digest_bytes(text.encode())


def fsync_dir(path: Path) -> None:
    """Makes renames and new names inside `path` survive a power cut (a no-op on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the disk under `path` refuses (full, read-only, ...) into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk is full: `{path}` could not be written",
                hint="what was complete before is intact; free some space and run the same command again",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RunError(
                f"no permission to write `{path}`",
                hint="choose another folder with `--out`, or change the folder's permissions",
            ) from error
        raise RunError(f"`{path}` could not be written: {error.strerror}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `path` so that a reader sees the old bytes or all the new ones, never a part.

    Raises `RunError` when the disk is full or not writable; `path` is then as it was.
    """
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomic`, for what is written piece by piece."""
    aside = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            fsync_dir(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of a JSON value, indented, in UTF-8, NaN refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def refuse_revoked(adapter: Path) -> None:
    """Raises `RunError` for an adapter that learned from a person whose rows were taken out since."""
    if (adapter / REVOKED).exists():
        raise RunError(
            f"the adapter in `{adapter}` learned from a person who was forgotten since",
            hint="run `metier run` on its recipe: it is trained again without that person's rows",
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete artifact, or None where there is none (or none that parses)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not {"key", "digest", "files"} <= manifest.keys():
        return None
    files = manifest["files"]
    whole = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    return manifest if whole else None


def is_current(folder: Path, key: str) -> bool:
    """Whether `folder` holds a complete artifact that was made for `key`, with its files in place."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest["key"] == key and is_whole(folder, manifest)


def is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether the files that `manifest` lists are in `folder`, with their sizes."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry.get("bytes")
        for name, entry in manifest["files"].items()
    )


def damaged_file(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that no longer has the bytes that `manifest` was made with, or None; logs may have grown."""
    for name, entry in manifest["files"].items():
        if name not in LOGS and digest_file(folder / name) != entry["sha256"]:
            return str(name)
    return None


def work_folder(final: Path, key: str) -> Path:
    """The folder in which the artifact `final` is being made for `key`; created when missing.

    Work that was begun for another key is removed: it can no longer become this artifact.
    """
    folder = final.with_name(f".{final.name}.partial")
    marker = folder / "key"
    with disk_errors(folder):
        old = final.with_name(f".{final.name}.old")
        if old.exists() and not final.exists():
            os.replace(old, final)  # `complete` was killed between its two renames
        if folder.exists() and (not marker.exists() or marker.read_text() != key):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            write_atomic(marker, key.encode())
    return folder


def complete(
    work: Path,
    final: Path,
    *,
    kind: str,
    key: str,
    config: dict[str, Any],
    parents: dict[str, str],
    started: float,
    details: dict[str, Any],
) -> dict[str, Any]:
    """Writes the manifest into `work` and renames `work` to `final`, replacing what was there.

    `started` is `time.time()` at the stage's start; `details` are the stage's own entries (counts,
    seeds, ...). Returns the manifest. Raises `RunError` when the disk is full.
    """
    files = {}
    for stray in [p for p in work.rglob(".*.tmp") if p.is_file()]:
        stray.unlink()  # left by a write that was killed
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = path.relative_to(work).as_posix()
        if name in (MANIFEST, "key") or name.startswith("checkpoints/"):
            continue
        files[name] = {"sha256": digest_file(path), "bytes": path.stat().st_size}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    carried = {n: f["sha256"] for n, f in files.items() if n not in LOGS}
    finished = time.time()
    manifest = {
        "kind": kind,
        "metier_version": importlib.metadata.version("metier"),
        "key": key,
        "digest": digest_json([kind, parents, carried]),
        "config": config,
        "parents": parents,
        "files": files,
        **details,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "timing": {
            "finished": datetime.datetime.fromtimestamp(finished, datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(finished - started, 3),
        },
    }
    write_json(work / MANIFEST, manifest)
    with disk_errors(final):
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(work, final)
        (final / "key").unlink(missing_ok=True)
        fsync_dir(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    return manifest


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Holds the run's folder, made when missing, for this process alone.

    Raises `RunError` when another process holds it, when it is a file, or when it holds other
    people's files: a run never mixes with what it did not make. Where nothing came of it, the folders
    made for it are removed.
    """
    import filelock

    with disk_errors(out):
        if out.exists() and not out.is_dir():
            raise RunError(f"`{out}` is a file, and a run needs a folder", hint="choose another `out:` or `--out`")
        _refuse_other_files(out)
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunError(
                f"another metier process is working in `{out}`",
                hint="wait for it to end, or give this run a folder of its own with `--out`",
            ) from None
    try:
        yield
    finally:
        # While it is held: once released, the file may be another process's lock.
        with contextlib.suppress(OSError):  # another process came in already, or the folder was removed
            if [p.name for p in out.iterdir()] == [".lock"]:
                (out / ".lock").unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def _refuse_other_files(out: Path) -> None:
    """Raises `RunError` unless `out` is missing, empty, or a run: locked before, or a recipe and what it made."""
    names = {p.name for p in out.iterdir()} if out.exists() else set()
    if not names or ".lock" in names:
        return
    other = {n for n in names - RUN_NAMES if not (n.startswith(".") and n.endswith(AT_WORK))}
    made = [stage for stage in STAGES if stage in names]
    # Someone's own recipe, or folder `dataset`, is no run: what a stage made has a manifest.
    if "recipe.yaml" in names and not other and made and all(read_manifest(out / stage) for stage in made):
        return
    count = len(other or names)
    raise RunError(
        f"`{out}` is in use: it holds {count} other {'file' if count == 1 else 'files'} and is no run of metier",
        hint="choose another folder with `out:` or `--out`",
    )


def append_audit(out: Path, action: str, **facts: Any) -> None:
    """Appends one line to `out/audit.jsonl`: when, who, what, digests; no record text, no personal data.

    Each line carries the SHA-256 of the line before it and one of itself, so that an altered or missing line
    shows. A last line torn by a kill is removed first: it was never acknowledged. Fails closed: where the lines
    do not hold together, or the disk refuses the new one, `RunError` stops the work.
    """
    path = out / "audit.jsonl"
    with disk_errors(path):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            write_atomic(path, b"".join(lines))
        _refuse_broken(path, lines)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {
            "time": now,
            "user_id": os.getuid() if hasattr(os, "getuid") else None,
            "action": action,
            **facts,
            "previous": digest_bytes(lines[-1]) if lines else "0" * 64,
        }
        entry["digest_of_line"] = digest_json(entry)
        with path.open("ab") as file:
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def audit_artifacts(out: Path, *, recovered: bool = False) -> None:
    """Appends a line for every complete artifact of the run that `audit.jsonl` does not name yet.

    Called after a stage and when a run begins: between an artifact's completion and its line a kill may
    fall, and then the line is made from the manifest, with `recovered`. Raises `RunError` as `append_audit`.
    """
    path = out / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    _refuse_broken(path, [line for line in lines if line.endswith(b"\n")])
    known = {json.loads(line).get("digest") for line in lines if line.endswith(b"\n")}
    for stage, action in (("dataset", "prepare"), ("adapter", "train"), ("evidence", "evaluate")):
        manifest = read_manifest(out / stage)
        if manifest is not None and manifest["digest"] not in known:
            facts = {name: manifest[name] for name in ("parents", "counts") if manifest.get(name)}
            facts |= {"recovered": True} if recovered else {}
            append_audit(out, action, digest=manifest["digest"], key=manifest["key"], **facts)


def check_audit(out: Path) -> list[str]:
    """What is wrong with `out/audit.jsonl`, a sentence for each line and each artifact without one; empty: nothing."""
    path = out / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    problems = list(_broken_lines(lines))
    named = {entry.get("digest") for line in lines if (entry := _audit_entry(line)) is not None}
    for stage in STAGES:
        manifest = read_manifest(out / stage)
        if manifest is not None and manifest["digest"] not in named:
            problems.append(f"`{stage}` has the digest {manifest['digest'][:16]}, which no line of audit.jsonl names")
    return problems


def _broken_lines(lines: list[bytes]) -> Iterator[str]:
    previous = "0" * 64
    for number, line in enumerate(lines, start=1):
        entry = _audit_entry(line)
        if entry is None:
            yield f"audit.jsonl, line {number}: torn or not JSON"
        elif entry.get("previous") != previous:
            yield f"audit.jsonl, line {number}: the line before it was altered, or one is missing"
        elif entry.pop("digest_of_line", None) != digest_json(entry):
            yield f"audit.jsonl, line {number}: altered"
        previous = digest_bytes(line)


def _audit_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and line.endswith(b"\n") else None


def _refuse_broken(path: Path, lines: list[bytes]) -> None:
    if problem := next(_broken_lines(lines), None):
        raise RunError(
            f"`{path}` was tampered with: {problem}",
            hint="nothing is done in this run as long as its log is not as it was written: restore the file from a "
            "copy, or start a new run in another folder",
        )
