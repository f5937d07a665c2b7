"""Tries to find an overlap metric that differs from rouge-score's or SQuAD's, or is blind to Chinese."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from metier.evaluation import metrics, overlap


def plain_lcs(first: list[str], second: list[str]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize("seed", range(20))
def test_common_subsequence_equals_the_plain_table(seed: int) -> None:
    generator = random.Random(seed)
    first, second = ([generator.choice("abcde") for _ in range(generator.randrange(0, 90))] for _ in range(2))
    assert overlap.longest_common_subsequence(first, second) == plain_lcs(first, second)


# rouge_score 0.1.2, RougeScorer(["rougeL"]).score(reference, completion)["rougeL"].fmeasure
ROUGE = [
    ("The cat sat on the mat, quietly.", "The cat sat on a mat, quietly.", 0.8571428571428571),
    ("A fracture of the left ankle was found in the X-ray.", "The X-ray showed a fracture of the left ankle.", 12 / 22),
    ("police killed the gunman", "the gunman killed police", 0.5),
    ("", "nothing was said", 0.0),
    ("snake_case and x2", "snake case, and X2!", 1.0),
]


@pytest.mark.parametrize(("completion", "reference", "expected"), ROUGE)
def test_rouge_l_equals_rouge_score(completion: str, reference: str, expected: float) -> None:
    value = metrics.mean(overlap.rouge_l_statistics([completion], [reference]).sum(0))
    assert value == pytest.approx(100 * expected)


def test_rouge_l_agrees_with_the_package_on_random_text() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    generator = random.Random(0)
    words = ["The", "rate", "of", "interest", "rose", "by", "3.5", "per", "cent", "x-ray", "don't", "A_b", "2,000"]
    for _ in range(60):
        a, b = (" ".join(generator.choices(words, k=generator.randrange(1, 30))) for _ in range(2))
        expected = scorer.score(b, a)["rougeL"].fmeasure
        assert overlap.rouge_l_statistics([a], [b])[0, 0] == pytest.approx(100 * expected)


def test_chinese_rouge_tells_a_paraphrase_from_another_sentence_with_the_same_number() -> None:
    reference = "该公司 2023 年营业收入同比增长百分之十二"
    alike, unlike = "公司 2023 年的营业收入同比增长了百分之十二", "患者 2023 年因骨折入院"
    values = overlap.rouge_l_statistics([alike, unlike], [reference] * 2)[:, 0]
    assert values[0] > 85
    assert values[1] < 35


def test_width_punctuation_and_spaces_between_han_do_not_part_equal_answers() -> None:
    assert metrics.normalise("市盈率：１２．５　倍。") == metrics.normalise("市盈率: 12.5 倍.")
    assert metrics.normalise("民 事 案件") == metrics.normalise("民事案件")
    assert metrics.normalise("“好”") == metrics.normalise('"好"')
    assert metrics.normalise("New York") != metrics.normalise("NewYork")
    assert metrics.normalise("1.5") != metrics.normalise("15")


def test_token_f1_counts_repeated_words_once_for_each() -> None:
    assert overlap.token_f1_statistics(["a a b"], ["a b b"])[0, 0] == pytest.approx(2 / 3)
    assert overlap.token_f1_statistics(["", "x", ""], ["", "", "x"])[:, 0].tolist() == [1, 0, 0]
    assert overlap.token_f1_statistics(["合同无效"], ["合同有效"])[0, 0] == pytest.approx(0.75)


def test_fields_of_json_are_compared_by_path_and_value() -> None:
    reference = '{"name": "Li", "doses": [{"mg": 5}, {"mg": 10}]}'
    answers = [
        '```json\n{"doses": [{"mg": 10}, {"mg": 5}], "name": "ＬＩ"}\n```', '{"name": "Li"}', "Li, 5 mg", "[1]",
        "[" * 100_000, '{"name": ' * 2000,
    ]  # fmt: skip
    sums = overlap.field_statistics(answers, [reference] * len(answers))
    assert sums[:, 0].tolist() == [3, 1, 0, 0, 0, 0]
    assert overlap.field_f1(sums[:1].sum(0)) == 1.0
    assert overlap.field_f1(sums[:2].sum(0)) == pytest.approx(2 * 4 / (4 + 6))
    assert overlap.field_f1(np.zeros(3)) == 1.0


def test_answers_of_a_megabyte_are_scored_in_seconds() -> None:
    long = "的" * 300_000
    assert overlap.rouge_l_statistics([long], ["短的回答"])[0, 0] < 1
    assert overlap.token_f1_statistics([long], ["短的回答"])[0, 0] < 0.01
    assert re.fullmatch("的+", metrics.normalise(long))
