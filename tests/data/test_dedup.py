"""Tries to miss a copy, to take templates for copies, to merge what differs, or to depend on the order of rows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from metier.data.dedup import Comparison, find_pairs, join_groups, merge_exact, merge_near
from metier.data.lines import Row, Source
from metier.data.minhash import near_duplicates
from metier.data.records import Record
from metier.data.shingles import Known, normalise, shingle_hashes

SOURCE = Source(Path("a.csv"), "a.csv", "csv", is_test=False)
TEST = Source(Path("t.csv"), "t.csv", "csv", is_test=True)
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("nder", "stol", "mmit", "rvix", "lque")]
HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]


def record(number: int, prompt: str, answer: str = "a", *, group: str | None = None, test: bool = False) -> Record:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record(TEST if test else SOURCE, Row(number), messages, group, prompt)


def sentence(rng: random.Random, words: int = 40) -> list[str]:
    return rng.choices(WORDS, k=words)


def corpus(seed: int, number: int, *, chinese: bool, template: str = "") -> tuple[list[str], set[tuple[int, int]]]:
    """Texts and the pairs of planted copies: a twentieth of the words exchanged, other case and punctuation."""
    rng = random.Random(seed)
    stock, gap, length = (HAN, "", 100) if chinese else (WORDS, " ", 40)
    texts = [template + gap.join(rng.choices(stock, k=length)) for _ in range(number)]
    pairs = set()
    for i in range(0, number, 10):
        words = list(texts[i]) if chinese else texts[i].split(" ")
        for _ in range(len(words) // 20):
            words[rng.randrange(len(words))] = rng.choice(stock)
        pairs.add((i, len(texts)))
        texts.append(gap.join(words).upper().replace("A", "Ａ") + ("。" if chinese else " ."))
    return texts, pairs


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("has_template", [False, True])
def test_planted_copies_are_found_and_nothing_else_is(chinese: bool, has_template: bool) -> None:
    template = (
        "本报告仅供院内使用，未经书面许可不得复制、转载或向第三方提供。" if chinese else " ".join(WORDS[:30]) + " "
    ) * 2
    texts, planted = corpus(1, 1000, chinese=chinese, template=template if has_template else "")
    found = near_duplicates(texts, threshold=0.5)
    pairs = set(zip(found.left.tolist(), found.right.tolist(), strict=True))
    assert len(planted & pairs) >= 0.99 * len(planted)
    assert pairs == planted & pairs
    assert (found.similarity >= 0.5).all() and (found.similarity <= 1).all()


def test_similarity_is_the_jaccard_index_of_the_shingles() -> None:
    one, other = (
        "the quick brown fox jumps over the lazy dog again",
        "the quick brown fox jumps over the lazy cat again",
    )
    found = near_duplicates([one, other], threshold=0.3)
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other)]
    assert found.similarity.tolist() == [pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))]


def test_short_texts_are_no_near_duplicates() -> None:
    texts = ["left femur", "left femur", "左股骨骨折", "左股骨骨折", "", "   "]
    assert len(near_duplicates(texts, threshold=0.5)) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ＡＢＣ　１２３", "abc 123"),
        ("血糖：5.6，偏低。", "血糖 5 6偏低"),
        ("a--b", "A b"),
        ("é", "É"),
        ("P/E 比率", "p/e比率"),
    ],
)
def test_width_case_and_punctuation_do_not_count(one: str, other: str) -> None:
    assert normalise([one]).codes.tolist() == normalise([other]).codes.tolist()


def test_each_text_has_as_many_shingles_as_it_has_places() -> None:
    texts = ["", "abcd", "fghij", "klmnopqr", "中", "国家", "汉字字符", "emoji 😀 ok 𠮷野家"]
    batch = normalise(texts)
    hashes, text = shingle_hashes(batch)
    sizes = [max(0, len(batch.text(i)) - (2 if batch.is_han[i] else 5) + 1) for i in range(len(texts))]
    assert [int((text == i).sum()) for i in range(len(texts))] == sizes
    assert len(set(hashes.tolist())) == sum(sizes)


def test_what_is_found_does_not_depend_on_the_order_of_rows() -> None:
    texts, _ = corpus(2, 400, chinese=False)
    records = [record(i, text) for i, text in enumerate(texts)]
    shuffled = random.Random(0).sample(records, len(records))
    found = []
    for some in (records, shuffled):
        pairs = find_pairs(some, Comparison(some, "classification"), 0.5)
        groups = join_groups(some, pairs, [])
        alike = {frozenset((some[a].row.number, some[b].row.number)) for a, b, _ in pairs}
        found.append((alike, {r.row.number: named.group for r, named in zip(some, groups, strict=True)}))
    assert found[0] == found[1]


def test_exact_copies_are_merged_into_the_first_and_test_files_are_left_alone() -> None:
    records = [
        record(1, "Ａ b"),
        record(2, "A  b"),
        record(3, "a b"),
        record(4, "A b", "other"),
        record(5, "A b", test=True),
    ]
    kept, merged = merge_exact(records)
    assert [r.row.number for r in kept] == [1, 3, 4, 5]
    assert [(m.record.row.number, m.into.row.number, m.how) for m in merged] == [(2, 1, "exact")]


def test_near_merging_keeps_the_longest_and_never_follows_a_chain_or_crosses_labels() -> None:
    records = [record(1, "xxxx"), record(2, "xxxxx"), record(3, "xxx"), record(4, "xxxxxx", "b"), record(5, "xx")]
    pairs = [(0, 1, 0.9), (0, 2, 0.9), (1, 3, 0.9), (2, 4, 0.9)]
    merged = merge_near(records, pairs, "classification")
    # 3 is like 1, which went into 2, and not like 2: it stays, and takes 5.
    assert {(m.record.row.number, m.into.row.number) for m in merged} == {(1, 2), (5, 3)}


def test_groups_join_ids_prompts_and_near_duplicates() -> None:
    records = [
        record(0, "p0", group="g1"), record(1, "p1", group="g1"), record(2, "p1", group="g2"),
        record(3, "p3", group="g3"), record(4, "p4", group="g4"), record(5, "p5", group="g5"),
    ]  # fmt: skip
    assert [r.group for r in join_groups(records, [(2, 3, 0.8)], [])] == ["g1", "g1", "g1", "g1", "g4", "g5"]
    _, merged = merge_exact([records[4], record(6, "p4", group="g5")])
    assert [r.group for r in join_groups(records, [], merged)][4:] == ["g4", "g4"]


def test_what_the_template_gave_to_all_is_not_compared() -> None:
    records = [
        record(i, f"Condition: {word}\nChapter:", f"answer {i}") for i, word in enumerate(["asthma", "gout", "flu"])
    ]
    assert list(Comparison(records, "classification").texts(records)) == ["asthma", "gout", "flu"]
    same = [record(i, "the same") for i in range(3)]
    assert list(Comparison(same, "classification").texts(same)) == ["", "", ""]


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000])
def test_a_set_of_hashes_holds_what_was_put_in_and_nothing_else(size: int) -> None:
    numbers = np.random.default_rng(size).integers(0, 2**64, size + 5000, dtype=np.uint64)
    known, asked = np.unique(numbers[:size]), numbers[size // 2 :]
    assert Known(known).places(asked).tolist() == np.flatnonzero(np.isin(asked, known)).tolist()
