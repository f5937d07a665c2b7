"""What may be left after rewriting: a second look by other means, planted identifiers, and small groups.

The second look shares no rule with the recognizers: runs of digits, @, words that jieba's dictionary tags as names, a
first name from the census before a capital. What it sees is a suspicion, not a find. Planted identifiers stand in
copies of the rewritten records; where none of n was missed, the share that is missed is below 3/n at 95 % (the rule of
three), for identifiers like those.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from metier.data.deidentify.detect import detect
from metier.data.deidentify.lexicon import word_set, words
from metier.data.deidentify.patterns import LABEL
from metier.data.deidentify.spans import fold
from metier.data.deidentify.surrogates import is_number, own_names

PLANTED = 500
SMALL_GROUP = 5
_DIGITS = re.compile(r"\d(?:[ ./()-]{0,2}\d){6,}")
_NUMBER = re.compile(r"[+(]{0,2}(?=[A-Za-z]{0,4}\d)[0-9A-Za-z]+(?:[ ./()-]{1,2}\d[0-9A-Za-z]*)*")
_CAPITALS = re.compile(r"(?<![A-Za-z.])([A-Z][a-z]+) [A-Z][a-z]+")
_CARRIERS = {
    "zh": ("经办:{}。", "昨天见到{}。", "补充信息:{}\n", "({})"),
    "en": ("Handled by {}. ", "We met {} yesterday. ", "Note: {}\n", "({}) "),
}


def suspicions(text: str, key: bytes) -> list[tuple[int, int, str]]:
    """(start, end, kind) in a rewritten text: digits, at, name."""
    text = fold(text)[0]
    own = [match.span() for match in LABEL.finditer(text)] + (own_names(text, key) if key else [])
    numbers = (match for match in _DIGITS.finditer(text) if not (key and _is_own(text, match, key)))
    found = [(*match.span(), "digits") for match in numbers]
    found += [(*match.span(), "at") for match in re.finditer(r"\S+@\S+", text)]
    found += [
        (*match.span(), "name") for match in _CAPITALS.finditer(text) if match.group(1).lower() in word_set("en_first")
    ]
    found += _tagged_names(text)
    return [f for f in found if not any(start < f[1] and f[0] < end for start, end in own)]


def _is_own(text: str, digits: re.Match[str], key: bytes) -> bool:
    """Whether the digits are a stand-in, or a part of one: of (020)3350..., GB06BHPG... or ...x447."""
    around = _NUMBER.search(text, max(0, digits.start() - 8))
    while around and around.end() < digits.end():
        around = _NUMBER.search(text, around.end())
    whole = around.group() if around else digits.group()
    forms = {digits.group(), whole, whole.lstrip("("), whole.lstrip("+("), re.split("x", whole)[0]}
    return any(is_number(form, key) for form in forms)


def _tagged_names(text: str) -> Iterable[tuple[int, int, str]]:
    if not re.search("[\u4e00-\u9fff]", text):
        return
    import rjieba

    position = 0
    surnames, terms = word_set("zh_surnames"), word_set("zh_words") | word_set("zh_terms")
    for word, tag in rjieba.tag(text):
        if tag.startswith("nr") and 2 <= len(word) <= 4 and word[0] in surnames and word not in terms:
            yield position, position + len(word), "name"
        position += len(word)


def planted_recall(texts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """How many planted names and numbers are found whole, by language, with the upper bound of the share missed."""
    rng = random.Random(f"planted {seed}")
    languages = {
        lang: [t for t in texts if (re.search("[\u4e00-\u9fff]", t) is not None) == (lang == "zh")]
        for lang in ("zh", "en")
    }
    rows = []
    for language, hosts in languages.items():
        for kind, maker in (("name", _name), ("number", _number)):
            if not hosts:
                continue
            missed = sum(not _found(rng.choice(hosts), maker(rng, language), language, rng) for _ in range(PLANTED))
            bound = 3 / PLANTED if missed == 0 else wilson_upper(missed, PLANTED)
            rows.append(
                {
                    "language": language,
                    "what": kind,
                    "planted": PLANTED,
                    "missed": missed,
                    "upper_bound": round(bound, 4),
                }
            )
    return rows


def wilson_upper(missed: int, count: int) -> float:
    """The upper end of Wilson's 95 % interval for the share missed / count."""
    z, share = 1.96, missed / count
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle + width) / (1 + z * z / count)


def small_groups(rows: Counter[tuple[str, ...]]) -> dict[str, Any]:
    """k-anonymity over the quasi-identifiers: the smallest group, and the rows in groups of fewer than five."""
    count = sum(rows.values())
    few = sum(n for n in rows.values() if n < SMALL_GROUP)
    return {"k": min(rows.values(), default=0), "groups": len(rows), "rows_below_5": few, "rows": count}


def _found(host: str, value: str, language: str, rng: random.Random) -> bool:
    host = host[:400]
    ends = [match.end() for match in re.finditer(r"[。.!?!?;;](?!\d)\s?", host)] or [len(host)]
    place = rng.choice(ends)
    carrier = rng.choice(_CARRIERS[language]).format(value)
    text = host[:place] + (" " if language == "en" else "") + carrier + host[place:]
    start = text.index(carrier) + carrier.index(value)
    covered = {i for span in detect(text) for i in range(span.start, span.end)}
    return all(i in covered for i in range(start, start + len(value)) if text[i].isalnum())


def _name(rng: random.Random, language: str) -> str:
    if language == "zh":
        given = "".join(rng.choice(words("zh_given")[0]) for _ in range(rng.choice((1, 2, 2))))
        return rng.choice(words("zh_surnames")[:150]) + given
    return f"{rng.choice(words('en_first')).title()} {rng.choice(words('en_last')).title()}"


def _number(rng: random.Random, language: str) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(8))
    if language == "zh":
        return rng.choice(("13", "15", "18")) + rng.choice("0356789") + digits
    forms = (
        f"({rng.randint(201, 989)}) {rng.randint(201, 989)}-{digits[:4]}",
        f"u{digits}@example.org",
        f"{rng.randint(100, 665)}-{rng.randint(10, 99)}-{digits[:3]}7",
    )
    return rng.choice(forms)
