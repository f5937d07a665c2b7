"""Token ids -> text as it may be shown: whole characters, ended before a stop string, and the text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A character has four bytes at most, hence as many byte-level tokens.
MAX_BYTES = 4


class TextStream:
    """Turns token ids into text as they come; what may still change (half a character) waits.

    Only the last few ids are decoded again, so a long answer costs no more a token than a short one.
    """

    def __init__(self, renderer: Any) -> None:
        self._decode = renderer.decode
        self._ids: list[int] = []
        self._window = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        self._ids.append(token)
        return self._text(is_last=False)

    def end(self) -> str:
        """The text that was still waiting."""
        return self._text(is_last=True)

    def _text(self, *, is_last: bool) -> str:
        if self._shown == len(self._ids):
            return ""
        before = self._decode(self._ids[self._window : self._shown])
        text = self._decode(self._ids[self._window :])
        if text.endswith("\ufffd") and len(self._ids) - self._shown < MAX_BYTES and not is_last:
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return str(text[len(before) :])


class StopStrings:
    """Ends a text before the first of `stops`; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_hit = False

    def push(self, text: str) -> str:
        """What of the held text and `text` may be shown."""
        if self.is_hit:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_hit = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max(
            (n for stop in self._stops for n in range(len(stop)) if n and self._held.endswith(stop[:n])), default=0
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def end(self) -> str:
        """What was still waiting."""
        shown, self._held = self._held, ""
        return shown


class TokenTexts:
    """The text of single tokens, with the space before a word, and special tokens spelled out."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A first token loses its space in some tokenizers, so each is decoded behind another.
        self._before = int(tokenizer("a", add_special_tokens=False)["input_ids"][-1])
        self._prefix = len(self._decode([self._before]))
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            text = self._decode([self._before, token])[self._prefix :]
            # Half a character is told by the tokenizer's own spelling of its bytes.
            self._known[token] = str(self._tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
        return self._known[token]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
