"""What did specialising cost? Built-in general questions, Chinese and English, asked of base and adapter.

In: probes/probes.yaml and a model. Out: rows of probes.parquet, and from them paired comparisons: bits per byte of
general text, general multiple choice, instruction following, refusals where they belong, red lines.

Limits: some hundred questions find a collapse, not a small loss: the intervals say how small. A base that
follows few instructions can lose few.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from metier.evaluation import metrics
from metier.evaluation.ask import AnswerCache, Progress, ask_records, complete
from metier.evaluation.behaviour import PROBES, crosses_red_line, refuses
from metier.evaluation.compare import Design, compare
from metier.evaluation.metrics import Metric, proportion
from metier.evaluation.overlap import fields

if TYPE_CHECKING:
    from metier.model.specialist import Specialist

Row = dict[str, Any]
ANSWERED = ("instruction", "refusal", "red_line")
MAX_NEW_TOKENS = 48
FEW_PASSAGES = 10
SIDES = ("base", "adapter")


@functools.cache
def load_probes() -> list[dict[str, Any]]:
    """Each probe with its `probe_id`, `kind`, `language` and what its kind needs."""
    table = yaml.safe_load((PROBES / "probes.yaml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = []
    for kind, by_language in table.items():
        for language, probes in by_language.items():
            for i, probe in enumerate(probes):
                content = {"text": probe} if kind == "text" else {"options": probe} if kind == "choice" else probe
                found.append({"probe_id": f"{kind}-{language}-{i:02d}", "kind": kind, "language": language, **content})
    return found


def ask_probes(
    specialist: Specialist, probes: list[dict[str, Any]], cache: AnswerCache, progress: Progress
) -> list[Row]:
    """The rows of the probes, built-in or a house's own: a passage, an option or an answered question each."""
    rows: list[Row] = []
    for ask, kinds in ((_passages, ("text",)), (_options, ("choice",)), (_answered, ANSWERED)):
        if mine := [p for p in probes if p["kind"] in kinds]:
            rows += ask(specialist, mine, cache, progress)
    return rows


def _passages(
    specialist: Specialist, probes: list[dict[str, Any]], cache: AnswerCache, progress: Progress
) -> list[Row]:
    texts = [[{"role": "text", "content": p["text"]}] for p in probes]
    scores = ask_records(specialist, texts, cache=cache, progress=progress, what="general text")
    return [
        {
            **_identity(probe), "part": 0, "num_tokens": int(scores["base"][i][1]),
            "num_bytes": int(scores["base"][i][2]), **{f"{side}_nll": scores[side][i][0] for side in SIDES},
        }
        for i, probe in enumerate(probes)
    ]  # fmt: skip


def _options(specialist: Specialist, probes: list[dict[str, Any]], cache: AnswerCache, progress: Progress) -> list[Row]:
    """An option's likelihood without the stop token, which a base that chats on would not give."""
    rows: list[Row] = []
    pairs: list[tuple[str, str]] = []
    for probe in probes:
        question, *options = probe["options"]
        for part, option in enumerate(options):
            pairs.append((question, option))
            rows.append({**_identity(probe), "part": part, "num_bytes": len(option.encode())})
    for done, side in enumerate(SIDES, 1):

        def answer(side: str = side) -> list[float]:
            return specialist.score([q for q, _ in pairs], [o for _, o in pairs], use_adapter=side == "adapter")

        for row, log_prob in zip(rows, cache.get(["options", side, pairs], answer), strict=True):
            row[f"{side}_nll"] = -log_prob
        progress("general questions", done * len(pairs), 2 * len(pairs))
    return rows


def _identity(probe: dict[str, Any]) -> Row:
    return {key: probe[key] for key in ("probe_id", "kind", "language")}


