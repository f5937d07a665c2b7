"""A record's messages -> the same case of other people: surrogates for names, organisations, dates and amounts.

One value has one stand-in everywhere in the record (and, with one key, in all records of a group): 王小明 is 张明甲 in
the prompt and in the answer, John Carter's Carter is Robin Aldermoor's Aldermoor. Names come from the surrogate
operator of de-identification, which also fills a single [PERSON] of an earlier pass. An organisation keeps what says
of which kind it is (银行, Ltd). Dates all move by one number of weeks, so that intervals and days of the week stay.
An amount of money keeps its first digit, its size, its zeros and its place in the order of the record's amounts.

Left alone: a record whose answer names someone that the prompt does not (it is a fact about the world), dates and
amounts where the answer holds a number (it may be computed from them), values that hold a term of the domain, and a
label: nothing that stands in it is replaced. Limits: what the recognizers do not see stays, and what they take for a
name by mistake is replaced; a label that depends on a threshold inside an amount's first digit may become wrong.
"""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Iterable, Iterator

from metier.data.deidentify import surrogates
from metier.data.deidentify.detect import SURE, detect_together
from metier.data.deidentify.operators import full_names, shifted
from metier.data.records import Message
from metier.data.terms import whole_word
from metier.domains import Domain

SLOT = "[PERSON]"
MAX_WEEKS = 26
_HAN = re.compile("[\u3400-\u9fff]")
_KIND_ZH = re.compile(
    "(?:股份有限公司|有限责任公司|有限公司|公司|集团|银行|信用社|医院|诊所|卫生院|大学|学院|中学|小学|幼儿园|学校|"
    "事务所|律所|保险|证券|药房|酒店|超市|商行)(?:[\u4e00-\u9fff]{2,8}?(?:分行|支行|营业部))?$"
)
_KIND_EN = re.compile(
    r"(?: (?:Inc|Ltd|LLC|LLP|plc|Corp|Corporation|Company|Co|Limited|Bank|Hospital|Clinic|University|College|School|"
    r"Group|Insurance|Partners|Associates|Holdings|Trust)\.?)+$"
)
# 王先生: the surname alone, before what it is said with.
_TITLES = "先生|女士|小姐|太太|老师|医生|大夫|经理|主任|教授|同学|护士|律师|总"
_DATE = re.compile(
    r"(?<![\d/.-])(?:\d{4}年\d{1,2}月\d{1,2}日?|\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[/.]\d{1,2}[/.]\d{4}"
    r"|\d{1,2}(?:st|nd|rd|th)? [A-Z][a-z]{2,8}\.? \d{4}|[A-Z][a-z]{2,8}\.? \d{1,2}(?:st|nd|rd|th)?,? \d{4})(?![\d/-])"
)
_NUMBER = re.compile(r"(?<![\d.,A-Za-z])\d[\d,]*(?:\.\d+)?(?![\d.]*\d|[A-Za-z%％])")
_BEFORE_AMOUNT = re.compile(r"(?:[$€£¥￥]|\b(?:USD|EUR|GBP|RMB|CNY|HKD)) ?$|人民币 ?$")
_AFTER_AMOUNT = re.compile(r" ?(?:dollars|euros|pounds|yuan|USD|EUR|GBP|RMB|CNY|[百千万亿]*(?:元|美元|港元|欧元|英镑))")
_ANY_NUMBER = re.compile(
    r"[0-9０-９]|[一二三四五六七八九十百千万亿两]+(?:元|万|亿|年|月|日|天|周|岁|个|成|倍|分)"
    r"|(?i:\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|half|double|twice|hundred|thousand|million)\b)"
)


def swap_entities(
    messages: list[Message], domain: Domain | None, *, is_label: bool, key: bytes
) -> list[Message] | None:
    """The messages with stand-ins that follow from `key`; None where nothing can be replaced.

    `is_label`: the answer is a class and stays as it is, as does whatever stands in it.
    """
    texts = [message["content"] for message in messages]
    people, organisations = _named(texts, domain)
    answer, before = texts[-1], "\n".join(texts[:-1])
    if any(value in answer and value not in before for value in people | organisations):
        return None
    new = _people(people, key) | _organisations(organisations, key) | _slot(texts, key)
    new |= {} if _ANY_NUMBER.search(answer) else _dates(texts[:-1], key)
    kept = [value for value in new if is_label and value in answer]
    new = {value: stand_in for value, stand_in in new.items() if value not in kept and stand_in != value}
    rewritten = [_rewrite(text, new) for text in texts]
    if not _ANY_NUMBER.search(answer):
        rewritten[:-1] = _with_amounts(rewritten[:-1], key)
    if rewritten == texts:
        return None
    return [{**message, "content": text} for message, text in zip(messages, rewritten, strict=True)]


