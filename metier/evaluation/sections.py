"""The report's tables beyond the verdict: slices, what specialising cost, memorisation, gates, energy.

In: the evidence and the adapter's manifest. Out: rows of text for the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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


def slice_deltas(evidence: dict[str, Any], language: Language) -> list[tuple[str, float, float, float, str]]:
    """(label, delta, low, high, outcome) of the parts and of the labels with the most records; above zero is better."""
    table, metric = words(language), evidence["verdict"]["primary_metric"]
    sign = 1 if evidence["metrics"][metric]["higher_is_better"] else -1
    rows = []
    for kind in ("language", "source", "length", "label"):
        found = sorted(evidence["slices"][kind].items(), key=lambda e: -e[1]["n"] if kind == "label" else 0)
        for name, entry in found[:MOST_LABELS] if len(found) > 1 else []:
            shown = table.get(f"{kind}_{name}", name) if kind in ("language", "length") else name
            low, high = sorted(sign * v for v in entry["ci95"])
            rows.append((f"{table[f'slice_{kind}']} {shown[:40]}: {with_interval(metric, entry, language)}",
                         sign * entry["delta"], low, high, entry["outcome"]))  # fmt: skip
    return rows


def with_interval(metric: str, result: dict[str, Any], language: Language) -> str:
    """`+4.0 points (+1.2 … +6.8)`."""
    low, high = (show_delta(metric, v, language, unit=False) for v in result["ci95"])
    return f"{show_delta(metric, result['delta'], language)} ({low} … {high})"


def worse_at(evidence: dict[str, Any], language: Language) -> list[str]:
    """What the specialised model does worse than its base apart from the verdict's metric."""
    table = words(language)
    found = {**evidence["metrics"], **evidence["forgetting"], **evidence["behaviour"]}
    primary = evidence["verdict"]["primary_metric"]
    return [table[name] for name, result in found.items() if result["outcome"] == "worse" and name != primary]


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
    if drawn := memory["extraction"]:
        note = table["of_beginnings"].format(n=f"{drawn['n_records']:,}", m=f"{drawn['n_beginnings']:,}")
        for name, count in (("extraction", drawn["adapter_only"]), ("extraction_base", drawn["base"])):
            rows.append({"name": table[name], "value": f"{count:,}", "low": "", "high": "", "note": note})
        searched = table["of_records"].format(n=f"{drawn['n_searched']:,}")
        rows.append({"name": table["holding"], "value": f"{drawn['n_holding']:,}", "low": "", "high": "",
                     "note": searched})  # fmt: skip
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


def beside_full(evidence: dict[str, Any], language: Language) -> Row | None:
    """LoRA beside full fine-tuning: `line` in words, `note`, `rows` of metrics, `cost_note` and rows of `cost`."""
    found, table = evidence["full"], words(language)
    if found is None:
        return None
    metric = evidence["verdict"]["primary_metric"]
    rows = [
        {"name": table[name], "lower": not r["higher_is_better"], **compared(name, {**r, "base": r["full"]}, language)}
        for name, r in found["metrics"].items()
    ]
    first = next(row for row in rows if row["name"] == table[metric])
    sides = [found["training"][side] for side in ("full", "adapter")]
    share = f"{100 * sides[1]['trainable_parameters'] / sides[0]['trainable_parameters']:.2g} %"
    needed, is_open = found["metrics"][metric]["n_needed"], first["outcome"] == "not enough data"
    line = table["beside_full_line"].format(
        needed=table["needed_to_tell"].format(n=f"{needed:,}") if is_open and needed else "",
        metric=table[metric], full=first["base"], share=share, outcome=table[f"tag_{first['outcome']}"].lower(),
        **{key: first[key] for key in ("adapter", "delta", "low", "high")},
    )  # fmt: skip
    cost = [(table[name], *("-" if side.get(key) is None else told(side[key]) for side in sides))
            for name, key, told in _trainings(language)]  # fmt: skip
    tried = len(found["trials"])
    cost_note = table["full_cost_note"].format(n=tried) if tried else table["full_cost_note_untried"]
    note = table["beside_full_note"].format(n=evidence["n"])
    return {"line": line, "note": note, "rows": rows, "cost_note": cost_note, "cost": cost}


def _trainings(language: Language) -> list[tuple[str, str, Callable[[Any], str]]]:
    """Name, key and spelling of what two trainings are compared by."""
    return [
        ("trained_share", "trainable_parameters", "{:,}".format),
        ("time", "train_seconds", lambda seconds: duration(seconds, language)),
        ("peak_memory_bytes", "peak_memory_bytes", gibibytes),
        ("peak_learning_rate", "peak_learning_rate", "{:.3g}".format),
        ("validation_loss", "val_loss", "{:.4g}".format),
        ("train_precision", "precision", lambda name: _precision(name, language)),
    ]


def _precision(name: str, language: Language) -> str:
    """`float32, products in bfloat16` in the reader's language; one name stays as it is."""
    weights, separator, products = name.partition(", products in ")
    return words(language)["precision_of_products"].format(weights=weights, products=products) if separator else name


def duration(seconds: float, language: Language) -> str:
    """Seconds up to two minutes, else minutes."""
    key, shown = ("minutes", f"{seconds / 60:,.1f}") if seconds >= 120 else ("seconds", f"{seconds:,.0f}")
    return words(language)[key].format(value=shown)


def gibibytes(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:,.2f} GiB"


def export_rows(exports: list[dict[str, Any]], adapter_digest: str) -> list[Row]:
    """The forms of PARITY.json files that were made from this very adapter."""
    return [
        {
            "name": f"{name} ({entry['storage']})" if entry["storage"] not in name else name,
            "deviation": "-" if entry["kl_ratio"] is None else f"{100 * entry['kl_ratio']:.2g} %",
            "gain_kept": "-" if entry["gain_kept"] is None else f"{100 * entry['gain_kept']:.1f} %",
            "same": f"{entry['greedy_equal']} / {len(entry['greedy'])}",
            "passed": entry["passed"],
        }
        for record in exports
        if record.get("adapter_digest") == adapter_digest
        for name, entry in sorted(record["forms"].items())
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
