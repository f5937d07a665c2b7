"""A tokenizer and its chat template -> the metadata by which llama.cpp splits text into the same token ids.

Two kinds: byte-level BPE (`gpt2` in GGUF: LLaMA 3, Qwen, SmolLM2), for which llama.cpp needs the name of the
pre-tokenizer, found here by its rules; and LLaMA 2's SentencePiece BPE (`llama`), for which it needs a score a token:
the rank of the first merge that makes it, negated, gives the same order of merges.

Limits: a pre-tokenizer that llama.cpp has no name for is refused, never replaced by a similar one.
"""

from __future__ import annotations

import json
import re
from typing import Any

import gguf

from metier.errors import ModelError
from metier.model.chat import Renderer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: Any, renderer: Renderer, num_embeddings: int) -> None:
    """Writes tokens, merges or scores, special tokens and the chat template of `renderer` into a GGUF writer.

    Embeddings without a token get an unused one, since llama.cpp takes the vocabulary's size from the list. Raises
    `ModelError` for a tokenizer that llama.cpp cannot run.
    """
    tokenizer = renderer.tokenizer
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    model = pipeline["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF is written for BPE tokenizers, and this one is a {model['type']}")
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(num_embeddings)]
    added = {entry["id"]: entry for entry in pipeline["added_tokens"]}
    types = [_type(i, token, ids, added, tokenizer.unk_token_id) for i, token in enumerate(tokens)]
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    if model["byte_fallback"]:
        _check_sentencepiece(pipeline)
        ranks: dict[str, float] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, -float(rank))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([ranks.get(token, -float(len(merges))) for token in tokens])
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(pipeline))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, renderer)


def pre_tokenizer(pipeline: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer. Raises `ModelError` when it has none."""
    steps = pipeline["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    normalizer = (pipeline["normalizer"] or {}).get("type")
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and normalizer is None:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and normalizer is None:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and patterns == [LLAMA3] and normalizer is None:
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and patterns == [QWEN2] and normalizer in (None, "NFC"):
        return "qwen2"
    raise ModelError(
        "llama.cpp has no pre-tokenizer that splits as this tokenizer does, so its token ids would differ",
        hint="export the adapter or the merged safetensors instead",
    )


def _check_sentencepiece(pipeline: dict[str, Any]) -> None:
    """LLaMA 2's pipeline: a space before the text, spaces as U+2581, no pre-tokenizer."""
    steps = (pipeline["normalizer"] or {}).get("normalizers", [])
    if [step["type"] for step in steps] != ["Prepend", "Replace"] or pipeline["pre_tokenizer"] is not None:
        raise ModelError(
            "this SentencePiece tokenizer does not treat spaces as LLaMA 2's does, and GGUF is written for that alone",
            hint="export the adapter or the merged safetensors instead",
        )


def _type(token_id: int, token: str, ids: dict[int, str], added: dict[int, Any], unknown: int | None) -> Any:
    if token_id not in ids:
        return gguf.TokenType.UNUSED
    if BYTE.fullmatch(token):
        return gguf.TokenType.BYTE
    if token_id in added:
        return gguf.TokenType.CONTROL if added[token_id]["special"] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.UNKNOWN if token_id == unknown else gguf.TokenType.NORMAL


def _add_special_tokens(writer: Any, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if renderer.end_of_turn_id is not None:
        writer.add_eot_token_id(renderer.end_of_turn_id)
    writer.add_add_bos_token(renderer.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(renderer.template)
