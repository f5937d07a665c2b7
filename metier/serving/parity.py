"""Is an export the model that was measured? The gate that every exported form passes or is not exported.

Teacher-forced on held-out records, in fp32 arithmetic, three models answer: the reference (the base in the precision
in which the run was evaluated, with the adapter beside it), the base alone, and the export as read back from its
files. KL(reference || export) is judged as a share of KL(reference || base), the adapter's own effect, so that a
small adapter is held to a small error. Weights are compared too: of each LoRA layer the part of the adapter's
update that is in the export (the projection of W' - W on it), and of every tensor what remains when it is taken off.

Limits: fp32 arithmetic judges the files, not an engine's kernels; a drawn answer is compared only greedily.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from metier.errors import LabelError, RunError
from metier.model.chat import IGNORE_INDEX, Message, Renderer
from metier.model.score import distributions
from metier.model.specialist import Specialist
from metier.serving.merge import merged_weights

MIN_PROMPTS = 64
MIN_TOKENS = 2_000
# Of one record: as much as keeps the distributions of 64 records in 2 GB with a vocabulary of 128,000.
MAX_TOKENS_A_RECORD = 64
NUM_RENDERED = 20
NUM_GREEDY = 20
GREEDY_TOKENS = 32

MIN_GAIN_KEPT = 0.95
MIN_DIFFERENCE = 0.5
# By how the weights are stored: KL ratio, deviation of a layer's update from the adapter's, rounding left in a tensor.
LIMITS = {
    "f32": (0.01, 0.01, 1e-5), "f16": (0.01, 0.05, 1e-3), "bf16": (0.01, 0.05, 5e-3),
    "q8_0": (0.10, 0.20, 2e-2), "q4_0": (0.10, 0.50, 0.2), "q4_1": (0.10, 0.50, 0.2),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Probe:
    """A held-out record as token ids, and the positions at which the next token is predicted; answers are marked."""

    record_id: str
    messages: list[Message]
    input_ids: list[int]
    positions: list[int]
    is_answer: list[bool]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the reference and the base say to the probes. `log_probs` are the reference's, fp32 [positions, V] each."""

    probes: list[Probe]
    log_probs: list[torch.Tensor]
    reference_nll: npt.NDArray[np.float64]
    base_nll: npt.NDArray[np.float64]
    base_kl: npt.NDArray[np.float64]
    is_answer: npt.NDArray[np.bool_]
    answers: list[str]


def choose_probes(dataset: Path, renderer: Renderer, context: int | None) -> list[Probe]:
    """Test records, then validation records, in the order of a hash, until both minima are met.

    Raises `RunError` when the held-out records are too few.
    """
    import polars as pl

    path = dataset / "records.parquet"
    try:
        frame = pl.read_parquet(path, columns=["record_id", "split", "messages"])
    except pl.exceptions.PolarsError as error:
        raise RunError(f"`{path}` cannot be read as a data set's records", hint="`metier prepare` makes it") from error
    held_out = [row for row in frame.iter_rows(named=True) if row["split"] in ("test", "val")]
    held_out.sort(key=lambda row: (row["split"] != "test", hashlib.sha256(row["record_id"].encode()).hexdigest()))
    probes: list[Probe] = []
    tokens = 0
    for row in held_out:
        if len(probes) >= MIN_PROMPTS and tokens >= MIN_TOKENS:
            break
        probe = _probe(row["record_id"], row["messages"], renderer, context)
        if probe is not None:
            probes.append(probe)
            tokens += len(probe.positions)
    if len(probes) < MIN_PROMPTS or tokens < MIN_TOKENS:
        raise RunError(
            f"the run holds out {len(probes)} records with {tokens} tokens that can be asked, and an export is checked "
            f"on at least {MIN_PROMPTS} records and {MIN_TOKENS:,} tokens",
            hint="hold out more records: raise `data.test` in the recipe and run it again",
        )
    return probes


def measure_reference(reference: Specialist, probes: list[Probe]) -> Measured:
    """What the adapter as measured, and its base, say to the probes. `reference` is in fp32."""
    log_probs = _ask(reference, probes)
    with reference.adapter.off() if reference.adapter is not None else contextlib.nullcontext():
        base = _compare(reference, probes, log_probs)
    prompts = [p.messages[:-1] for p in probes if p.messages[0]["role"] != "text"][:NUM_GREEDY]
    answers = reference.generate(prompts, max_new_tokens=GREEDY_TOKENS) if prompts else []
    is_answer = np.array([flag for probe in probes for flag in probe.is_answer])
    return Measured(probes, log_probs, _nll(log_probs, probes), base[0], base[1], is_answer, answers)


