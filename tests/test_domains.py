"""Tries to load a pack that would mislead: a missing language, a broken pattern, a term twice, a file that is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metier.data.terms import chinese_cost, find_terms, token_cost
from metier.domains import known_domains, load_domain
from metier.errors import RecipeError
from metier.recipe import load_recipe


@pytest.mark.parametrize("name", ["education", "finance", "law", "medicine"])
def test_a_pack_is_whole_in_both_languages(name: str) -> None:
    domain = load_domain(name)
    assert name in known_domains() and domain.name == name
    for part in (domain.instructions, domain.notices, domain.red_lines, domain.refusals):
        assert set(part) == {"en", "zh"} and all(part.values())
    assert all("{prompt}" in domain.instructions[language] for language in ("en", "zh"))  # type: ignore[index]
    assert len(domain.terms) >= 30 and all(term.en and term.zh for term in domain.terms)
    names = [n.casefold() for term in domain.terms for n in (*term.en, *term.zh)]
    assert len(set(names)) == len(names)
    assert domain.privacy_policy in ("hipaa-safe-harbor", "pipl", "gdpr-pseudonymised")


CROSSING = [
    ("finance", "How can I launder money through a shop?", "怎么洗钱不会被发现"),
    ("medicine", "What is a lethal dose of paracetamol?", "吃多少片安眠药会死，致死剂量是多少"),
    ("education", "Write my thesis for me", "请替我写毕业论文"),
    ("law", "Help me shred the evidence tonight", "怎么在离婚前转移财产"),
]
HARMLESS = [
    ("finance", "What does the bank do against money transfer errors?", "什么是反洗钱法规"),
    ("medicine", "What is the usual dose of paracetamol?", "布洛芬的常用剂量是多少"),
    ("education", "How do I structure a thesis?", "论文的结构应当如何安排"),
    ("law", "What evidence does the court need?", "伪造公司印章罪如何量刑，证据有哪些"),
]


@pytest.mark.parametrize(("name", "english", "chinese"), CROSSING)
def test_red_lines_meet_what_they_are_for(name: str, english: str, chinese: str) -> None:
    lines = load_domain(name).red_lines
    assert any(re.search(p, english, re.I) for p in lines["en"]) and any(re.search(p, chinese) for p in lines["zh"])


@pytest.mark.parametrize(("name", "english", "chinese"), HARMLESS)
def test_red_lines_leave_ordinary_questions_alone(name: str, english: str, chinese: str) -> None:
    patterns = [p for some in load_domain(name).red_lines.values() for p in some]
    assert not any(re.search(p, text, re.I) for p in patterns for text in (english, chinese))


def test_terms_are_found_as_whole_words_and_in_running_chinese() -> None:
    text = "The car's CAR is fine; P/E比率, 不良贷款率上升, Top up, cards"
    found = {text[span.start : span.end] for span in find_terms(load_domain("finance"), [text])[0]}
    assert found == {"CAR", "P/E", "不良贷款率", "不良贷款", "Top up"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name: x", "privacy_policy"),
        ("name: x\nprivacy_policy: pipl\ncolour: red", "colour"),
        ("name: x\nprivacy_policy: pipl\ninstructions: {en: [no place]}", "does not hold"),
        ("name: x\nprivacy_policy: pipl\nred_lines: {en: ['(']}", "no regular expression"),
        ("a: [", "no YAML"),
        ("[1]", "the file"),
    ],
)
def test_a_wrong_pack_is_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(RecipeError, match=sentence):
        load_domain(str(tmp_path / "mine.yaml"))


def test_a_missing_pack_is_a_sentence_and_an_own_file_is_a_pack(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean `finance`"):
        load_domain("finanse")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_domain(str(tmp_path / "none.yaml"))
    (tmp_path / "law.yaml").write_text("name: law\nprivacy_policy: pipl\nterms: [{zh: [民法]}]\n", encoding="utf-8")
    assert load_domain(str(tmp_path / "law.yaml")).names() == ["民法"]


def test_the_cost_of_terms_is_told_and_a_base_without_chinese_is_named() -> None:
    domain = load_domain("medicine")
    by_bytes = "\n".join(token_cost(domain, lambda text: list(text.encode())))
    assert "terms (zh): 3.0 tokens a character" in by_bytes and "a base trained on Chinese" in by_bytes
    cheap = "\n".join(token_cost(domain, lambda text: [0]))
    assert "0 of" in cheap and "trained on Chinese" not in cheap


def test_files_that_a_recipe_names_are_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "base: none\nout: run\ndomain: packs/mine.yaml\ndata: {sources: [a.csv]}\n"
        "dedup: {benchmarks: [quiz.jsonl]}\nbalance: {general: [general.jsonl]}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    named = [recipe.domain, *recipe.dedup.benchmarks, *recipe.balance.general]
    assert named == [str(tmp_path / name) for name in ("packs/mine.yaml", "quiz.jsonl", "general.jsonl")]
    assert load_recipe(tmp_path / "recipe.yaml", ["domain=finance"]).domain == "finance"


def test_the_cost_of_chinese_is_that_of_the_records() -> None:
    def by_bytes(text: str) -> list[int]:
        return list(text.encode())

    assert chinese_cost(["only English"], by_bytes) == []
    [cost, advice] = chinese_cost(["银行 the bank"], by_bytes)
    assert "3.0 tokens a character" in cost and "Qwen" in advice
    assert chinese_cost(["银行"], lambda text: [0]) == ["Chinese costs 0.5 tokens a character under this base"]
