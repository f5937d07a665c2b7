"""Keyed stand-ins: the same value gets the same one, of the same form, and metier knows its own again.

Names come from invented lists (张明甲, Robin Aldermoor); numbers keep their separators, letters and first digits, and
fail the check digit on purpose. A part of each is an HMAC of the rest, so that a second pass leaves stand-ins alone; by
chance a real number looks like one once in 10,000, a real Chinese name that ends in 甲 to 癸 once in ten.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from functools import cache

from metier.data.deidentify.checksums import CHECKS, is_valid
from metier.data.deidentify.lexicon import cues
from metier.data.deidentify.spans import fold

STEMS = "甲乙丙丁戊己庚辛壬癸"
SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕"
MIDDLES = "明文建志国海永光安平清华春秋云山江天思亦可如以之小大子少元世兴正学景德立雨晓"
# Digits or letters at the start that say what kind of number it is, not whose.
_KEPT = {
    "PHONE_NUMBER": 3,
    "FAX_NUMBER": 3,
    "CREDIT_CARD": 4,
    "CN_ID_CARD": 2,
    "IBAN_CODE": 2,
    "CN_USCC": 2,
    "VEHICLE": 2,
}
_CHECKED = {"CREDIT_CARD": "card", "CN_ID_CARD": "id_card", "CN_USCC": "uscc", "IBAN_CODE": "iban", "VEHICLE": "vin"}
TAG = 4


@cache
def _latin() -> tuple[list[str], list[str]]:
    """First names, and last names that nobody has."""
    heads, tails = sorted(cues("surrogate_heads")), sorted(cues("surrogate_tails"))
    return sorted(cues("surrogate_first")), [head + tail for head in heads for tail in tails]


@cache
def _names() -> re.Pattern[str]:
    firsts, lasts = _latin()
    return re.compile(
        rf"[{SURNAMES}][{MIDDLES}][{STEMS}]|(?:(?:{'|'.join(firsts)}) )?(?:{'|'.join(lasts)})(?![A-Za-z])"
    )


def keyed(key: bytes, *parts: str) -> bytes:
    """HMAC-SHA256 of the parts; no two lists of parts give the same input."""
    message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in ("stand-in", *parts))
    return hmac.new(key, message, hashlib.sha256).digest()


def person(value: str, key: bytes, whole: str | None = None) -> str:
    """A stand-in for a name; `whole` is the full name of which `value` is a part of it in the same record."""
    han = re.search("[\u4e00-\u9fff]", value) is not None
    if han and len(value) == 1:
        return "某"
    seed = keyed(key, "person", _normal(whole or value))
    if han:
        name = SURNAMES[seed[0] % len(SURNAMES)] + MIDDLES[seed[1] % len(MIDDLES)]
        return name + STEMS[keyed(key, "stem", name)[0] % len(STEMS)]
    firsts, lasts = _latin()
    first, last = firsts[seed[0] % len(firsts)], lasts[int.from_bytes(seed[1:3], "big") % len(lasts)]
    return f"{first} {last}" if " " in value else last


def number(value: str, entity_type: str, key: bytes) -> str:
    """A stand-in of the same form for a number or code; its last four free characters are a keyed check."""
    value = fold(value)[0]
    places = _free(value, entity_type)
    if len(_tagged(value)) < TAG:
        return f"[{entity_type}]"
    wanted = _CHECKED.get(entity_type)
    for attempt in range(64):
        seed = keyed(key, entity_type, _normal(value), str(attempt))
        chars = list(value)
        for i, place in enumerate(places):
            chars[place] = _like(value, place, seed[i % 32] + i // 32)
        _sign(chars, key)
        made = "".join(chars)
        bare = re.sub(r"[^0-9A-Za-z]", "", made).upper()
        if made != value and not (wanted and _fits(wanted, bare)):
            return made
    return f"[{entity_type}]"


def is_number(value: str, key: bytes) -> bool:
    """Whether `value` is a stand-in that `number` made, whatever type it is taken for now."""
    chars = list(value)
    return len(_tagged(value)) == TAG and _sign(chars, key) and "".join(chars) == value


def own_names(text: str, key: bytes) -> list[tuple[int, int]]:
    """Where stand-ins for names are in `text`."""
    found = []
    for match in _names().finditer(text):
        name = match.group()
        if name[-1] not in STEMS or STEMS[keyed(key, "stem", name[:2])[0] % len(STEMS)] == name[-1]:
            found.append(match.span())
    return found


def _fits(check: str, bare: str) -> bool:
    lengths = {"id_card": (15, 18), "uscc": (18,), "vin": (17,)}
    if check in lengths and len(bare) not in lengths[check]:
        return False
    return bare.isascii() and (check != "card" or bare.isdigit()) and check in CHECKS and _valid(check, bare)


def _valid(check: str, bare: str) -> bool:
    try:
        return is_valid(check, bare)
    except (KeyError, ValueError):  # a letter where that kind of number has none
        return False


def _alnum(chars: Sequence[str]) -> list[int]:
    return [i for i, char in enumerate(chars) if char.isascii() and char.isalnum()]


def _free(value: str, entity_type: str) -> list[int]:
    """The places that a stand-in may change. The day of birth in an identity number is among them."""
    places = _alnum(value)
    return places[_KEPT.get(entity_type, 0) :] if len(places) > 8 else places


def _starts_group(text: Sequence[str], place: int) -> bool:
    return place == 0 or not text[place - 1].isalnum()


def _tagged(text: Sequence[str]) -> list[int]:
    """The places of the keyed check: the last four letters and digits that begin no group."""
    return [i for i in _alnum(text) if not _starts_group(text, i) and text[i] not in "Xx"][-TAG:]


def _sign(chars: list[str], key: bytes) -> bool:
    """Makes the tagged places a keyed check of the rest."""
    tagged = _tagged(chars)
    seed = keyed(key, "tag", "".join(char for i, char in enumerate(chars) if i not in tagged))
    for i, place in enumerate(tagged):
        chars[place] = _like(chars, place, seed[i])
    return True


def _like(text: Sequence[str], place: int, byte: int) -> str:
    """Another character of the same kind. X stays: it ends identity numbers. What may begin a group still may."""
    char = text[place]
    if char in "Xx" or (char in "01" and _starts_group(text, place)):
        return char
    if char.isdigit():
        return str(2 + byte % 8 if _starts_group(text, place) else byte % 10)
    letter = "ABCDEFGHJKLMNPQRTUWY"[byte % 20]
    return letter if char.isupper() else letter.lower()


def _normal(value: str) -> str:
    return re.sub(r"[\s.·-]+", "", value).casefold()
