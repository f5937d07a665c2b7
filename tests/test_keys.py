"""Tries to make a key that others can read, a hash that differs for one person, or one that tells without the key."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from metier.errors import RunError
from metier.keys import key_path, keyed_hash, load_key


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "secrets" / "key"))
    key = load_key()
    assert len(key) == 32 and load_key() == key
    assert stat.S_IMODE(key_path().stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "ab" * 31, "zz" * 32, "密" * 32])
def test_a_file_that_is_no_key_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="cannot be read as a key"):
        load_key(tmp_path / "key")


def test_spellings_agree_and_keys_and_purposes_do_not() -> None:
    key = bytes(32)
    assert keyed_hash("Ａ-1  张伟", key) == keyed_hash(" a-1 张伟", key)
    hashes = {keyed_hash(v, k, purpose=p) for v in ("a", "b") for k in (key, b"1" * 32) for p in ("subject", "span")}
    assert len(hashes) == 8 and all(len(h) == 32 for h in hashes)
