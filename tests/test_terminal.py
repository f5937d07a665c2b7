"""Tries to leave a reader without colours in the dark about what is trained."""

from __future__ import annotations

import pytest

from metier.terminal import tokens_as_text


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("trained", "shown"),
    [("0110", "a·[[b·c]]·d·"), ("1001", "[[a]]·b·c·[[d]]·"), ("1111", "[[a·b·c·d]]·"), ("0000", "a·b·c·d·")],
)
def test_without_colours_brackets_stand_around_what_is_trained(trained: str, shown: str) -> None:
    flags = [mark == "1" for mark in trained]
    assert tokens_as_text(Letters(), list(map(ord, "abcd")), flags, colours=False).plain == shown
    assert tokens_as_text(Letters(), list(map(ord, "abcd")), flags).plain == "a·b·c·d·"
