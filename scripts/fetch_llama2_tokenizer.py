"""Builds LLaMA-2's tokenizer, with llama.cpp's 47 test strings, in metier's cache; prints the folder.

The vocabulary stands as a GGUF file in the public source package llama-cpp-python (MIT; the vocabulary itself
comes under the LLaMA 2 Community License, so it is fetched by whoever needs it and not kept in this
repository). 77 MB are fetched, once; nothing of the package is installed.

    python scripts/fetch_llama2_tokenizer.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from metier.artifacts import digest_file, write_json
from metier.model.embedded import cache_dir

REQUIREMENT = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
VOCABULARY = "llama_cpp_python-0.3.36/vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
SEPARATOR = "\n__ggml_vocab_test__\n"


def main() -> None:
    folder = cache_dir() / "tests" / "llama2-tokenizer"
    if not (folder / "vectors.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = build(Path(scratch))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
    print(folder)


def build(scratch: Path) -> Path:
    """A folder in `scratch` with tokenizer.json, its config, and vectors.json: a list of [text, ids]."""
    from metier.model.load import gguf_tokenizer

    vocabulary = fetch(scratch)
    made = scratch / "made"
    gguf_tokenizer(vocabulary).save_pretrained(made)
    texts = Path(f"{vocabulary}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{vocabulary}.out").read_text(encoding="utf-8").split("\n")
    write_json(
        made / "vectors.json", [[t, [int(i) for i in line.split()]] for t, line in zip(texts, lines, strict=True)]
    )
    # As in Meta's own repository, so that what is tested is what a user's checkpoint says.
    config = json.loads((made / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(made / "tokenizer_config.json", config | {"tokenizer_class": "LlamaTokenizer"})
    return made


def fetch(scratch: Path) -> Path:
    """The vocabulary's GGUF file, its .inp and .out beside it. Exits with a sentence when it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--no-binary", "llama-cpp-python", "--dest", str(scratch), REQUIREMENT]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        sys.exit(f"{REQUIREMENT} could not be fetched from the package index")
    [archive] = scratch.glob("*.tar.gz")
    if digest_file(archive) != SHA256:
        sys.exit(f"{archive.name} has another SHA-256 than {SHA256}")
    with tarfile.open(archive) as tar:
        for suffix in ("", ".inp", ".out"):
            member = tar.extractfile(VOCABULARY + suffix)
            assert member is not None, "a plain file, as its digest says"
            (scratch / (VOCABULARY + suffix)).parent.mkdir(parents=True, exist_ok=True)
            (scratch / (VOCABULARY + suffix)).write_bytes(member.read())
    return scratch / VOCABULARY


if __name__ == "__main__":
    main()
