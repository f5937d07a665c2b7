"""The secret that turns a person's identifier into a hash: one file outside of every artifact.

A hash without a key can be undone by trying all names or numbers; with a key it can be undone by whoever holds the key
alone. So `trace` and `forget` find a person in a data set that does not hold the person's identifier, and what leaves
the house tells nothing. Whoever deletes the key makes the hashes useless, for good.

HMAC-SHA256 (RFC 2104) over the purpose and the value, folded so that spellings of one value agree.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import unicodedata
from pathlib import Path

from metier.errors import RunError


def key_path() -> Path:
    """`METIER_KEY_FILE`, or metier/key in the user's configuration folder."""
    named = os.environ.get("METIER_KEY_FILE")
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(named) if named else Path(home) / "metier" / "key"


def load_key(path: Path | None = None) -> bytes:
    """The key, 32 bytes; made on first use, readable by its owner alone. Raises `RunError` for a file that is none."""
    path = path or key_path()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        key = b""
    if len(key) != 32:
        raise RunError(
            f"`{path}` cannot be read as a key, or not be made",
            hint="it holds 64 hexadecimal digits; restore it from a copy, or name another with METIER_KEY_FILE",
        )
    return key


def keyed_hash(value: str, key: bytes, *, purpose: str = "subject") -> str:
    """32 hexadecimal digits that tell nothing without the key; equal for spellings of one value.

    Folded are width, case and white space, so that `张 伟` and `张伟` differ and `A-1` and `ａ-1 ` do not. Hashes for
    different purposes cannot be compared with each other.
    """
    folded = " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    return hmac.new(key, f"{purpose}\0{folded}".encode(), hashlib.sha256).hexdigest()[:32]


def key_fingerprint(key: bytes) -> str:
    """What tells one key from another and tells nothing else of it."""
    return keyed_hash("fingerprint", key, purpose="fingerprint")