def measure(export: Specialist, reference: Specialist, measured: Measured, *, form: str) -> dict[str, Any]:
    """How `export`, as read back from its files, compares: the entry of PARITY.json, with `passed` and `failures`.

    `form` says how the weights are stored, one of `LIMITS`.
    """
    probes = measured.probes
    nll, kl, top1 = _compare(export, probes, measured.log_probs)
    answers = measured.is_answer
    base_kl = float(measured.base_kl.mean())
    gain = float(measured.base_nll[answers].mean() - measured.reference_nll[answers].mean())
    kept = float(measured.base_nll[answers].mean() - nll[answers].mean())
    moved = float(np.abs(measured.base_nll - measured.reference_nll).mean())
    prompts = [p.messages[:-1] for p in probes if p.messages[0]["role"] != "text"][:NUM_GREEDY]
    greedy = export.generate(prompts, max_new_tokens=GREEDY_TOKENS) if prompts else []
    entry: dict[str, Any] = {
        "storage": form,
        "num_prompts": len(probes),
        "num_tokens": len(nll),
        "num_answer_tokens": int(answers.sum()),
        "kl_reference_export": float(kl.mean()),
        "kl_reference_base": base_kl,
        "kl_ratio": _ratio(float(kl.mean()), base_kl),
        "kl_ratio_answers": _ratio(float(kl[answers].mean()), float(measured.base_kl[answers].mean())),
        "nll": {
            "base": float(measured.base_nll[answers].mean()),
            "reference": float(measured.reference_nll[answers].mean()),
            "export": float(nll[answers].mean()),
        },
        "gain_kept": kept / gain if gain > 0 else None,
        "top1_agreement": float(top1.mean()),
        "difference_from_base": _ratio(float(np.abs(measured.base_nll - nll).mean()), moved),
        "rendering": _rendering(export.renderer, reference.renderer, probes),
        "greedy": [
            {"record_id": probe.record_id, "reference": digest(ours), "export": digest(theirs)}
            for probe, ours, theirs in zip(
                [p for p in probes if p.messages[0]["role"] != "text"], measured.answers, greedy, strict=False
            )
        ],
        "greedy_equal": sum(ours == theirs for ours, theirs in zip(measured.answers, greedy, strict=True)),
        **_weights(export, reference, form),
    }
    entry["zeroed_adapter_difference"] = _zeroed(export, measured)
    entry["failures"] = failures(entry)
    entry["passed"] = not entry["failures"]
    result: dict[str, Any] = finite(entry)
    return result


def failures(entry: dict[str, Any]) -> list[str]:
    """What an entry of PARITY.json misses, as sentences; none when the form may be exported."""
    kl_limit, update_limit, rest_limit = LIMITS[entry["storage"]]
    found = []
    if not entry["kl_reference_base"] > 0:
        found.append("the adapter changes nothing on the held-out records, so there is nothing to compare with")
    for key, where in (("kl_ratio", "held-out text"), ("kl_ratio_answers", "the answers")):
        if not (entry[key] is not None and entry[key] <= kl_limit):
            found.append(
                f"its error on {where} is {_percent(entry[key])} of the adapter's effect, above {kl_limit:.0%}"
            )
    if entry["gain_kept"] is not None and not entry["gain_kept"] >= MIN_GAIN_KEPT:
        found.append(f"it keeps {_percent(entry['gain_kept'])} of what the adapter gained, below {MIN_GAIN_KEPT:.0%}")
    if not (entry["difference_from_base"] is not None and entry["difference_from_base"] >= MIN_DIFFERENCE):
        found.append("it answers like the base model: the adapter is missing")
    rendering = entry["rendering"]
    if rendering["identical"] < rendering["conversations"]:
        different = rendering["conversations"] - rendering["identical"]
        found.append(
            f"{different} of {rendering['conversations']} conversations get other token ids: tokenizer or template"
        )
    coverage = entry["coverage"]
    if coverage["consumed"] < coverage["lora_layers"]:
        found.append(
            f"{coverage['lora_layers'] - coverage['consumed']} of {coverage['lora_layers']} LoRA layers are not in it "
            f"as trained (more than {update_limit:.0%} off), {coverage['worst_layer']} the farthest"
        )
    if not entry["weights_rest"]["largest"] <= rest_limit:
        rest = entry["weights_rest"]
        found.append(
            f"`{rest['tensor']}` is {_percent(rest['largest'])} away from base and adapter, above {rest_limit:.2%}"
        )
    if not (entry["zeroed_adapter_difference"] or 0.0) <= 1e-5:
        found.append("with its adapter set to zero it is not the base model")
    return found


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite, and JSON does not know, are null."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list) else value


def digest(text: str) -> str:
    """SHA-256 of an answer: PARITY.json leaves the house, so it holds no record's text and no answer to one."""
    return hashlib.sha256(text.encode()).hexdigest()


