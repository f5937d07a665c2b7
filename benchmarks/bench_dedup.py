"""Near-duplicates among 100,000 records: found, wrongly found, CPU seconds and memory; datasketch beside it.

    python benchmarks/bench_dedup.py --records 100000 [--datasketch FOLDER]

A twentieth of the records are near-duplicates of others: 0, 2, 5, 10 or 15 % of the words replaced, removed or added,
case and punctuation changed in half of them. English: 60 words drawn from the bundled ICD-10-CM terms. Chinese: 106
characters, drawn in pairs from the bundled articles of law. `templated`: a fifth of the records begin with one of 50
boilerplates of half the length. Each case runs in a process of its own; FOLDER is where datasketch is installed
(pip install --target FOLDER datasketch).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EDITS = (0.0, 0.02, 0.05, 0.10, 0.15)
CASES = ("en clean", "en templated", "zh clean", "zh templated")
TARGETS = {
    "en clean": "5 CPU-s, 500 MB, recall 0.995, precision 0.999",
    "en templated": "recall 0.98, precision 0.95",
    "zh clean": "3 CPU-s",
    "zh templated": "recall 0.98, precision 0.95",
}


def words_of(language: str) -> list[str]:
    """The stock of words, or of pairs of characters."""
    name, column = ("icd10cm_chapters.csv", "term") if language == "en" else ("china_law_departments.csv", "text")
    with (ROOT / "metier" / "bundled" / name).open(encoding="utf-8") as file:
        texts = [row[column] for row in csv.DictReader(file)]
    if language == "en":
        return sorted({word for text in texts for word in text.lower().split() if word.isalpha()})
    return sorted({text[i : i + 2] for text in texts for i in range(len(text) - 1) if text[i : i + 2].isalpha()})


def corpus(case: str, number: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """(texts, origin): records with the same origin are near-duplicates of each other."""
    rng = random.Random(seed)
    language, kind = case.split()
    stock = words_of(language)
    length, gap = (60, " ") if language == "en" else (53, "")
    boilerplates = [rng.choices(stock, k=length // 2) for _ in range(50)]
    records: list[list[str]] = []
    for _ in range(number - number // 20):
        words = rng.choices(stock, k=length)
        if kind == "templated" and rng.random() < 0.2:
            words[: length // 2] = rng.choice(boilerplates)
        records.append(words)
    origin = list(range(len(records)))
    texts = [gap.join(words) for words in records]
    for copy in range(number // 20):
        of = rng.randrange(len(records))
        words = [word for word in records[of] for word in edited(word, EDITS[copy % 5], stock, rng)]
        text = gap.join(words)
        if copy % 2:
            text = text.title().replace(" ", ", ", 3) + "." if language == "en" else f"{text[:20]}，{text[20:]}。"
        texts.append(text)
        origin.append(of)
    order = rng.sample(range(len(texts)), len(texts))
    return [texts[i] for i in order], [origin[i] for i in order]


def edited(word: str, share: float, stock: list[str], rng: random.Random) -> list[str]:
    """The word, or what an edit makes of it."""
    if rng.random() >= share:
        return [word]
    return rng.choice([[], [rng.choice(stock)], [word, rng.choice(stock)]])


def find_ours(texts: list[str]) -> list[tuple[int, int]]:
    from metier.data.minhash import near_duplicates
    from metier.recipe import DedupConfig

    pairs = near_duplicates(texts, threshold=DedupConfig().threshold)
    return list(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))


def find_datasketch(texts: list[str]) -> list[tuple[int, int]]:
    """As its documentation has it: 128 permutations, 32 bands of 4, candidates kept by their estimated similarity."""
    import unicodedata

    from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]

    k = 2 if ord(texts[0][0]) > 0x2FFF else 5
    lsh, hashes, found = MinHashLSH(num_perm=128, params=(32, 4)), [], []
    for position, text in enumerate(texts):
        folded = unicodedata.normalize("NFKC", text).casefold()
        text = "".join(c if c.isalnum() else " " for c in folded)
        text = "".join(text.split()) if k == 2 else " ".join(text.split())
        one = MinHash(num_perm=128)
        one.update_batch([text[i : i + k].encode() for i in range(len(text) - k + 1)])
        found += [(int(other), position) for other in lsh.query(one) if hashes[int(other)].jaccard(one) >= 0.5]
        lsh.insert(str(position), one)
        hashes.append(one)
    return found


def score(found: list[tuple[int, int]], origin: list[int]) -> tuple[float, float]:
    """(recall of the planted copies, precision of the pairs): a copy counts when it is linked to its like."""
    right = [(a, b) for a, b in found if origin[a] == origin[b]]
    linked = {position for pair in right for position in pair}
    like: dict[int, int] = {}
    for one in origin:
        like[one] = like.get(one, 0) + 1
    planted = [position for position, one in enumerate(origin) if like[one] > 1]
    return sum(p in linked for p in planted) / len(planted), len(right) / max(1, len(found))


def one_case(case: str, tool: str, number: int) -> None:
    """Prints one row; runs in a process of its own."""
    texts, origin = corpus(case, number)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    find = find_ours if tool == "metier" else find_datasketch
    wall, cpu = time.perf_counter(), time.process_time()
    found = find(texts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    recall, precision = score(found, origin)
    target = TARGETS[case] if tool == "metier" else ""
    print(
        f"| {case} | {tool} | {cpu:.1f} | {wall:.1f} | {recall:.4f} | {precision:.4f} | {peak:.0f} ({before:.0f}) "
        f"| {len(found):,} | {target} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--datasketch", type=Path, help="the folder it is installed in")
    parser.add_argument("--only", nargs=2, metavar=("CASE", "TOOL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        return one_case(*arguments.only, arguments.records)
    tools = ["metier", "datasketch"] if arguments.datasketch else ["metier"]
    rows = []
    for tool in tools:
        path = os.pathsep.join([str(ROOT), *([str(arguments.datasketch)] if tool == "datasketch" else [])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        for case in CASES:
            command = [sys.executable, __file__, "--records", str(arguments.records), "--only", case, tool]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            rows.append(done.stdout.strip())
            print(rows[-1], flush=True)
    now = datetime.date.today()
    head = f"""# Near-duplicates among {arguments.records:,} records, 5 % of them planted

{now}. `python benchmarks/bench_dedup.py --records {arguments.records}`; {platform.system()} {platform.machine()}, \
{os.cpu_count()} cores, one thread, Python {platform.python_version()}.

{__doc__.split(chr(10) * 2, 2)[2].strip()}

Recall: planted copies linked to their like. Precision: pairs that are copies of one record. CPU seconds are from texts
to verified pairs. Peak memory is the process's, in MB, with what the texts alone took before in brackets.

| case | tool | CPU s | wall s | recall | precision | peak MB (before) | pairs | target |
|---|---|---:|---:|---:|---:|---:|---:|---|
"""
    out = RESULTS / f"dedup_cpu{os.cpu_count()}_{now:%Y%m}.md"
    out.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
