"""A complete tiny run: a base with random weights, trained for 40 steps, with 80 held-out records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from metier import artifacts, pipeline
from metier.recipe import Recipe
from metier.serving.gguf_tokenizer import QWEN2
from tests.model.tiny import Kind, save_tiny

LABELS = ("heart", "lung", "skin")


def tiny_run(root: Path, kind: Kind = "smollm2", *, shrink: float = 1.0, **adapter: Any) -> Path:
    """The run in `root`/run on the base in `root`/base; `adapter` are the recipe's, B is multiplied by `shrink`."""
    base = save_tiny(kind, root / "base")
    if kind.startswith("qwen"):
        use_qwen_pre_tokenizer(base)
    run = root / "run"
    pipeline.train(prepared(root, base, adapter))
    (run / "MODEL_CARD.md").write_text("# A tiny model\n", encoding="utf-8")
    if shrink != 1.0:
        path = run / "adapter" / "adapter_model.safetensors"
        tensors = {n: t * (shrink if "lora_B" in n else 1.0) for n, t in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        restate(run / "adapter")
    return run


def restate(folder: Path, **changes: Any) -> None:
    """Makes an artifact's manifest true of its files again, with `changes` to its entries."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["files"].items():
        entry |= {"sha256": artifacts.digest_file(folder / name), "bytes": (folder / name).stat().st_size}
    artifacts.write_json(folder / "manifest.json", manifest | changes)


def prepared(root: Path, base: Path, adapter: dict[str, Any]) -> Recipe:
    """The recipe of `root`/run, whose data set is made."""
    source = root / "notes.csv"
    rows = (f"a note on a finding {i} of the {LABELS[i % 3]} with 心 {i},{LABELS[i % 3]}\n" for i in range(150))
    source.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    data = {"sources": [str(source)], "prompt": "Note: {text}", "answer": "label", "val": 10, "test": 80}
    train = {"max_steps": 40, "micro_batch_size": 8, "learning_rate": 0.02, "precision": "fp32", "device": "cpu"}
    lora = {"rank": 4, "alpha": 8.0} | adapter
    recipe = Recipe.model_validate(
        {"base": str(base), "out": str(root / "run"), "data": data, "train": train, "adapter": lora}
    )
    pipeline.prepare(recipe)
    return recipe


def use_qwen_pre_tokenizer(base: Path) -> None:
    """Qwen's own rules in place of GPT-2's: transformers applies them to every Qwen, whatever the file says."""
    pipeline_ = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pipeline_["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    pipeline_["normalizer"] = {"type": "NFC"}
    artifacts.write_json(base / "tokenizer.json", pipeline_)
