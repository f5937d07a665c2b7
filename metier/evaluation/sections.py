"""The report's tables beyond the verdict: slices, what specialising cost, memorisation, gates, energy.

In: the evidence and the adapter's manifest. Out: rows of text for the template.
"""

from __future__ import annotations

import re
from typing import Any

from metier.evaluation.texts import Language, show, show_delta, words

# Watts, assumed where nothing was measured: a server core under load, and a data-centre GPU.
WATTS_PER_CORE = 10
WATTS_PER_GPU = 500
# Labels that stand in the slice table: those that changed.
MOST_LABELS = 12

Row = dict[str, Any]


def slice_rows(evidence: dict[str, Any], language: Language) -> list[Row]:
    """Slices by language, source and length, where there are several, and the labels that changed."""
    table = words(language)
    metric = evidence["verdict"]["primary_metric"]
    rows = []
    for kind in ("language", "source", "length", "label"):
        found = evidence["slices"][kind]
        if kind == "label":
            changed = [e for e in found.items() if e[1]["outcome"] in ("better", "worse")]
            chosen = sorted(changed, key=lambda e: e[1]["delta"])[:MOST_LABELS]
        else:
            chosen = list(found.items()) if len(found) > 1 else []
        for name, entry in chosen:
            shown = table.get(f"{kind}_{name}", name) if kind in ("language", "length") else name
            rows.append({"kind": table[f"slice_{kind}"], "name": shown, "n": entry["n"], "lower": False,
                         **compared(metric, entry, language)})  # fmt: skip
    return rows


def cost_rows(results: dict[str, Any], language: Language) -> list[Row]:
    """Comparisons by name (the evidence's `forgetting` or `behaviour`)."""
    table = words(language)
    return [
        {
            "name": table[name],
            "n": result["n"],
            "lower": not result["higher_is_better"],
            **compared(name, result, language),
        }
        for name, result in results.items()
    ]


def compared(metric: str, result: dict[str, Any], language: Language) -> Row:
    """Base, adapter, difference, interval and outcome as text."""
    low, high = (show_delta(metric, v, language, unit=False) for v in result["ci95"])
    return {
        "base": show(metric, result["base"]),
        "adapter": show(metric, result["adapter"]),
        "delta": show_delta(metric, result["delta"], language),
        "low": low,
        "high": high,
        "outcome": result["outcome"],
    }


def memory_rows(evidence: dict[str, Any], language: Language) -> list[Row]:
    """Membership, canaries and repeats: {name, value, low, high, note}."""
    table, memory = words(language), evidence["memorisation"]
    rows: list[Row] = []
    told = memory["membership"]
    if told:
        for name, entry in (("membership", told), ("membership_control", told["control"])):
            rows.append(_measured(table[name], entry["auc"], entry["ci95"], table["chance_auc"]))
    for repeats, level in memory["canaries"].items():
        name = table["exposure_of"].format(n=repeats)
        rows.append(_measured(name, level["bits"], level["ci95"], table["chance_bits"]))
    found = memory["test_in_train"]
    for kind in ("exact", "normalised", "near"):
        rows.append({"name": table[f"repeats_{kind}"], "value": f"{len(found[kind]):,}", "low": "", "high": "",
                     "note": table["of_records"].format(n=evidence["n"])})  # fmt: skip
    return rows


def gate_rows(evidence: dict[str, Any], language: Language) -> list[Row]:
    """The recipe's limits, and whether each holds."""
    table = words(language)
    return [
        {
            "name": table[f"gate_{gate['name']}"],
            "value": "-" if gate["value"] is None else f"{gate['value']:.3g}",
            "limit": f"{gate['limit']:.3g}",
            "passed": gate["passed"],
        }
        for gate in evidence["gates"]
    ]


def calibration_text(evidence: dict[str, Any], language: Language) -> list[str]:
    """A sentence for each side: its calibration error, and what chance alone would show."""
    table = words(language)
    return [
        table["calibration_line"].format(
            side=table[name], ece=f"{found['ece']:.3f}", null=f"{found['null_ece']:.3f}",
            high=f"{found['null_ece95']:.3f}", brier=f"{found['brier']:.3f}",
        )
        for name, side in (("base_model", "base"), ("specialised", "adapter"))
        if (found := evidence["calibration"].get(side))
    ]  # fmt: skip


def energy(training: dict[str, Any], seconds: float, language: Language) -> str:
    """An estimate in kWh from time and an assumed power, with the assumption."""
    on_gpu = str(training.get("device", "")).startswith("cuda")
    cores = re.search(r"(\d+) cores", training["machine"])
    watts = WATTS_PER_GPU if on_gpu else WATTS_PER_CORE * int(cores[1] if cores else 1)
    return words(language)["energy_value"].format(kwh=f"{watts * seconds / 3.6e6:.2g}", watts=watts)


def _measured(name: str, value: float, ci95: list[float], note: str) -> Row:
    low, high = (f"{v:.2f}" for v in ci95)
    return {"name": name, "value": f"{value:.2f}", "low": low, "high": high, "note": note}
