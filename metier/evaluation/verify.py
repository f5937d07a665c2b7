"""Is a run what it says? Digests, the audit chain, and every number made again, without the model or a GPU.

In: a run's folder. Out: what was checked and what does not hold. The evidence is computed again from the
per-item answers (judge.py), the report and the card are written again and compared byte for byte.

Limits: someone who may write to the folder can make everything anew, consistently. Keep the audit's head, the
digest of its last line, elsewhere: with it, that shows too.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metier import artifacts
from metier.errors import MetierError, RunError
from metier.evaluation.card import render_card
from metier.evaluation.evaluate import read_tables
from metier.evaluation.items import items_table, read_answers, read_items
from metier.evaluation.judge import OTHERS, SCHEMA, Asked, judge
from metier.evaluation.own_probes import COPY, read_own
from metier.evaluation.report import Run, pages, read_run
from metier.recipe import EvaluateConfig

CARRIED_ASIDE = "checkpoints/"
# Another processor adds in another order; what a person altered differs by more.
TOLERANCE = 1e-7
SHOWN = 20


@dataclass
class Verification:
    """`checks` that were made, in words, the `problems` found, and the audit's head (SHA-256)."""

    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    audit_head: str = ""


def verify(run: Path, head: str | None = None) -> Verification:
    """Checks all of `run`; `head` is an audit's head noted earlier. Raises `RunError` without a data set.

    A run that has not come to its evidence is checked as far as it is.
    """
    found = Verification()
    made = [stage for stage in artifacts.STAGES if artifacts.read_manifest(run / stage) is not None]
    if "dataset" not in made:
        raise RunError(f"there is no complete dataset in `{run}`", hint="`metier run` makes a run to verify")
    for stage in made:
        num_files, problems = _check_artifact(run / stage)
        found.checks.append(f"{stage}: {num_files} files and their digest")
        found.problems += [f"{stage}/{problem}" for problem in problems]
    if "full" in (artifacts.read_manifest(run / "evidence") or {}).get("parents", {}):
        num_files, problems = _check_artifact(run / "full")
        found.checks.append(f"full: {num_files} files and their digest")
        found.problems += [f"full/{problem}" for problem in problems]
    found.problems += _check_parents(run, made)
    found.audit_head, problems = _check_audit(run, head)
    found.checks.append("audit.jsonl: the chain, and the digests that it names")
    found.problems += problems
    if "evidence" not in made:
        missing = " and ".join(stage for stage in artifacts.STAGES if stage not in made)
        found.checks.append(f"no more: there is no {missing} yet")
    elif not any(p.startswith(("dataset/", "evidence/", "adapter/")) for p in found.problems):
        found.checks.append("items.parquet: what follows from the records and from other columns")
        found.problems += _check_items(run)
        found.checks.append("evidence.json: every number, from the per-item answers")
        found.problems += _check_evidence(run)
        found.checks.append("report and model card: every byte, from the evidence")
        found.problems += _check_pages(run)
    else:
        found.checks.append("evidence.json, report and card: not made again, for their sources are altered")
    return found


