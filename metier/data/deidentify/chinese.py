"""Chinese names -> spans.

A name is a surname with one or two characters after it. Each candidate gets log odds: for its surname, for characters
that given names use, for what stands left and right of it, and for where a dictionary (jieba's, by rjieba) would cut
the text; a word such as 白细胞 or 王朝 loses by that. The weights are fitted (zh_name_weights.yaml). Names with a
middle dot and surnames before a title (张女士) have rules of their own. Limits: a rare surname without any cue is
missed, and the name of a famous person is a name like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

import yaml

from metier.data.deidentify.lexicon import characters, cues, glossary, word_set, words
from metier.data.deidentify.spans import Span

Token = tuple[str, str]  # a word and its part of speech
WordAt = tuple[int, str, str]  # where a word starts, the word, its part of speech

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
MIN_POINTS = -1.5
COMMON = 100  # surnames
_TAGS = "abcdefghijklmnopqrstuvwxyz"

# What stands right before a name: roles, relations, verbs, prepositions.
# Words after which a name often stands, that stand before much else too.
# What stands right after a name.
# Surnames that make other words with a title: 高工, 马路, 老师.

NAME_EDGE = re.compile(r"[\s,.;:!?、。;:,()()\[\]<>《》“”\"'|/=·\-—…@#0-9A-Za-z]")


@cache
def _surnames() -> frozenset[str]:
    return frozenset(words("zh_surnames"))


@cache
def _rare() -> frozenset[str]:
    """Surnames that are everyday words too."""
    return frozenset(words("zh_rare_surnames"))


@cache
def _compound() -> frozenset[str]:
    return frozenset(words("zh_compound_surnames"))


@cache
def _given() -> frozenset[str]:
    return characters("zh_given") | characters("zh_given_more")


@cache
def _strong() -> frozenset[str]:
    """Characters that given names use and little else."""
    return characters("zh_given_strong") | characters("zh_given_stronger")


@cache
def _common() -> frozenset[str]:
    """The surnames of most people."""
    return frozenset(words("zh_surnames")[:COMMON]) - _rare()


@cache
def _term_set() -> frozenset[str]:
    return word_set("zh_terms") | glossary("zh")


@cache
def _terms() -> re.Pattern[str]:
    long = sorted((word for word in _term_set() if len(word) > 2), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long)))


@cache
def _sides() -> tuple[dict[str, float], frozenset[str], dict[str, float], frozenset[str]]:
    """The cues before a name and their last characters, those after it and their first."""
    before = dict.fromkeys(cues("zh_before_weak"), 1.5) | dict.fromkeys(cues("zh_before"), 3.5)
    after = dict.fromkeys(cues("zh_after_weak"), 1.5) | dict.fromkeys(cues("zh_after"), 3.5)
    return before, frozenset(cue[-1] for cue in before), after, frozenset(cue[0] for cue in after)


@cache
def _weights() -> dict[str, float]:
    text = resources.files(__package__).joinpath("zh_name_weights.yaml").read_text(encoding="utf-8")
    weights: dict[str, float] = yaml.safe_load(text)
    return weights


def find_chinese_names(text: str) -> tuple[list[Span], list[tuple[int, int]], list[Token]]:
    """Spans of folded `text`; the ranges of domain terms, in which nothing is a name; the text cut into words."""
    import rjieba

    tagged: list[Token] = rjieba.tag(text)
    protected = [match.span() for match in _terms().finditer(text)]
    familiar = list(_familiar(text, tagged))
    starts = {span.start for span in familiar}
    names = [span for span in _names(text, tagged, protected) if span.start not in starts]
    return [*_dotted(text), *names, *familiar], protected, tagged


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a dictionary cuts a text: for each character its word, and where words start."""

    word_at: list[WordAt]
    starts: frozenset[int]