def _named(texts: list[str], domain: Domain | None) -> tuple[set[str], set[str]]:
    """The people and the organisations that are surely named, without those that hold a term of the domain.

    A part of a sure name (Carter) is as sure as the whole.
    """
    terms = [whole_word(name) for name in domain.names()] if domain else []
    found: dict[str, set[str]] = {"PERSON": set(), "ORGANIZATION": set()}
    parts = set()
    for text, spans in zip(texts, detect_together(texts), strict=True):
        for span in spans:
            value = text[span.start : span.end]
            if span.entity_type not in found or any(term.search(value) for term in terms):
                continue
            if span.score >= SURE:
                found[span.entity_type].add(value)
            elif span.entity_type == "PERSON":
                parts.add(value)
    people = found["PERSON"]
    people |= {part for part in parts if any(part in re.split(r"[\s.]+", name) for name in people)}
    return people, found["ORGANIZATION"]


def _people(values: set[str], key: bytes) -> dict[str, str]:
    whole = full_names(values)
    new: dict[str, str] = {}
    for value in sorted(values):
        if _HAN.fullmatch(value):
            full = [name for name in sorted(whole) if name.startswith(value)]
            surname = surrogates.person(full[0] if len(full) == 1 else f"{value}某", key)[0]
            new |= {f"{value}{title}": f"{surname}{title}" for title in _TITLES.split("|")}
            continue
        full = [name for name in sorted(whole) if name != value and value in re.split(r"[\s.]+", name)]
        new[value] = surrogates.person(value, key, full[0] if len(full) == 1 else None)
    return new


def _organisations(values: set[str], key: bytes) -> dict[str, str]:
    new = {}
    for value in values:
        if kind := _KIND_ZH.search(value):
            name = surrogates.person(value + "某", key)
            new[value] = name[1:] + kind.group()
        elif kind := _KIND_EN.search(value):
            new[value] = surrogates.person(re.sub(r"\s", "", value), key) + kind.group()
    return new


def _slot(texts: list[str], key: bytes) -> dict[str, str]:
    """A name for the only [PERSON] of the record; two of them may be two people or one."""
    text = "\n".join(texts)
    if text.count(SLOT) != 1:
        return {}
    return {SLOT: surrogates.person("某某" if _HAN.search(text) else "some one", key)}


def _dates(texts: list[str], key: bytes) -> dict[str, str]:
    number = int.from_bytes(surrogates.keyed(key, "weeks")[:2], "big")
    weeks = datetime.timedelta(weeks=(number % MAX_WEEKS + 1) * (1 if number & 1 << 15 else -1))
    new = {}
    for text in texts:
        for value in _DATE.findall(text):
            try:
                new[value] = shifted(value, weeks) or value
            except (ValueError, OverflowError):  # 31 June
                continue
    return new


def _with_amounts(texts: list[str], key: bytes) -> list[str]:
    """The texts with other amounts, wherever a number with an amount's value stands."""
    amounts = {_value(match): match.group() for text in texts for match in _amounts(text)}
    rng = random.Random(surrogates.keyed(key, "amounts"))
    ordered = sorted(amounts)
    for _ in range(32):
        new = [_like(amounts[value], rng) for value in ordered]
        if all(a < b for a, b in zip(new, new[1:], strict=False)):
            break
    else:
        return texts
    changed = dict(zip(ordered, new, strict=True))
    return [
        _NUMBER.sub(lambda m: _written(changed[_value(m)], m.group()) if _value(m) in changed else m.group(), text)
        for text in texts
    ]


def _amounts(text: str) -> Iterator[re.Match[str]]:
    dates = [match.span() for match in _DATE.finditer(text)]
    for match in _NUMBER.finditer(text):
        is_money = _BEFORE_AMOUNT.search(text[: match.start()]) or _AFTER_AMOUNT.match(text, match.end())
        if is_money and not any(start <= match.start() < end for start, end in dates):
            yield match


def _value(match: re.Match[str]) -> float:
    return float(match.group().replace(",", ""))


def _like(written: str, rng: random.Random) -> float:
    """Another number of the same first digit and size, with zeros where this one has them; the rest differs."""
    digits = written.replace(",", "")
    first = next((i for i, char in enumerate(digits) if char in "123456789"), len(digits))
    changed = [
        rng.choice("123456789".replace(char, "")) if char in "123456789" and i > first else char
        for i, char in enumerate(digits)
    ]
    return float("".join(changed))


def _written(value: float, like: str) -> str:
    decimals = len(like.partition(".")[2])
    return f"{value:,.{decimals}f}" if "," in like else f"{value:.{decimals}f}"


def _rewrite(text: str, new: dict[str, str]) -> str:
    if not new:
        return text
    return re.sub("|".join(_patterns(new)), lambda match: new[match.group()], text)


def _patterns(values: Iterable[str]) -> Iterator[str]:
    """The longest first, so that 王小明 is found before 小明; Latin ones as whole words."""
    for value in sorted(values, key=lambda value: (-len(value), value)):
        before = r"(?<![A-Za-z0-9])" if value[0].isascii() and value[0].isalnum() else ""
        after = r"(?![A-Za-z0-9])" if value[-1].isascii() and value[-1].isalnum() else ""
        yield before + re.escape(value) + after
