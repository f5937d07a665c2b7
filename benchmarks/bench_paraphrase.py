"""How many of a base's own paraphrases are faithful: asked, kept, refused by reason, on real prompts in both languages.

python benchmarks/bench_paraphrase.py BANKING77_TRAIN_CSV --records 48
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from metier.data.paraphrase import REASONS, can_be_asked, paraphrase
from metier.data.records import Record, build_record
from metier.data.roles import find_roles
from metier.data.sources import find_sources, read_columns, read_rows
from metier.domains import load_domain
from metier.model.specialist import load
from metier.recipe import DataConfig

LAW = Path(__file__).parents[1] / "metier" / "bundled" / "china_law_departments.csv"


def records_of(path: Path, prompt: str, answer: str, number: int) -> list[Record]:
    """`number` records at even distances in the file that may be asked for."""
    config = DataConfig(sources=[str(path)], prompt=prompt, answer=answer)
    (source,) = find_sources(config)
    roles = find_roles(config, read_columns(source), source.path)
    records = [r for r in (build_record(source, row, roles) for row in read_rows(source)) if can_be_asked(r)]
    return records[:: max(1, len(records) // number)][:number]


def main() -> None:
    """Prints one row of a Markdown table for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banking77", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--records", type=int, default=48)
    arguments = parser.parse_args()
    sets = {
        "banking77, English": (records_of(arguments.banking77, "{text}", "category", arguments.records), "finance"),
        "law articles, Chinese": (records_of(LAW, "{text}", "department", arguments.records // 2), "law"),
    }
    model = load(arguments.base)
    print(f"| set | asked | kept | {' | '.join(REASONS)} | seconds |")
    print("|---|---:|---:|" + "---:|" * len(REASONS) + "---:|")
    for name, (records, domain) in sets.items():
        started = time.perf_counter()
        found = paraphrase(records, model, load_domain(domain), seed=0, progress=lambda text: None)
        refused = " | ".join(str(found.refused[reason]) for reason in REASONS)
        seconds = time.perf_counter() - started
        print(f"| {name} | {found.asked} | {len(found.messages)} | {refused} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