def candidates(text: str, tagged: list[Token]) -> Iterator[tuple[int, int, int, Cuts]]:
    """Every place where a name may be: start, length of the surname, characters after it (0: a title follows)."""
    cuts, titles = _cuts(tagged), cues("zh_titles")
    for match in _surname().finditer(text):
        start, size = match.start(), match.end() - match.start()
        for given in (0, 1, 2) if text[match.end() : match.end() + 1] in _title_starts() else (1, 2):
            rest = text[match.end() : match.end() + given]
            is_han = not given or "\u4e00" <= rest[:1] <= "\u9fff" and "\u4e00" <= rest[-1:] <= "\u9fff"
            if is_han and len(rest) == given and rest not in titles:
                yield start, size, given, cuts


@cache
def _surname() -> re.Pattern[str]:
    """A surname, a compound one first."""
    single = "".join(name for name in _surnames() if len(name) == 1)
    return re.compile(f"{'|'.join(sorted(_compound()))}|[{single}]")


@cache
def _title_starts() -> frozenset[str]:
    return frozenset(title[0] for title in cues("zh_titles"))


def _names(text: str, tagged: list[Token], protected: list[tuple[int, int]]) -> Iterator[Span]:
    blocked = {i for start, end in protected for i in range(start, end)}
    best: dict[int, tuple[float, int]] = {}
    for start, size, given, cuts in candidates(text, tagged):
        if not blocked or not blocked.intersection(range(start, start + size + given)):
            points = _points(text, start, size, given, cuts)
            best[start] = max(best.get(start, (MIN_POINTS, 0)), (points, start + size + given))
    last = 0
    for start, (points, end) in best.items():
        if points > MIN_POINTS and start >= last:
            yield Span(start, end, "PERSON", min(0.55 + max(points, 0) / 20, 0.94))
            last = end


def _cuts(tagged: list[Token]) -> Cuts:
    word_at: list[WordAt] = []
    starts = set()
    for word, tag in tagged:
        start = len(word_at)
        starts.add(start)
        word_at += [(start, word, tag)] * len(word)
    starts.add(len(word_at))
    return Cuts(word_at, frozenset(starts))


def _points(text: str, start: int, size: int, given: int, cuts: Cuts) -> float:
    """How much speaks for the name of `size` surname and `given` further characters at `start`: log odds."""
    if given == 0:
        return _title_points(text, start, size, cuts.word_at)
    end = start + size + given
    best_right, best_left, best_cuts = _best_rest()
    points = _own_points(text[start : start + size], text[start + size : end])
    # Most candidates end here or after the next look: nothing that is still to be seen would make them a name.
    if points + best_right + best_left + best_cuts <= MIN_POINTS:
        return MIN_POINTS
    points += _side_points()["right", _right(text, start, end, cuts.word_at)]
    if points + best_left + best_cuts <= MIN_POINTS:
        return MIN_POINTS
    left = _left(text, start, cuts.word_at)
    if size == 1 and text[start] in cues("zh_function_surnames"):
        known, strong = _known(text[start + 1 : end])
        if strong < given and (left != "cue" or known < given):
            return MIN_POINTS
    points += _side_points()["left", left]
    if points + best_cuts <= MIN_POINTS:
        return points
    for mark in _word_marks(text, start, size, end, cuts):
        points += _weights().get(mark, 0.0)
    return points


@lru_cache(maxsize=2**16)
def _own_points(surname: str, given: str) -> float:
    """What a name's own characters say."""
    return _head_points()[_kind_of_surname(surname), *_known(given), len(given)]


@cache
def _best_rest() -> tuple[float, float, float]:
    """No less than what the right mark, the left one, and the marks after them can add."""
    best: dict[str, float] = {}
    for mark, weight in _weights().items():
        kind = " ".join(mark.split()[:2]) if mark.startswith("cut ") else mark.split()[0]
        best[kind] = max(best.get(kind, 0.0), weight)
    ends = max(best["cut before"], best["cut head"]) + max(best["cut after"], best["cut rest"]) + best["cut fits"]
    return best["right"], best["left"], max(best["cut exact"], best["cut over"], ends)


