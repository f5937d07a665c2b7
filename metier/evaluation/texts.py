"""The words of the verdict, the limits, the report and the card, in English and Chinese.

The words are in templates/texts.yaml. Numbers are formatted here, in one way.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import yaml

from metier.evaluation.compare import FEW_GROUPS, MIN_GROUPS, MIN_ITEMS

Language = Literal["en", "zh"]

SHARES = (
    "accuracy", "macro_f1", "accuracy_generated", "exact_match", "invalid_share", "token_f1", "field_f1",
    "invalid_json_share", "stopped_share", "empty_share", "refusal_share", "red_line_share",
    "general_choice", "instructions", "right_refusals", "tempted", "own_choice", "own_instruction", "own_refusal",
    "own_red_line",
)  # fmt: skip
FEW_PER_LABEL = 10


@functools.cache
def words(language: Language) -> dict[str, str]:
    """All texts in one language, by name."""
    table = yaml.safe_load((Path(__file__).parent / "templates" / "texts.yaml").read_text(encoding="utf-8"))
    return {name: text[language] for name, text in table.items()}


def show(metric: str, value: float) -> str:
    """A metric's value: `64.1 %` for shares, else three or so digits."""
    return f"{100 * value:.1f} %" if metric in SHARES else _plain(value)


def show_delta(metric: str, value: float, language: Language, *, unit: bool = True) -> str:
    """A signed difference: `+12.3 points` for shares."""
    if metric not in SHARES:
        return _plain(value, sign=True)
    number = f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{number} {words(language)['points']}" if unit else number


def show_p(value: float) -> str:
    """A p-value: `p = 0.012`, `p < 0.0001`."""
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"


def method(evidence: dict[str, Any], resamples: int, language: Language) -> str:
    """How the verdict's difference was judged, for a statistician: groups, bootstrap, test, p and power."""
    table = words(language)
    metric = evidence["verdict"]["primary_metric"]
    result = evidence["metrics"][metric]
    is_exact = "mcnemar" in result and result["num_groups"] == result["n"]
    test = table["test_mcnemar"].format(**result["mcnemar"]) if is_exact else table["test_permutation"]
    return table["method_line"].format(
        metric=table[metric], n=f"{result['n']:,}", groups=f"{result['num_groups']:,}", resamples=f"{resamples:,}",
        test=test, p=show_p(result["p"]), mde=show_delta(metric, result["mde"], language).lstrip("+"),
    )  # fmt: skip


def statement(evidence: dict[str, Any], language: Language) -> str:
    """The verdict in one sentence, with its numbers."""
    table = words(language)
    metric = evidence["verdict"]["primary_metric"]
    result = evidence["metrics"][metric]
    n = evidence["n"]
    values = {side: show(metric, result[side]) for side in ("base", "adapter")}
    low, high = (show_delta(metric, v, language, unit=False) for v in result["ci95"])
    sentence = table[evidence["verdict"]["outcome"]].format(
        measure=table[f"measure_{metric}"].format(n=n, **values),
        delta=show_delta(metric, result["delta"], language),
        low=low,
        high=high,
        reason=_reason(evidence, result, language),
    )
    sweep = evidence.get("sweep")
    return sentence + (table["best_of"].format(n=sweep["num_trials"]) if sweep else "")


def _reason(evidence: dict[str, Any], result: dict[str, Any], language: Language) -> str:
    """Why the data are not enough, and how many records would be."""
    n, num_groups, needed = evidence["n"], evidence["num_groups"], result["n_needed"] or MIN_ITEMS
    metric = evidence["verdict"]["primary_metric"]
    if n < MIN_ITEMS:
        name, values = "few_items", {"n": n, "needed": MIN_ITEMS}
    elif num_groups < min(n, MIN_GROUPS):
        name, values = "few_clusters", {"n": num_groups, "needed": MIN_GROUPS}
    else:
        effect = evidence["smallest_effect"] * (1 if metric in SHARES else 100)
        shown = {"effect": effect, "mde": result["mde"]}
        sizes = {k: show_delta(metric, v, language).lstrip("+") for k, v in shown.items()}
        name, values = "few_to_tell", {"n": n, "needed": f"{needed:,}", **sizes}
    return words(language)[name].format(**values)


def limits(evidence: dict[str, Any], language: Language) -> list[str]:
    """What the evidence does not show, as sentences; the most specific first."""
    table = words(language)
    n, groups, decoding = evidence["n"], evidence["num_groups"], evidence["decoding"]
    labels = evidence["slices"]["label"]
    unseen = evidence["labels_not_in_train"]
    few = sum(entry["n"] < FEW_PER_LABEL for entry in labels.values())
    cuts = {side: decoding[f"{side}_cut"] for side in ("base", "adapter")}
    left_out = len(evidence["left_out"])
    empty = {s: evidence["behaviour"]["empty_share"][s] for s in ("base", "adapter")} if evidence["behaviour"] else {}
    leaked, total = evidence["num_test_prompts_near_train"], evidence["num_test_records"]
    other, exact = evidence["languages"]["other"], evidence["num_test_prompts_in_train"]
    memory, seen = evidence["memorisation"], evidence["contenders_seen"]
    chosen = table["join"].join(unseen)
    found: list[tuple[bool, str, dict[str, Any]]] = [
        (leaked > 0, "limit_leak", {"n": leaked, "exact": exact}),
        (bool(unseen), "limit_unseen", {"n": len(unseen), "labels": chosen}),
        (len(labels) == 1, "limit_one_class", {}),
        (groups < min(n, FEW_GROUPS), "limit_groups", {"n": groups, "needed": FEW_GROUPS}),
        (bool(left_out), "limit_left_out", {"n": left_out}),
        (n + left_out < total, "limit_choice", {"n": n, "total": total}),
        (few > 0, "limit_few_per_label", {"n": few, "total": len(labels), "needed": FEW_PER_LABEL}),
        (any(cuts.values()), "limit_cut", {"tokens": decoding["max_new_tokens"], **cuts}),
        (any(empty.values()), "limit_empty", {s: show("empty_share", v) for s, v in empty.items()} | {"n": n}),
        ("chrf" in evidence["metrics"], "limit_overlap", {}),
        (other > 0 and bool({"bleu", "token_f1"} & evidence["metrics"].keys()), "limit_language", {"n": other}),
        (bool(memory["canaries"]), "limit_canaries", {}),
        (bool(evidence.get("sweep")), "limit_sweep", {}),
        (True, "limit_one_run", {}),
        (True, "limit_source", {}),
        (True, "limit_metrics", {}),
        (bool(evidence["forgetting"]), "limit_forgetting", {"n": sum(r["n"] for r in evidence["forgetting"].values())}),
        (not evidence["forgetting"], "limit_scope", {}),
        (memory["membership"] is None, "limit_no_membership", {}),
        (memory["membership"] is not None, "limit_membership", {}),
        (memory["extraction"] is not None, "limit_extraction", {}),
        (memory["extraction"] is None and evidence["identifiers_removed"] > 0, "limit_no_extraction", {}),
        ((seen.get("earlier") or 0) > 0, "limit_earlier_seen", {"n": seen.get("earlier")}),
        ("earlier" in seen and seen["earlier"] is None, "limit_earlier_unknown", {}),
    ]  # fmt: skip
    return [table[name].format(**values) for holds, name, values in found if holds]


def _plain(value: float, *, sign: bool = False) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")
