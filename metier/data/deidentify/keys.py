"""The secret behind surrogates, date shifts and keyed hashes. It never enters an artifact.

It is METIER_PRIVACY_KEY, or a file in the user's configuration folder that only the user can read, made at first use.
Whoever has it can test a guess against the hashes; whoever deletes it can never link surrogates to people again.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from metier.errors import RunError

VARIABLE = "METIER_PRIVACY_KEY"


def key_path() -> Path:
    """Where the key file is: $XDG_CONFIG_HOME/metier/privacy.key, by default under ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "metier" / "privacy.key"


def load_key() -> bytes:
    """The key, made if there is none. Raises `RunError` if it cannot be read or others can read it."""
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE].encode()
    path = key_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
        except FileExistsError:
            pass
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise RunError(
                f"the privacy key `{path}` can be read by others", hint=f"`chmod 600 {path}`, or make a new one"
            )
        key = path.read_bytes().strip()
    except OSError as error:
        raise RunError(
            f"the privacy key `{path}` cannot be used: {error.strerror}", hint=f"or set the variable {VARIABLE}"
        ) from None
    if len(key) < 16:
        raise RunError(f"the privacy key `{path}` is too short", hint="delete the file; a new one is made")
    return key


def keyed(key: bytes, *parts: str) -> bytes:
    """HMAC-SHA256 of the parts; no two lists of parts give the same input."""
    message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
    return hmac.new(key, message, hashlib.sha256).digest()


def fingerprint(key: bytes) -> str:
    """Tells two keys apart without telling anything of either."""
    return keyed(key, "fingerprint").hex()[:16]