@cache
def _head_points() -> dict[tuple[str, int, int, int], float]:
    """What the marks of a name's own characters add up to: by kind of surname, known, strong and all given ones."""
    weights = _weights()
    return {
        (kind, known, strong, given): sum(weights.get(mark, 0.0) for mark in _head_marks(kind, known, strong, given))
        for kind in ("compound", "double", "grammar", "word", "common", "single")
        for given in (1, 2)
        for known in range(given + 1)
        for strong in range(given + 1)
    }


@cache
def _side_points() -> dict[tuple[str, str], float]:
    """By side and what stands there."""
    kinds = ("cue", "weak", "inside", "edge", "guess", "none", *_TAGS)
    return {(side, kind): _weights().get(f"{side} {kind}", 0.0) for side in ("left", "right") for kind in kinds}


def marks(text: str, start: int, size: int, given: int, cuts: Cuts) -> Iterator[str]:
    """What is seen of a candidate; each mark has its weight in zh_name_weights.yaml."""
    end = start + size + given
    yield from _head_marks(*_head(text, start, size, end), given)
    yield f"right {_right(text, start, end, cuts.word_at)}"
    yield f"left {_left(text, start, cuts.word_at)}"
    yield from _word_marks(text, start, size, end, cuts)


def _head(text: str, start: int, size: int, end: int) -> tuple[str, int, int]:
    """The kind of the surname; how many of the characters after it given names use, and use more than words do."""
    return _kind_of_surname(text[start : start + size]), *_known(text[start + size : end])


@cache
def _kind_of_surname(surname: str) -> str:
    if len(surname) >= 2:
        return "double" if surname in cues("zh_compound_words") else "compound"
    if surname in cues("zh_grammar_surnames"):
        return "grammar"
    return "word" if surname in _rare() else "common" if surname in _common() else "single"


@lru_cache(maxsize=2**15)
def _known(given: str) -> tuple[int, int]:
    return sum(map(_given().__contains__, given)), sum(map(_strong().__contains__, given))


def _all_strong(given: str) -> bool:
    return _known(given)[1] == len(given)


def _head_marks(kind: str, known: int, strong: int, given: int) -> tuple[str, ...]:
    return "bias", f"surname {kind}", f"given {known} of {given}", f"{kind} strong {strong} of {given}"


def _word_marks(text: str, start: int, size: int, end: int, cuts: Cuts) -> Iterator[str]:
    if text[start:end] in word_set("zh_words") or text[start:end] in word_set("zh_dictionary"):
        yield "is a word"
    if size == 1 and text[start : start + 2] in _term_set():
        yield "begins with a term"
    yield from _cut_marks(start, end, size, cuts)


def _cut_marks(start: int, end: int, size: int, cuts: Cuts) -> list[str]:
    """Where the dictionary cuts the text around the name, and what it sees in it."""
    first_start, first, tag = cuts.word_at[start]
    last_start, last, last_tag = cuts.word_at[end - 1]
    kind = "name" if tag.startswith("nr") else "other" if tag in ("x", "eng") else "word"
    if first_start == start and len(first) == end - start:
        return [f"cut exact {kind}{' strong' if _all_strong(first[size:]) else ''}"]
    found = []
    if first_start < start:
        found.append("cut before " + ("name" if tag.startswith("nr") else "word"))
    elif len(first) == 2 and size == 1:
        found.append(f"cut head {kind}")
    elif len(first) > end - start:
        return [f"cut over {kind}"]
    if last_start + len(last) > end:
        found.append("cut after " + ("name" if last_tag.startswith("nr") else "word"))
    elif last_start == start + size and len(last) == 2:
        found.append("cut rest " + ("name" if last_tag.startswith("nr") else "word"))
    if start in cuts.starts and end in cuts.starts:
        found.append("cut fits")
    return found


