"""Single words in Latin script -> their kinds: first name, last name, everyday word, medicine's word, place, unknown.

Lists know most (lists/README.md); of the others the form tells: how words of medicine begin and end, plurals of
abbreviations, capitals inside a word.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

from metier.data.deidentify.lexicon import alternatives, cues, glossary, words

LETTER = "A-Za-z\u00c0-\u02af\u0300-\u036f\u1e00-\u1eff"  # with combining accents
CAPITAL = "A-Z" + "".join(chr(c) for c in (*range(0xC0, 0x250), *range(0x1E00, 0x1F00)) if chr(c).isupper())
_NO_NAME = re.compile(r"^[A-Z]{2,}s$|n't$|^[A-Z]+-[a-z]")  # NSAIDs, don't, E-cadherin


@cache
def kinds_of_words() -> dict[str, str]:
    """Each known word's kind: f first name, l last name, b both a word and a name, w word, c city, m medicine's."""
    kinds = dict.fromkeys((*words("en_drugs"), *words("en_medical")), "m")
    kinds |= dict.fromkeys((w for w in words("en_cities") if " " not in w), "c")
    kinds |= dict.fromkeys(words("en_words"), "w")
    kinds |= dict.fromkeys(words("en_last"), "l")
    kinds |= dict.fromkeys(words("en_first"), "f")
    kinds |= dict.fromkeys(words("en_both"), "b")
    kinds |= {w: "b" for w in words("en_eponyms") if kinds.get(w, "?") in "l?"}
    nations = [
        name.lower()
        for name in (*words("en_countries"), *words("en_nationalities"))
        if " " not in name and len(name) > 4
    ]
    kinds |= dict.fromkeys((name for name in nations if kinds.get(name) != "f"), "w")
    return kinds | dict.fromkeys(cues("en_no_names") | cues("en_labels"), "w")


@cache
def _word_ends() -> tuple[str, ...]:
    return tuple(sorted(cues("en_word_ends")))


@cache
def _word_starts() -> tuple[str, ...]:
    return tuple(sorted(cues("en_word_starts")))


@cache
def terms() -> re.Pattern[str]:
    """The terms of the fields, which are never names."""
    long = (term for term in glossary("en") if len(term) > 3)
    return re.compile(rf"(?<![{LETTER}]){alternatives([*words('en_terms'), *long])}(?![{LETTER}])")


@lru_cache(maxsize=2**15)
def kind_of(word: str) -> str:
    """The kind of a capitalised word; `?` is unknown, `i` an initial, `t` a title."""
    low = word.lower()
    if len(word) == 1:
        return "w" if word in "AI" else "i"
    if low in cues("en_titles"):
        return "t"
    kind = kinds_of_words().get(low)
    if word.isupper():
        return "b" if kind in ("f", "l", "b") else "w"
    if kind:
        return kind
    if _NO_NAME.search(word):
        return "w"
    if re.search("[a-z][A-Z]", word) and not re.match("Mc|Mac|De|Di|La|Le|Van|Von|O'|D'|Fitz", word):
        return "w"  # MedlinePlus, IgM
    if low.endswith("'s"):
        return kind_of(word[:-2])
    formed = low.endswith(_word_ends()) or (len(low) > 8 and low.startswith(_word_starts()))
    if formed and low.isascii() and not low.endswith("aitis"):  # as Lithuanian names do
        return "m"
    if "-" in word:
        parts = [kind_of(part) for part in word.split("-") if part]
        return "w" if "w" in parts or "m" in parts else "l" if "l" in parts or "f" in parts else "?"
    for suffix in ("s", "es", "ing", "ed", "ly", "er", "ers"):
        if low.endswith(suffix) and kinds_of_words().get(low[: -len(suffix)]) in ("w", "m"):
            return "w"
    return "?"
