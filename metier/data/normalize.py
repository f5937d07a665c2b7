"""Untidy text -> edits: spans of it with what stands there instead. Finding them and applying them are two functions.

Edits never overlap and stand in order, so that a place in the new text leads back to one in the old. Nothing here
depends on the language or needs to understand the text: medical codes, numbers, formulas and program code keep every
character that can be seen. NFKC is not used, since it writes `m²` as `m2` and `①` as `1`.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from functools import lru_cache

from metier.recipe import CleanConfig

_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_PATTERNS = {
    "control": r"[\x00-\x08\x0e-\x1f\x7f\u00ad\u200b\u2060\ufeff\ufffe\uffff\U000e0000-\U000e007f]",
    "direction": r"[\u200e\u200f\u202a-\u202e\u2066-\u2069]",
    "whitespace": r"\r\n?|[\x0b\x0c\x85\u2028\u2029]|[\u00a0\u1680\u2000-\u200a\u202f\u205f]",
    "width": r"[\uff05\uff0e\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]",
    "html": r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,8}[0-9]?);"
    r"|</?(?:a|b|br|div|em|font|h[1-6]|hr|i|img|li|ol|p|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|ul)"
    r"(?:\s[^<>]{0,500})?/?>|<!--.{0,2000}?-->",
}
_BREAKS = re.compile(r"</?(?:br|div|h[1-6]|hr|li|p|tr)\b")
# U+FFFD and C1; what became of it in Chinese tools; UTF-8 read as cp1252; UTF-8 read as GBK.
_MOJIBAKE = re.compile(
    r"[\ufffd\x80-\x84\x86-\x9f]|锟斤|烫烫|屯屯|\u00c3[\u0080-\u00bf\u2020-\u2122\u0152-\u0178]|\u00e2\u20ac"
    r"|\u00c2[\u00a0-\u00bf]|(?:[锛銆鐨鍦鏄浣绋鎴璇涔杩鍙].{0,3}){3}"
)


@dataclass(frozen=True, slots=True)
class Edit:
    """`replacement` stands for text[start:end]; `rule` says why."""

    start: int
    end: int
    replacement: str
    rule: str


def find_edits(text: str, config: CleanConfig) -> list[Edit]:
    """What the rules that are on change in `text`, in order and without overlap."""
    on = tuple(rule for rule in ("control", "whitespace", "width", "html") if getattr(config, rule))
    if not on or (text.isascii() and not _ASCII_UNTIDY.search(text) and "html" not in on):
        return []
    if config.control and not _RIGHT_TO_LEFT.search(text):
        on += ("direction",)
    edits = []
    for match in _pattern(on).finditer(text):
        rule = match.lastgroup or ""
        name = "control" if rule == "direction" else rule
        edits.append(Edit(match.start(), match.end(), _replacement(rule, match.group()), name))
    return edits


def apply_edits(text: str, edits: list[Edit]) -> str:
    """The text with every edit made."""
    parts, at = [], 0
    for edit in edits:
        parts += [text[at : edit.start], edit.replacement]
        at = edit.end
    return "".join([*parts, text[at:]])


def original_offset(edits: list[Edit], position: int) -> int:
    """Where a character of the new text stood in the old one; inside a replacement, where that one begins."""
    shift = 0
    for edit in edits:
        start = edit.start + shift
        if position < start:
            break
        if position < start + len(edit.replacement):
            return edit.start + (position - start if edit.end - edit.start == len(edit.replacement) else 0)
        shift += len(edit.replacement) - (edit.end - edit.start)
    return position - shift


def holds_html(text: str) -> bool:
    """Whether a tag or a character reference stands in the text."""
    return ("<" in text or "&" in text) and _pattern(("html",)).search(text) is not None


def is_mojibake(text: str) -> bool:
    """Whether some of the text was once read in the wrong encoding."""
    return not text.isascii() and _MOJIBAKE.search(text) is not None


_ASCII_UNTIDY = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@lru_cache(maxsize=32)
def _pattern(rules: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?P<{rule}>{_PATTERNS[rule]})" for rule in rules), re.DOTALL)


def _replacement(rule: str, found: str) -> str:
    if rule == "whitespace":
        return "\n" if found[0] in "\r\x0b\x0c\x85\u2028\u2029" else " "
    if rule == "width":
        return chr(ord(found) - 0xFEE0)
    if rule == "html":
        return html.unescape(found) if found[0] == "&" else "\n" if _BREAKS.match(found) else ""
    return ""