def _title_points(text: str, start: int, size: int, word_at: list[WordAt]) -> float:
    """A surname alone counts only right before a title: 张女士, 欧阳医生."""
    surname = text[start : start + size]
    title = max((t for t in cues("zh_titles") if text.startswith(t, start + size)), key=len, default="")
    if not title or surname in cues("zh_no_surname_before_title"):
        return -9.0
    word_start, word, _ = word_at[start]
    led = len(title) > 1 and text[max(0, start - 1) : start] in tuple("由请跟找让给叫问")  # 由庞主任接诊
    if not led and (
        word_start < start or (len(word) > size and word[size : size + len(title)] != title[: len(word) - size])
    ):
        return -9.0
    left = "cue" if led else _left(text, start, word_at)
    if len(title) == 1 and _right(text, start, start + size + 1, word_at) == "none" and left in ("none", "n"):
        return -9.0
    return 4.0 if surname not in _rare() or left in ("cue", "edge") else MIN_POINTS - 1


def _familiar(text: str, tagged: list[Token]) -> Iterator[Span]:
    """The surname of 老张 and 小李, where the dictionary sees no word that begins so and a verb or an edge follows."""
    if "老" not in text and "小" not in text:
        return
    word_at = _cuts(tagged).word_at
    for match in re.finditer(r"[老小](?=[\u4e00-\u9fff])", text):
        start = match.end()
        begin, word, tag = word_at[match.start()]
        alone = len(word) == 1 or (begin == match.start() and len(word) == 2 and tag[0] == "n")
        if not alone or text[start] not in _common() or _left(text, match.start(), word_at) in ("none", "n"):
            continue
        if tag.startswith("nr") or text[start] not in cues("zh_surname_words"):
            right = _right(text, start, start + 1, word_at)
            if right in ("cue", "weak", "edge", "inside", "v", "p", "d", "t", "c", "guess"):
                yield Span(start, start + 1, "PERSON", 0.72)


def _left(text: str, start: int, word_at: list[WordAt]) -> str:
    """What stands before: a cue, an edge, a weak cue, a word of a kind that names follow, or anything."""
    before, last, _, _ = _sides()
    if start == 0:
        return "edge"
    char = text[start - 1]
    if not "\u4e00" <= char <= "\u9fff" and NAME_EDGE.match(char):
        cue = text[max(0, start - 8) : start].rstrip(" :,\t\"'、是为")
        return "cue" if any(before.get(cue[-n:], 0) > 3 for n in range(2, 7)) else "edge"
    listed = 0.0
    for size in range(1, min(start, 5) + 1) if char in last else ():
        listed = max(listed, before.get(text[start - size : start], 0.0))
    word_start, word, tag = word_at[start - 1]
    if listed:
        return "cue" if listed > 3 else "weak"
    if word_start + len(word) > start:
        return "none"
    return tag[0] if tag[0] in _TAGS else "none"


def _right(text: str, start: int, end: int, word_at: list[WordAt]) -> str:
    """The same for what stands after; `guess`: the dictionary's longer name goes on there."""
    char = text[end : end + 1]
    if not "\u4e00" <= char <= "\u9fff" and (not char or NAME_EDGE.match(char)):
        return "edge"
    _, _, after, first = _sides()
    listed = 0.0
    for size in range(1, 5) if char in first else ():
        listed = max(listed, after.get(text[end : end + size], 0.0))
    word_start, _, tag = word_at[end]
    if listed:
        return "cue" if listed > 3 else "weak" if word_start == end else "inside"
    if word_start < end:
        return "guess" if word_start >= start and tag.startswith("nr") else "none"
    return tag[0] if tag[0] in _TAGS else "none"


def _dotted(text: str) -> Iterator[Span]:
    """买买提·阿不都拉: parts joined by a middle dot, as far as their characters write foreign sounds."""
    if "·" not in text:
        return
    sounds = characters("zh_transliteration")
    for match in re.finditer(rf"(?<=[{HAN}])·(?=[{HAN}])", text):
        start, end = match.start(), match.end()
        while start > 0 and text[start - 1] in sounds and match.start() - start < 8:
            start -= 1
        while end < len(text) and text[end] in sounds and end - match.end() < 8:
            end += 1
        if match.start() - start >= 2 and end - match.end() >= 2:
            yield Span(start, end, "PERSON", 0.9)
