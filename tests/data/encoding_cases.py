"""Seeded byte strings with a known text: rows of the bundled Chinese law, and of English, French, German, Spanish."""

from __future__ import annotations

import codecs
import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "metier" / "bundled" / "china_law_departments.csv"
KINDS = (
    ("zh", "utf-8"), ("zh", "utf-8-sig"), ("zh", "gb18030"), ("zh", "gbk"), ("zh", "utf-16"), ("zh", "utf-16-le"),
    ("zh", "utf-16-be"), ("hant", "utf-8"), ("hant", "big5"), ("hant", "gb18030"), ("hant", "utf-16-le"),
    ("fr", "cp1252"), ("de", "cp1252"), ("es", "cp1252"), ("en", "cp1252"), ("fr", "utf-8"), ("en", "utf-16-le"),
)  # fmt: skip
LINES = (1, 2, 3, 5, 10, 50, 200)
WESTERN = {
    "fr": """La société a déclaré un bénéfice net en hausse de cinq pour cent
Le patient présente une fièvre élevée depuis trois jours
L’élève a réussi son examen de français avec succès
Où se trouve le numéro de compte du créancier ?
Le médecin a prescrit un traitement à l'hôpital
Les intérêts sont calculés à la fin du mois
Ça dépend de la façon dont le contrat a été rédigé
Il a été transféré vers un autre établissement""",
    "de": """Die Überweisung wurde am nächsten Tag ausgeführt
Der Patient klagt über Kopfschmerzen und Übelkeit
Die Schüler müssen die Prüfung wiederholen
Das Konto weist eine größere Abweichung auf
Bitte prüfen Sie die Höhe der Gebühren
Die Straße zum Krankenhaus ist gesperrt
Für die Rückzahlung gelten andere Bedingungen
Der Ausschuss hat die Maßnahme genehmigt""",
    "es": """El paciente presentó una reacción alérgica leve
La inversión creció más de lo esperado este año
¿Cuál es el número de la cuenta del señor?
El niño no asistió a la clase de matemáticas
La compañía anunció la reducción del crédito
Según el médico, la evolución es favorable
También habrá una revisión técnica mañana
La dirección está en la página número diez""",
    "en": """The bank’s “net interest margin” fell — again
The patient’s temperature was 38.5 °C on admission
A fee of £25 applies; see the customer’s statement
The café invoice was €1,200 – paid in full
Results: mean ± sd was 4.2 ± 0.3 µg/ml
He said “no change” and left the ward…
The naïve estimate was “too low” by 5 %
Section 4 – the school’s own résumé form""",
}


@dataclass(frozen=True)
class Case:
    language: str
    encoding: str
    lines: int
    text: str
    raw: bytes


def cases(count: int, seed: int) -> Iterator[Case]:
    """`count` files, every kind and length in turn. Each has a header, two columns and what its language writes."""
    rng = random.Random(seed)
    with BUNDLED.open(encoding="utf-8", newline="") as file:
        law = [(row[0].replace("\n", ""), row[1]) for row in list(csv.reader(file))[1:]]
    turns = [(kind, lines) for lines in LINES for kind in KINDS]
    for position in range(count):
        (language, encoding), lines = turns[position % len(turns)]
        text = "\n".join(_rows(language, lines, law, rng)) + "\n"
        if language == "hant":
            text = traditional(text)
        if encoding == "big5":
            text = text.encode("cp950", "ignore").decode("cp950")
        codec = {"big5": "cp950"}.get(encoding, encoding)
        raw = text.encode(codec, "ignore")
        yield Case(language, encoding, lines, text.encode(codec, "ignore").decode(codec), raw)


def _rows(language: str, lines: int, law: list[tuple[str, str]], rng: random.Random) -> Iterator[str]:
    if language in ("zh", "hant"):
        yield rng.choice(["文本,标签", "问题,答案", "text,label", "条文,部门"])
        for text, label in rng.choices(law, k=lines):
            start = rng.randrange(max(1, len(text) - 12))
            yield f"{text[start : start + rng.choice([6, 10, 20, 80])].replace(',', ' ')},{label}"
        return
    yield "text,label"
    sentences = WESTERN[language].split("\n")
    for number in range(lines):
        yield f'"{rng.choice(sentences)}",{number % 3}'


def traditional(text: str) -> str:
    """Traditional script; a small table is enough for bytes that look like it."""
    from metier.data.encodings import _SIMPLIFIED, _TRADITIONAL

    return text.translate(str.maketrans(_SIMPLIFIED, _TRADITIONAL))


def has_mark(raw: bytes) -> bool:
    return raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
