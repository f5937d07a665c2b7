"""The header of a GGUF file, read with bounds: metadata and the tensors' names, shapes and places, no weights.

A header's counts and lengths are claims of the file. Here each is held against the bytes that are there before
anything is allocated or looped over, so that a hostile or torn file is refused in milliseconds. The format is ggml's
docs/gguf.md, versions 2 and 3, little-endian.

Limits: long arrays (a vocabulary) are stepped over; their length is kept, not their contents.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from metier.errors import ModelError

MAGIC = b"GGUF"
MAX_FIELDS = 4_096
MAX_TENSORS = 65_536
MAX_STRING = 16 * 1024 * 1024
MAX_NAME = 256
# struct's code and size by GGUF's type number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Keys by which transformers sizes a model, and the shape of the file's own tensors that must bear them out.
BOUNDS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
          "attention.key_length", "expert_count", "vocab_size")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """`fields` by key: numbers, strings, and of an array its length; `shapes` of the tensors, as stored."""

    architecture: str
    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """Reads and checks the header. Raises `ModelError` for a file that is no GGUF, is torn or claims too much."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(
                f"`{path}` is a file, and no GGUF file",
                hint="name the folder that holds config.json and the safetensors",
            )
        reader = _Reader(path, file, size)
        version = reader.number("I")
        if version not in (2, 3):
            raise reader.bad(f"it is of version {version}, and 2 and 3 are read")
        num_tensors, num_fields = reader.number("Q"), reader.number("Q")
        if num_tensors > MAX_TENSORS or num_fields > MAX_FIELDS:
            raise reader.bad(f"it claims {num_fields} fields and {num_tensors} tensors")
        fields = {}
        for _ in range(num_fields):
            key = reader.string(MAX_NAME)
            fields[key] = reader.value(reader.number("I"))
        shapes = {}
        for _ in range(num_tensors):
            name = reader.string(MAX_NAME)
            shapes[name] = reader.shape(name)
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise reader.bad("it does not say its architecture")
    header = Header(architecture, fields, shapes)
    _check_sizes(reader, header)
    return header


class _Reader:
    """Reads from a file of known size; every error names the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size

    def bad(self, why: str) -> ModelError:
        return ModelError(f"the GGUF file `{self.path}` is damaged or not what it says: {why}", hint="fetch it again")

    def number(self, code: str) -> Any:
        data = self.file.read(struct.calcsize(f"<{code}"))
        if len(data) < struct.calcsize(f"<{code}"):
            raise self.bad("it ends inside its header")
        return struct.unpack(f"<{code}", data)[0]

    def string(self, longest: int) -> str:
        length = self.number("Q")
        if length > min(longest, self.size):
            raise self.bad(f"it claims a text of {length} bytes")
        data = self.file.read(length)
        if len(data) < length:
            raise self.bad("it ends inside its header")
        return data.decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string(MAX_STRING)
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise self.bad(f"it has a field of an unknown type {kind}")
        inner, length = self.number("I"), self.number("Q")
        if inner not in SCALARS and inner != STRING:
            raise self.bad("it has an array of arrays")
        # The least that an element takes; a string has its length before it.
        least = struct.calcsize(f"<{SCALARS[inner]}") if inner in SCALARS else 8
        if length * least > self.size - self.file.tell():
            raise self.bad(f"it claims an array of {length} entries")
        if inner in SCALARS:
            self.file.seek(length * least, 1)
        else:
            for _ in range(length):
                self.string(MAX_STRING)
        return length

    def shape(self, name: str) -> tuple[int, ...]:
        dimensions = self.number("I")
        if dimensions > 4:
            raise self.bad(f"a tensor has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        _, offset = self.number("I"), self.number("Q")
        # No form takes less than two bits a number.
        if offset >= self.size or math.prod(shape) > 4 * (self.size - offset):
            raise self.bad(f"the tensor `{name}` would lie beyond its end")
        return shape


def _check_sizes(reader: _Reader, header: Header) -> None:
    """A model is built by the header's numbers before a weight is read: they must fit the tensors that are there."""
    if not header.shapes:
        return  # a vocabulary alone
    largest = max((max(shape) for shape in header.shapes.values() if shape), default=0)
    for key in BOUNDS:
        claimed = header.fields.get(f"{header.architecture}.{key}")
        limit = len(header.shapes) if key == "block_count" else largest
        if isinstance(claimed, int) and not 0 <= claimed <= limit:
            raise reader.bad(f"`{key}` is {claimed}, and its tensors allow {limit} at most")
