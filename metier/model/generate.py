"""Batched generation from token ids, through transformers' own `generate`.

Prompts of a batch are padded on the left and masked; a sequence ends at any of the stop tokens. Greedy
when temperature is 0, else seeded sampling (temperature, then nucleus: Holtzman et al., 2019, arXiv 1904.09751).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metier.model.load import Base


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token; temperature 0 is greedy, and then top_p and seed have no effect."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate_ids(
    base: Base,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    stop_token_ids: frozenset[int],
    batch_size: int,
    streamer: Any = None,
) -> Iterator[tuple[int, list[int]]]:
    """(index into `prompts`, new ids with the stop token if one came) in the order in which batches finish.

    Prompts are grouped by length, the longest first, so that padding is small. `streamer` is
    transformers' and needs a batch of one.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        new = _generate_batch(base, [prompts[i] for i in rows], params, sorted(stop_token_ids), streamer)
        for index, ids in zip(rows, new, strict=True):
            end = next((n + 1 for n, token in enumerate(ids) if token in stop_token_ids), len(ids))
            yield index, ids[:end]


@torch.no_grad()
def _generate_batch(
    base: Base, prompts: list[list[int]], params: SamplingParams, stop: list[int], streamer: Any
) -> list[list[int]]:
    width = max(len(ids) for ids in prompts)
    # Any id may pad: the mask hides it. A stop token does, since `generate` fills finished rows with it.
    pad = stop[0]
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=base.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if params.temperature > 0:
        sampling = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(params.seed)
        output = base.model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=params.max_new_tokens, eos_token_id=stop,
            pad_token_id=pad, repetition_penalty=1.0, streamer=streamer, **sampling,
        )  # fmt: skip
    new: list[list[int]] = output[:, width:].tolist()
    return new
