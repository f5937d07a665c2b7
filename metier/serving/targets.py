"""Which forms an export has, and what a form or an engine cannot take: answered from the files' settings alone.

The engines' limits are those of their documentation and code in 2026: vLLM 0.32 (allowed ranks, no DoRA, no
`modules_to_save`, no bias), llama.cpp (LoRA matrices only), Ollama and MLX (here from merged weights, since their
own adapter formats cover fewer models).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.errors import ModelError, RecipeError, did_you_mean

TO = ("adapter", "merged", "gguf", "bundle")
MERGED_STORAGE = ("f16", "bf16", "f32")
GGUF_STORAGE = ("f16", "bf16", "q8_0", "q4_0", "q4_1")
GGUF_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# What each engine is served from, and the first version without the known holes and with what the files need.
NEEDS = {
    "vllm": "adapter", "kserve": "adapter", "ray": "merged", "mlx": "merged", "llama.cpp": "gguf", "ollama": "gguf",
}  # fmt: skip
FLOORS = {
    "vllm": "vLLM 0.32.0 or later", "kserve": "KServe with LLMInferenceService, vLLM 0.32.0 or later",
    "ray": "Ray 2.54.0 or later with vLLM 0.32.0 or later", "mlx": "a current mlx-lm",
    "llama.cpp": "a current llama.cpp", "ollama": "Ollama 0.17.1 or later",
}  # fmt: skip
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# PEFT's entries that change what an adapter is, beyond B A alpha / r on linear layers.
EXTRAS = {
    "use_dora": "DoRA", "modules_to_save": "modules trained whole", "trainable_token_indices": "trained embeddings",
    "rank_pattern": "a rank of its own for some layers", "alpha_pattern": "an alpha of its own for some layers",
    "lora_bias": "a bias in its LoRA layers", "target_parameters": "LoRA on bare parameters",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """One thing to write: `kind` is adapter, merged, gguf or gguf-adapter; `path` is below the export's folder."""

    name: str
    kind: str
    storage: str
    path: str

    @property
    def is_folder(self) -> bool:
        return self.kind in ("adapter", "merged")


@dataclass(frozen=True, slots=True)
class Source:
    """A run that may be exported: its manifests, the PEFT entries of its adapter, and its base's config.json."""

    run: Path
    dataset: dict[str, Any]
    adapter: dict[str, Any]
    entries: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an export will hold: its forms, a bundle's engines, and the folder `final` that it becomes."""

    forms: list[Form]
    served: list[str]
    final: Path


def choose_forms(
    to: str, storage: Sequence[str], targets: Sequence[str], *, entries: dict[str, Any], config: dict[str, Any]
) -> tuple[list[Form], list[str]]:
    """The forms of an export and a bundle's targets.

    Raises `RecipeError` for an unknown word and `ModelError` for what a form or a named target cannot take; of a
    bundle without named targets, those that cannot are left out.
    """
    _check_words("--to", [to], TO)
    _check_words("--storage", storage, (*MERGED_STORAGE, *GGUF_STORAGE))
    _check_words("--for", targets, tuple(NEEDS))
    if targets and to != "bundle":
        raise RecipeError("`--for` names a bundle's engines", hint=f"leave it out, or export `--to bundle`, not {to}")
    served: list[str] = []
    if to == "bundle":
        reasons = {name: why_not(name, entries, config) for name in targets or NEEDS}
        for name, reason in reasons.items():
            if reason and targets:
                raise ModelError(f"{name} cannot take this adapter: {reason}", hint="leave it out of `--for`")
        served = [name for name, reason in reasons.items() if not reason]
        kinds = {"adapter", *(NEEDS[name] for name in served)}
    else:
        kinds = {to}
    for kind in sorted(kinds):
        if reason := why_not_form(kind, entries, config):
            raise ModelError(f"this adapter cannot be exported to {kind}: {reason}")
    return _forms(to, kinds, storage), served


def why_not(target: str, entries: dict[str, Any], config: dict[str, Any]) -> str | None:
    """Why an engine cannot take the adapter with these PEFT entries on the base with this config.json, or None."""
    rank = entries.get("r", 0)
    if target in ("vllm", "kserve"):
        if rank > VLLM_RANKS[-1]:
            return f"its rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at most"
        if (entries.get("bias") or "none") != "none":
            return "it trained bias terms, which vLLM does not load"
        if trained := sorted(set(_targets(entries)) & {"embed_tokens", "lm_head"}):
            return f"it trained {trained[0]}, which vLLM's LoRA does not load for every model"
    return why_not_form(NEEDS[target], entries, config)


def why_not_form(kind: str, entries: dict[str, Any], config: dict[str, Any]) -> str | None:
    """Why the adapter cannot be written in a form, or None."""
    for key, words in EXTRAS.items():
        if entries.get(key):
            return f"it has {words} (`{key}`)"
    if config.get("quantization_config"):
        return "its base is quantised, and an adapter is never merged into rounded weights"
    if kind in ("merged", "gguf") and "lm_head" in _targets(entries) and config.get("tie_word_embeddings"):
        return "it trained the output head, which this base shares with its embeddings"
    if kind == "gguf" and config.get("model_type") not in GGUF_MODELS:
        return f"GGUF is written for {', '.join(GGUF_MODELS)}, and the base is a `{config.get('model_type')}`"
    if kind == "gguf" and (entries.get("bias") or "none") != "none":
        return "it trained bias terms, which a GGUF adapter does not hold"
    return None


def vllm_rank(rank: int) -> int:
    """The least value of vLLM's --max-lora-rank that takes an adapter of `rank`."""
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def _forms(to: str, kinds: set[str], storage: Sequence[str]) -> list[Form]:
    inside = to == "bundle"
    found = []
    if "adapter" in kinds:
        found.append(Form("adapter", "adapter", "f32", "adapter" if inside else "."))
    if "merged" in kinds:
        chosen = [s for s in storage if s in MERGED_STORAGE]
        if len(chosen) > 1 or (to == "merged" and len(storage) > len(chosen)):
            raise RecipeError("merged weights are stored in one way", hint="give one `--storage`: f16, bf16 or f32")
        found.append(Form("merged", "merged", "auto" if not chosen else chosen[0], "merged" if inside else "."))
    if "gguf" in kinds:
        place = "gguf/" if inside else ""
        found.append(Form("gguf-adapter", "gguf-adapter", "f32", f"{place}adapter.gguf"))
        if to == "gguf" and (bad := [s for s in storage if s not in GGUF_STORAGE]):
            raise RecipeError(f"GGUF is not written in `{bad[0]}`", hint=f"it takes {', '.join(GGUF_STORAGE)}")
        for kind in [s for s in dict.fromkeys(storage) if s in GGUF_STORAGE] or ["q8_0"]:
            found.append(Form(f"gguf-{kind}", "gguf", kind, f"{place}model-{kind}.gguf"))
    return found


def _check_words(option: str, words: Sequence[str], known: tuple[str, ...]) -> None:
    for word in words:
        if word not in known:
            raise RecipeError(
                f"`{option} {word}`: there is no such choice{did_you_mean(word, list(known))}",
                hint=f"it takes {', '.join(known)}",
            )


def _targets(entries: dict[str, Any]) -> list[str]:
    wanted = entries.get("target_modules") or []
    return [str(w).rpartition(".")[2] for w in ([wanted] if isinstance(wanted, str) else wanted)]