def _probe(record_id: str, messages: list[Message], renderer: Renderer, context: int | None) -> Probe | None:
    try:
        rendered = renderer.conversation(messages)
    except LabelError:
        return None  # refused in training too
    answer = [t for t, label in enumerate(rendered.labels) if label != IGNORE_INDEX and t > 0]
    if not answer or (context is not None and answer[0] >= context):
        return None
    answer = [t for t in answer if context is None or t < context][: MAX_TOKENS_A_RECORD * 3 // 4]
    before = list(range(1, answer[0]))[-(MAX_TOKENS_A_RECORD - len(answer)) :]
    positions = [*before, *answer]
    flags = [False] * len(before) + [True] * len(answer)
    return Probe(record_id, messages, rendered.input_ids[: positions[-1] + 1], positions, flags)


def _ask(specialist: Specialist, probes: list[Probe]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [torch.empty(0)] * len(probes)
    sequences = [(p.input_ids, p.positions) for p in probes]
    for row, values in distributions(specialist.base, sequences, max_tokens=specialist.max_tokens):
        for index, value in zip(row, values, strict=True):
            found[index] = value.cpu()
    return found


def _compare(
    specialist: Specialist, probes: list[Probe], reference: list[torch.Tensor]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """At each position: the text's negative log-likelihood, KL(reference || this), whether the top choices agree."""
    nll, kl, top1 = ([np.zeros(0)] * len(probes) for _ in range(3))
    sequences = [(p.input_ids, p.positions) for p in probes]
    for row, values in distributions(specialist.base, sequences, max_tokens=specialist.max_tokens):
        for index, value in zip(row, values, strict=True):
            ours, theirs = reference[index], value.cpu()
            width = min(ours.shape[1], theirs.shape[1])
            ours, theirs = ours[:, :width].double(), theirs[:, :width].double()
            # Never negative but for rounding.
            kl[index] = (ours.exp() * (ours - theirs)).sum(1).clamp_min(0).numpy()
            top1[index] = (ours.argmax(1) == theirs.argmax(1)).numpy()
            targets = [probes[index].input_ids[t] for t in probes[index].positions]
            nll[index] = -theirs[range(len(targets)), targets].numpy()
    return np.concatenate(nll), np.concatenate(kl), np.concatenate(top1).astype(bool)


def _nll(log_probs: list[torch.Tensor], probes: list[Probe]) -> npt.NDArray[np.float64]:
    parts = []
    for values, probe in zip(log_probs, probes, strict=True):
        targets = [probe.input_ids[t] for t in probe.positions]
        parts.append(-values[range(len(targets)), targets].double().numpy())
    return np.concatenate(parts)


def _rendering(export: Renderer, reference: Renderer, probes: list[Probe]) -> dict[str, int]:
    """On how many of the first conversations prompt and conversation get the same token ids."""
    chosen = probes[:NUM_RENDERED]
    return {"conversations": len(chosen), "identical": sum(_ids(export, p) == _ids(reference, p) for p in chosen)}


def _ids(renderer: Renderer, probe: Probe) -> tuple[list[int], list[int]] | None:
    try:
        prompt = [] if probe.messages[0]["role"] == "text" else renderer.prompt(probe.messages[:-1])
        return prompt, renderer.conversation(probe.messages).input_ids
    except LabelError:
        return None


@torch.no_grad()
def _weights(export: Specialist, reference: Specialist, form: str) -> dict[str, Any]:
    """How much of each layer's update is in the export, and the largest relative rest of a tensor without it.

    The share is <W' - W, D> / <D, D> with D the adapter's update: 1 where it is there, 0 where it is lost.
    """
    theirs = {weight.name: weight.value for weight in merged_weights(export)}
    shares: dict[str, float] = {}
    rests: dict[str, float] = {}
    for weight in merged_weights(reference):
        value = theirs.get(weight.name)
        if value is None or value.shape != weight.value.shape:
            rests[weight.name] = 1.0  # all of it
            continue
        rest = (value - weight.value).double()
        rests[weight.name] = float(rest.norm() / weight.value.double().norm().clamp_min(1e-12))
        if weight.update is not None:
            update = weight.update.double()
            shares[weight.name] = 1.0 + float((rest * update).sum() / (update * update).sum().clamp_min(1e-300))
    limit = LIMITS[form][1]
    consumed = [name for name, share in shares.items() if abs(share - 1) <= limit]
    worst = max(shares, key=lambda name: abs(shares[name] - 1), default=None)
    largest = max(rests, key=lambda name: rests[name])
    return {
        "coverage": {
            "lora_layers": len(shares),
            "consumed": len(consumed),
            "worst_layer": worst,
            "worst_share": None if worst is None else shares[worst],
        },
        "weights_rest": {"tensor": largest, "largest": rests[largest]},
    }


@torch.no_grad()
def _zeroed(export: Specialist, measured: Measured) -> float | None:
    """With the export's adapter set to zero: the largest difference of a log-probability from the base's.

    None where there is no adapter to set to zero: `weights_rest` then says what is left when it is taken off.
    """
    if export.adapter is None:
        return None
    kept = {name: p.detach().clone() for name, p in export.adapter.parameters.items()}
    for name, (parameter, base) in export.adapter.biases.items():
        parameter.copy_(base.to(parameter))
        assert name
    for layer in export.adapter.layers.values():
        layer.lora_b.zero_()
    nll = _compare(export, measured.probes, measured.log_probs)[0]
    for name, p in export.adapter.parameters.items():
        p.copy_(kept[name])
    return float(np.abs(nll - measured.base_nll).max())


def _ratio(value: float, of: float) -> float | None:
    return value / of if of > 0 else None


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f} %"
