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
from metier.model.gguf_header import read_header

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"
MAX_JSON = 64 * 2**20
# The types that weights are stored in; integers and 8-bit floats need a scale that plain safetensors do not have.
FLOATS = ("F64", "F32", "F16", "BF16")


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
    read_header(path)
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
        listed = read_json(path / INDEX).get("weight_map")
        shards = {str(shard) for shard in listed.values()} if isinstance(listed, dict) else {""}
        if bad := sorted(shard for shard in shards if Path(shard).name != shard or not shard):
            raise ModelError(
                f"`{path / INDEX}` lists a weight file outside of the folder, or none: `{bad[0]}`",
                hint="fetch the model again",
            )
        if missing := sorted(shard for shard in shards if not (path / shard).is_file()):
            raise ModelError(
                f"`{path}` lacks {len(missing)} of its {len(shards)} weight files, {missing[0]} first",
                hint="fetch it again",
            )
    shapes: dict[str, list[int]] = {}
    for file in weights:
        shapes |= safetensors_shapes(file)
    _check_sizes(path, shapes)


def safetensors_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name, from its header. Raises `ModelError` for a file that is damaged, no
    regular file, or holds weights that are no plain floating-point numbers."""
    if not file.is_file():
        raise ModelError(f"`{file}` is no regular file", hint="fetch or copy the file again")
    shapes = {}
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                tensor = opened.get_slice(name)
                shapes[name] = tensor.get_shape()
                if name.endswith(".weight") and tensor.get_dtype() not in FLOATS:
                    raise ModelError(
                        f"`{name}` in `{file}` is stored as {tensor.get_dtype()}, and weights are {', '.join(FLOATS)}",
                        hint="name the original model, not a quantised one",
                    )
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"`{file}` is damaged: {first_line(error)}", hint="fetch or copy the file again") from error
    return shapes


def _check_sizes(path: Path, shapes: dict[str, list[int]]) -> None:
    """A model is built by config.json's numbers before a weight is read: they must fit the tensors that are there."""
    config = read_json(path / "config.json")
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    largest = max((max(shape) for shape in shapes.values() if shape), default=0)
    embeddings = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), [])
    limits = {"num_hidden_layers": len(shapes), "vocab_size": largest, "hidden_size": largest}
    limits |= {"intermediate_size": largest, "num_attention_heads": largest, "head_dim": largest}
    if len(embeddings) == 2:
        limits["hidden_size"] = embeddings[1]
    for key, limit in limits.items():
        value = config.get(key)
        if value is not None and not (isinstance(value, int) and 0 < value <= limit):
            raise ModelError(
                f"`{key}` in `{path / 'config.json'}` is {str(value)[:40]}, and its weights allow {limit} at most",
                hint="config.json and the safetensors are of different models; fetch the model again",
            )


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
        if path.stat().st_size > MAX_JSON:
            raise ModelError(f"`{path}` is larger than {MAX_JSON >> 20} MB, too large for settings")
        value = json.loads(path.read_text(encoding="utf-8"))
    # Not only bad JSON: numbers of thousands of digits and brackets nested without end are refused too.
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"`{path}` is not valid JSON: {first_line(error)}", hint="fetch or copy the file again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(f"`{path}` holds no JSON object", hint="fetch or copy the file again")
    return value


def first_line(error: BaseException) -> str:
    """Of a library's message, the part that fits into a sentence of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
