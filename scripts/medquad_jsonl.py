"""MedQuAD's XML files (Ben Abacha and Demner-Fushman, 2019, CC BY 4.0) -> the JSON Lines that the recipe reads.

    git clone https://github.com/abachaa/MedQuAD
    python scripts/medquad_jsonl.py MedQuAD data/medquad.jsonl

One line for each question with an answer of at most 400 words: source, document, url, focus (the disease), qtype,
question, answer. Three of the twelve folders hold questions alone, since their publisher keeps the answers' rights.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from metier.artifacts import write_atomic

MAX_WORDS = 400


def read_document(path: Path) -> Iterator[dict[str, str]]:
    """The answered questions of one XML file."""
    document = ElementTree.parse(path).getroot()
    about = {
        "source": document.get("source", ""),
        "document": document.get("id", ""),
        "url": document.get("url", ""),
        "focus": (document.findtext("Focus") or "").strip(),
    }
    for pair in document.iter("QAPair"):
        question, answer = pair.find("Question"), (pair.findtext("Answer") or "").strip()
        if question is not None and answer and len(answer.split()) <= MAX_WORDS:
            text = (question.text or "").strip()
            yield about | {"qtype": question.get("qtype", ""), "question": text, "answer": answer}


def main() -> None:
    """Reads the folder of the repository and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the clone of MedQuAD")
    parser.add_argument("out", type=Path, help="the JSON Lines file to write")
    arguments = parser.parse_args()
    records = [record for path in sorted(arguments.folder.glob("*/*.xml")) for record in read_document(path)]
    if not records:
        parser.error(f"`{arguments.folder}` holds no XML file of MedQuAD with an answer")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, lines.encode())
    print(f"{len(records):,} questions with answers -> {arguments.out}")


if __name__ == "__main__":
    main()
