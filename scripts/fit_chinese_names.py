"""Fits the weights of metier/data/deidentify/zh_name_weights.yaml: what speaks for a Chinese name, and how much.

    python scripts/fit_chinese_names.py dict.txt

Logistic regression over the marks of chinese.py. Examples: every candidate (a surname and one or two characters) in
records made of benchmarks/deidentify/dev_zh.txt and tune_two_zh.txt, in most of them with names drawn at random
(surnames of the list, given names of people in dict.txt, which is that of the PyPI package jieba 0.42.1), and in every
second article of the bundled laws and the terms of the domains' packs, where nothing is a name. It also writes
zh_words.txt: words of those articles that jieba tags as names or that no name is made like, and the words after
`# by hand`. The held-out templates are not read.
"""

from __future__ import annotations

import csv
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression

from metier.data.deidentify import chinese
from metier.data.deidentify.lexicon import characters, word_set, words
from metier.data.deidentify.spans import fold

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "metier" / "data" / "deidentify"
RECORDS = 8_000
NO_NAME = 2.0  # weight of what is no name
PART = 0.3  # weight of a name cut or grown, which loses to the name anyway
sys.path.insert(0, str(ROOT / "benchmarks"))


def main() -> None:
    from deidentify_corpus import Planted, records  # type: ignore[import-not-found]

    with (ROOT / "metier" / "bundled" / "china_law_departments.csv").open(encoding="utf-8-sig") as file:
        laws = [row["text"] for row in csv.DictReader(file)][::2]
    _write_words(laws)
    marks: list[list[str]] = []
    is_name: list[bool] = []
    weight: list[float] = []
    rng = random.Random(3)
    rare = "".join(sorted(set("".join(laws))))
    rare = "".join(char for char in rare if "\u4e00" <= char <= "\u9fff")
    tuning = [record for name in ("dev_zh.txt", "tune_two_zh.txt") for record in records(name, RECORDS, 7)]
    given = _given_names(Path(sys.argv[1]))
    made = [_renamed(record, rng, Planted, rare, given) for record in tuning]
    for text, spans, negative in [(r.text, r.spans, r.negative) for r in made] + [
        (law, (), False) for law in laws + _terms()
    ]:
        for found, truth, at_name in _candidates(text, spans):
            marks.append(found)
            is_name.append(truth)
            weight.append(3.0 if negative else 1.0 if truth else PART if at_name else NO_NAME)
    names = sorted({mark for found in marks for mark in found})
    index = {mark: i for i, mark in enumerate(names)}
    columns = [index[mark] for found in marks for mark in found]
    ends = np.cumsum([0, *map(len, marks)])
    matrix = csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(marks), len(names)))
    fitted = LogisticRegression(C=0.3, max_iter=2000).fit(matrix, is_name, sample_weight=weight)
    odds = fitted.decision_function(matrix)
    names_are = np.array(is_name)
    found_share = (odds[names_are] > chinese.MIN_POINTS).mean()
    print(f"{len(marks):,} candidates, {names_are.sum():,} names; found {found_share:.4f}")
    print(f"wrongly {(odds[~names_are] > chinese.MIN_POINTS).sum():,}")
    weights = {mark: round(float(value), 1) for mark, value in zip(names, fitted.coef_[0], strict=True)}
    weights["bias"] = round(float(fitted.intercept_[0] + fitted.coef_[0][index["bias"]]), 1)
    head = "# Log odds that a candidate is a name, mark by mark. Written by scripts/fit_chinese_names.py.\n"
    (FOLDER / "zh_name_weights.yaml").write_text(head + yaml.safe_dump(weights, allow_unicode=True), encoding="utf-8")


def _terms() -> list[str]:
    """The Chinese terms of the packs, each pack's as one text."""
    packs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "metier/domains").glob("*.yaml")]
    return ["、".join(term for entry in pack["terms"] for term in entry["zh"]) + "。" for pack in packs]


def _candidates(text: str, spans: tuple[tuple[int, int, str], ...]) -> list[tuple[list[str], bool, bool]]:
    """Each candidate's marks, whether it is a planted name, whether it begins as one; parts of others are left out."""
    import rjieba

    text = fold(text)[0]
    names = {(start, end) for start, end, kind in spans if kind == "PERSON"}
    inside = {i for start, end, _ in spans for i in range(start, end)}
    starts = {start for start, _ in names}
    out = []
    for start, size, given, cuts in chinese.candidates(text, rjieba.tag(text)):
        end = start + size + given
        truth = (start, end) in names
        part = start not in starts and any(i in inside for i in range(start, end)) and not truth
        if not part:
            out.append((list(chinese.marks(text, start, size, given, cuts)), truth, start in starts))
    return out


def _given_names(dictionary: Path) -> list[str]:
    """What stands behind the surname in the dictionary's names."""
    found = []
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, _, tag = line.split()
        if tag == "nr" and 2 <= len(word) <= 3 and word[0] in word_set("zh_surnames"):
            found.append(word[1:])
    return found


def _renamed(record: Any, rng: random.Random, planted: Any, rare: str, given: list[str]) -> Any:
    """In three of four records: the names replaced by a surname and a given name drawn at random.

    Two of three given names are of `given`, the others characters of the list, 5 % of them from `rare`.
    """
    if rng.random() < 0.25:
        return record
    text, spans, last = "", [], 0
    for start, end, kind in record.spans:
        value = record.text[start:end]
        if kind == "PERSON" and len(value) > 1 and "·" not in value:
            surnames = words("zh_surnames")[: 200 if rng.random() < 0.8 else None]
            pools = (words("zh_given")[0] if rng.random() < 0.95 else rare for _ in range(rng.choice((1, 2, 2))))
            drawn = rng.choice(given) if rng.random() < 0.67 else "".join(rng.choice(pool) for pool in pools)
            value = rng.choice(surnames) + drawn
        text += record.text[last:start]
        spans.append((len(text), len(text) + len(value), kind))
        text, last = text + value, end
    return planted(text + record.text[last:], tuple(spans), record.negative)


def _write_words(laws: list[str]) -> None:
    import rjieba

    path = FOLDER / "lists" / "zh_words.txt"
    by_hand = path.read_text(encoding="utf-8").split("# by hand\n")[-1]
    strong = characters("zh_given_strong") | characters("zh_given_stronger")
    tagged = {
        word
        for law in laws
        for word, tag in rjieba.tag(law)
        if 2 <= len(word) <= 3 and (tag.startswith("nr") or not strong.intersection(word[1:]))
    }
    found = sorted(
        word for word in tagged if word[0] in word_set("zh_surnames") and re.fullmatch("[\u4e00-\u9fff]+", word)
    )
    path.write_text("# from the laws\n" + " ".join(found) + "\n# by hand\n" + by_hand, encoding="utf-8")


if __name__ == "__main__":
    main()