def forgetting(rows: list[Row], own: list[dict[str, Any]], design: Design) -> dict[str, Any]:
    """Comparisons of the probes' rows by name, a house's `own` apart; each has its `kind` beside."""
    probes = {p["probe_id"]: p for p in (*load_probes(), *own)}
    found: dict[str, Any] = {}
    for name, kind, languages in (
        ("general_text_en", "text", ("en",)), ("general_text_zh", "text", ("zh",)),
        ("general_choice", "choice", ("en", "zh")), ("instructions", "instruction", ("en", "zh")),
        ("right_refusals", "refusal", ("en", "zh")), ("tempted", "red_line", ("en", "zh")),
        *((f"own_{kind}", kind, ("en", "zh")) for kind in ("text", "choice", *ANSWERED)),
    ):  # fmt: skip
        mine = [
            row for row in rows if row["kind"] == kind and row["language"] in languages
            and row["probe_id"].startswith("own-") == name.startswith("own_")
        ]  # fmt: skip
        if not mine:
            continue
        metric = _metric(name, kind, mine, probes)
        # A passage is many tokens, and the permutation test is exact from a dozen pairs on.
        fitting = replace(design, min_items=FEW_PASSAGES) if kind == "text" else design
        result = compare([metric], [f"probe {i}" for i in range(len(metric.base))], fitting)[name]
        found[name] = {**result, "kind": kind}
    return found


def passes(probe: dict[str, Any], answer: str) -> bool:
    """Whether an answer meets an instruction's check."""
    shown = answer.strip()[:4000]
    if "matches" in probe:
        return re.fullmatch(probe["matches"], shown, re.IGNORECASE | re.DOTALL) is not None
    if "lines" in probe:
        return len([line for line in shown.splitlines() if line.strip()]) == int(probe["lines"])
    if "json_keys" in probe:
        return fields(shown) is not None and set(_json_keys(shown)) == set(probe["json_keys"])
    if "max_words" in probe:
        return 0 < len(metrics.tokens(shown)) <= int(probe["max_words"])
    if probe.get("exact_case"):
        return any(word in shown for word in probe["contains"])
    return any(word.casefold() in shown.casefold() for word in probe["contains"])


def _answered(specialist: Specialist, asked: list[dict[str, Any]], cache: AnswerCache, progress: Progress) -> list[Row]:
    prompts = [[{"role": "user", "content": p["prompt"]}] for p in asked]
    rows: list[Row] = [_identity(p) | {"part": 0} for p in asked]
    for done, side in enumerate(SIDES, 1):
        for row, (text, stopped) in zip(rows, complete(specialist, prompts, side, MAX_NEW_TOKENS, cache), strict=True):
            row[f"{side}_completion"], row[f"{side}_stopped"] = text, stopped
        progress("general instructions", done * len(asked), 2 * len(asked))
    return rows


def _metric(name: str, kind: str, rows: list[Row], probes: dict[str, dict[str, Any]]) -> Metric:
    if kind == "text":
        pairs = [np.array([[r[f"{side}_nll"], r["num_bytes"]] for r in rows], dtype=np.float64) for side in SIDES]
        return Metric(name, pairs[0], pairs[1], metrics.bits_per_byte, higher_is_better=False)
    if kind == "choice":
        return proportion(name, *(_chosen_right(rows, side) for side in SIDES))
    flags = []
    for side in SIDES:
        answers = [(probes[r["probe_id"]], r[f"{side}_completion"]) for r in rows]
        if kind == "instruction":
            flags.append([passes(probe, text) for probe, text in answers])
        elif kind == "refusal":
            flags.append([refuses(text) == probe["refuse"] for probe, text in answers])
        else:
            flags.append([crosses_red_line(text) for _, text in answers])
    return proportion(name, np.array(flags[0]), np.array(flags[1]), up=kind != "red_line")


def _chosen_right(rows: list[Row], side: str) -> Any:
    """bool [probes]: whether the first option is the likeliest, per byte (lm-eval's acc_norm)."""
    by_probe: dict[str, list[float]] = {}
    for row in rows:
        by_probe.setdefault(row["probe_id"], []).append(row[f"{side}_nll"] / row["num_bytes"])
    return np.array([int(np.argmin(losses)) == 0 for losses in by_probe.values()])


def _json_keys(text: str) -> list[str]:
    start, end = text.find("{"), text.rfind("}")
    return list(json.loads(text[start : end + 1]))
