"""Exports of a real run: the parity of every form, seeded faults, and real llama.cpp against PARITY.json.

python benchmarks/bench_export.py RUN --work DIR --llama-python PYTHON > results.md

RUN is a finished run of metier, PYTHON an interpreter with llama-cpp-python (built from its source package). Every
form is exported (those that fail the gate are in the table too); the GGUF files and the base with the GGUF adapter
answer the 20 greedy prompts of PARITY.json in llama.cpp; faults are put into copies of the exports.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from metier.errors import MetierError
from metier.model.load import load_base
from metier.model.specialist import Specialist
from metier.serving import gguf_weights, parity
from metier.serving.export import export, open_reference
from metier.serving.merge import merged_weights

GGUF = ["f16", "bf16", "q8_0", "q4_0", "q4_1"]
CHILD = Path(__file__).with_name("llama_cpp_answers.py")


def export_all(run: Path, work: Path) -> dict[str, Any]:
    """Every form's entry of PARITY.json, with its folder and its time."""
    found: dict[str, Any] = {}
    for name, to, storage in (
        ("adapter", "adapter", []), ("merged-f16", "merged", ["f16"]), ("merged-bf16", "merged", ["bf16"]),
        ("merged-f32", "merged", ["f32"]), ("gguf", "gguf", GGUF),
    ):  # fmt: skip
        started, out = time.time(), work / name
        try:
            export(run, to, out=out, storage=storage, say=lambda text: print(text, file=sys.stderr, flush=True))
        except MetierError as error:
            print(error, file=sys.stderr)
        path = out.with_name(f"{name}.PARITY.json")
        forms = json.loads((path if path.exists() else out / "PARITY.json").read_text())["forms"]
        for form, entry in forms.items():
            key = form if to == "gguf" else name
            found[key] = {**entry, "folder": out, "seconds": (time.time() - started) / len(forms)}
    return found


def llama_cpp(
    python: Path, model: Path, lora: Path | None, prompts: list[dict[str, Any]], stop: list[int]
) -> list[dict[str, Any]]:
    """What llama.cpp makes of the prompts."""
    asked = {
        "model": str(model), "lora": None if lora is None else str(lora), "prompts": prompts, "stop": stop,
        "max_tokens": parity.GREEDY_TOKENS,
    }  # fmt: skip
    done = subprocess.run([python, CHILD], input=json.dumps(asked), capture_output=True, text=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def ask_llama_cpp(run: Path, work: Path, python: Path, forms: dict[str, Any]) -> list[str]:
    """Table rows: for each GGUF form, prompts with the same ids and answers equal to PARITY.json's."""
    reference = open_reference(run)
    probes = parity.choose_probes(run / "dataset", reference.renderer, reference.context)[: parity.NUM_GREEDY]
    prompts = []
    for probe in probes:
        ids = reference.renderer.prompt(probe.messages[:-1])
        text = reference.base.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        prompts.append({"text": text, "ids": ids})
    stop = sorted(reference.renderer.stop_token_ids)
    base = Specialist(load_base(reference.base.path, dtype=torch.float32, device=torch.device("cpu")))
    bare = work / "base-f16.gguf"
    gguf_weights.write_model(bare, merged_weights(base), reference, form="f16", name="base")
    rows = []
    for name, entry in forms.items():
        if not name.startswith("gguf") or not entry["passed"]:
            continue
        is_adapter = name == "gguf-adapter"
        path = entry["folder"] / ("adapter.gguf" if is_adapter else f"model-{name.removeprefix('gguf-')}.gguf")
        answers = llama_cpp(python, bare if is_adapter else path, path if is_adapter else None, prompts, stop)
        digests = [parity.digest(reference.renderer.decode(a["answer"])) for a in answers]
        same_ids = sum(a["ids"] == p["ids"] for a, p in zip(answers, prompts, strict=True))
        exported = sum(d == g["export"] for d, g in zip(digests, entry["greedy"], strict=True))
        measured = sum(d == g["reference"] for d, g in zip(digests, entry["greedy"], strict=True))
        rows.append(f"| {name} | {same_ids} of 20 | {exported} of 20 | {measured} of 20 |")
    return rows


def share(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{100 * value:.{digits}g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    forms = export_all(options.run, options.work)
    first = next(iter(forms.values()))
    print(f"{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print(f"{first['num_prompts']} prompts, {first['num_tokens']} tokens, {first['num_answer_tokens']} of answers\n")
    print("| form | error, of the adapter's effect | on answers | gain kept | top-1 | LoRA layers | greedy | passed |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for name, e in forms.items():
        cover = e["coverage"]
        print(
            f"| {name} | {share(e['kl_ratio'])} | {share(e['kl_ratio_answers'])} | {share(e['gain_kept'])} | "
            f"{share(e['top1_agreement'])} | {cover['consumed']} of {cover['lora_layers']} | "
            f"{e['greedy_equal']} of {len(e['greedy'])} | {'yes' if e['passed'] else 'no'} |"
        )
    print("\n| in llama.cpp | prompts with the same ids | answers as PARITY.json says | as the adapter |")
    print("|---|---:|---:|---:|")
    for row in ask_llama_cpp(options.run, options.work, options.llama_python, forms):
        print(row)


if __name__ == "__main__":
    main()
