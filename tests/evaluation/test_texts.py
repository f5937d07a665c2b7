"""Tries to find a text that one language lacks, or whose numbers the translation lost."""

from __future__ import annotations

import string

from metier.evaluation.texts import show, show_delta, words


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_have_the_same_texts_with_the_same_fields() -> None:
    english, chinese = words("en"), words("zh")
    assert english.keys() == chinese.keys()
    assert [k for k in english if fields(english[k]) != fields(chinese[k])] == []
    assert {k for k in english if not english[k].strip() or not chinese[k].strip()} == {"tag_None"}


def test_chinese_texts_are_chinese() -> None:
    same = {k for k, text in words("zh").items() if text == words("en")[k]}
    assert same <= {"bleu", "chrf", "digest", "rouge_l", "tag_None"}


def test_numbers_are_shown_as_shares_or_plainly() -> None:
    assert show("accuracy", 0.6412) == "64.1 %"
    assert show("perplexity", 3.14159) == "3.14"
    assert show_delta("accuracy", -0.1, "en") == "\N{MINUS SIGN}10.0 points"
    assert show_delta("bits_per_byte", 0.25, "zh") == "+0.250"