def differences(stored: Any, made: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, as `path: stored, made`."""
    if isinstance(stored, dict) and isinstance(made, dict):
        for key in sorted(stored.keys() | made.keys()):
            where = f"{path}.{key}" if path else key
            if key not in stored or key not in made:
                yield f"{where}: {'missing' if key not in stored else 'not expected'}"
            else:
                yield from differences(stored[key], made[key], where)
    elif isinstance(stored, list) and isinstance(made, list) and len(stored) == len(made):
        for i, (a, b) in enumerate(zip(stored, made, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif not _same(stored, made):
        yield f"{path}: {_brief(stored)} is stored, {_brief(made)} follows from the answers"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12)
    return type(a) is type(b) and bool(a == b)


def _brief(value: Any) -> str:
    # Numbers and short words; a label may be personal data.
    return f"{value}" if isinstance(value, int | float) or value is None else "another text or list"


def _check_artifact(folder: Path) -> tuple[int, list[str]]:
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        return 0, ["manifest.json: missing"]
    problems = []
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name, entry in manifest["files"].items():
        if name not in there:
            problems.append(f"{name}: missing")
        elif artifacts.digest_file(folder / name) != entry["sha256"]:
            problems.append(f"{name}: its bytes are not those that were written")
    if artifacts.REVOKED in there:
        problems.append(f"{artifacts.REVOKED}: it learned from a person who was forgotten; `metier run` trains anew")
    extra = there - manifest["files"].keys() - {artifacts.MANIFEST, artifacts.REVOKED}
    problems += [f"{name}: not in the manifest" for name in sorted(extra) if not name.startswith(CARRIED_ASIDE)]
    carried = {n: f["sha256"] for n, f in manifest["files"].items() if n not in artifacts.LOGS}
    if manifest["digest"] != artifacts.digest_json([manifest["kind"], manifest["parents"], carried]):
        problems.append("manifest.json: its digest does not follow from its files and parents")
    return len(manifest["files"]), problems


def _check_parents(run: Path, made: list[str]) -> list[str]:
    manifests = {stage: artifacts.read_manifest(run / stage) or {} for stage in (*artifacts.STAGES, "full")}
    pairs = [("adapter", "dataset"), ("evidence", "dataset"), ("evidence", "adapter")]
    if "full" in manifests["evidence"].get("parents", {}):
        pairs += [("full", "dataset"), ("evidence", "full")]
    return [
        f"{stage}/manifest.json: made from another {parent} than the one beside it"
        for stage, parent in pairs
        if stage in made and manifests[stage].get("parents", {}).get(parent) != manifests[parent].get("digest")
    ]


def _check_audit(run: Path, head: str | None) -> tuple[str, list[str]]:
    path = run / "audit.jsonl"
    if not path.is_file():
        return "", ["audit.jsonl: missing"]
    problems = artifacts.check_audit(run)
    lines = path.read_bytes().splitlines(keepends=True)
    heads = [artifacts.digest_bytes(line) for line in lines]
    if head is not None and head not in heads:
        problems.append("audit.jsonl: the head that was noted is not in the chain")
    if any(p.startswith("audit.jsonl") for p in problems):
        return heads[-1] if heads else "", problems
    last = {entry["action"]: entry for entry in map(json.loads, lines)}
    return heads[-1] if heads else "", problems + _check_named(run, last)


def _check_named(run: Path, last: dict[str, dict[str, Any]]) -> list[str]:
    """The digests that the newest entry of each kind names."""
    problems = []
    for action, stage in (("prepare", "dataset"), ("train", "adapter"), ("evaluate", "evidence")):
        manifest = artifacts.read_manifest(run / stage) or {}
        if action in last and last[action].get("digest") != manifest.get("digest"):
            problems.append(
                f"audit.jsonl: the last `{action}` made another {stage} than the one that is there, if one is"
            )
    named = {k: v for action in ("report", "recipe") for k, v in last.get(action, {}).get("files", {}).items()}
    for name, digest in named.items():
        if not (run / name).is_file():
            problems.append(f"{name}: missing")
        elif artifacts.digest_file(run / name) != digest:
            problems.append(f"{name}: its bytes are not those that the audit names")
    return problems


def _check_evidence(run: Path) -> list[str]:
    stored = json.loads((run / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    manifests = {stage: artifacts.read_manifest(run / stage) or {} for stage in artifacts.STAGES}
    if stored.get("schema") != SCHEMA:
        return ["evidence/evidence.json: made by another version of metier; `metier evaluate` makes it anew"]
    table, probes = read_tables(run / "evidence")
    copy = run / "evidence" / COPY
    try:
        made = judge(
            dataset=run / "dataset", data=manifests["dataset"], training=manifests["adapter"], table=table,
            probes=probes, own=read_own(copy) if copy.exists() else [],
            full=artifacts.read_manifest(run / "full") if stored.get("full") else None, asked=Asked.of(stored),
            config=EvaluateConfig(**manifests["evidence"]["config"]), seed=manifests["evidence"]["seed"],
        )  # fmt: skip
    except (MetierError, KeyError, ValueError, TypeError) as error:
        return [f"evidence/evidence.json: cannot be made again ({type(error).__name__})"]
    found = [f"evidence/evidence.json: {d}" for d in differences(stored, made)]
    return found[:SHOWN] + ([f"evidence/evidence.json: {len(found) - SHOWN} more"] if len(found) > SHOWN else [])


def _check_items(run: Path) -> list[str]:
    """Columns that do not follow: references and languages from the records, right or wrong and labels from answers."""
    table, _ = read_tables(run / "evidence")
    test = {i.record_id: i for i in read_items(run / "dataset", "test")}
    labels = (artifacts.read_manifest(run / "dataset") or {})["labels"]
    unknown = set(table["record_id"]) - test.keys()
    if unknown:
        return [f"evidence/items.parquet: {len(unknown)} records are not in the test split"]
    sides = {n: read_answers(table, n) for n in ("base", "adapter", *OTHERS) if f"{n}_nll" in table.columns}
    for name, side in sides.items():
        if side.label_scores is not None:
            sides[name] = replace(side, labels=[labels[k] for k in side.label_scores.argmax(axis=1)])
    few_shot = None if table["few_shot_answer"].null_count() else table["few_shot_answer"].to_list()
    made = items_table([test[record_id] for record_id in table["record_id"]], sides, few_shot)
    wrong = [n for n in made.columns if n not in table.columns or made[n].to_list() != table[n].to_list()]
    return [f"evidence/items.parquet: `{name}` does not follow from records and answers" for name in wrong]


def _check_pages(run: Path) -> list[str]:
    found: Run = read_run(run)
    made = {**pages(found), "MODEL_CARD.md": render_card(found)}
    version = importlib.metadata.version("metier")
    other = (
        ""
        if found.judged["metier_version"] == version
        else f" (made by metier {found.judged['metier_version']}; this is {version})"
    )
    problems = []
    for name, text in made.items():
        if not (run / name).is_file():
            problems.append(f"{name}: missing")
        elif (run / name).read_bytes() != text.encode():
            problems.append(f"{name}: differs from what the evidence gives{_first_line(run / name, text)}{other}")
    return problems


def _first_line(path: Path, text: str) -> str:
    stored = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, (a, b) in enumerate(zip(stored, text.splitlines(), strict=False), 1):
        if a != b:
            return f", first on line {number}"
    return ", at its end"
