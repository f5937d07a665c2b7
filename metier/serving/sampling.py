"""The next token of every row of a batch: greedy, or drawn from temperature and nucleus, each row by its own seed.

Row i's choice depends on its own logits, settings and history alone, so a request gets the same tokens whatever
runs beside it. Penalties and logit_bias are OpenAI's; log-probabilities are the model's own, before any of them.
Nucleus: Holtzman et al., 2019, arXiv 1904.09751. A draw is u ~ U(0, 1) of the row's generator, looked up in the
cumulative distribution of the nucleus.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence is continued; temperature 0 is greedy, and then top_p and seed have no effect.

    `top_logprobs` None asks for no log-probabilities, 0 for the chosen token's alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability in nats, and the likeliest tokens with theirs; `token`'s own may be among them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class SamplingState:
    """What a sequence carries from token to token: its generator and how often it has said what."""

    sampling: Sampling
    rng: random.Random
    counts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingState:
        return cls(sampling, random.Random(sampling.seed))


@torch.no_grad()
def next_tokens(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
    """The chosen token of each row of `logits` [rows, V]; the states are moved on."""
    scores = logits.float()
    touched = [row for row, state in enumerate(states) if _is_touched(state)]
    if touched:
        scores = scores.clone()
        for row in touched:
            _touch(scores[row], states[row])
    chosen = scores.argmax(-1)
    drawn = [row for row, state in enumerate(states) if state.sampling.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(scores[drawn], [states[row] for row in drawn])
    tokens: list[int] = chosen.tolist()
    for token, state in zip(tokens, states, strict=True):
        state.counts[token] = state.counts.get(token, 0) + 1
    return tokens


@torch.no_grad()
def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability of `tokens[i]` under `logits[i]` [rows, V], and the `top` likeliest tokens of the row."""
    log_probs = logits.float().log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(list(tokens), device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [TokenLogprob(token, value, ()) for token, value in zip(tokens, own, strict=True)]
    values, ids = log_probs.topk(min(top, log_probs.shape[-1]), dim=-1)
    return [
        TokenLogprob(token, value, tuple(zip(row_ids, row_values, strict=True)))
        for token, value, row_ids, row_values in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]


def _is_touched(state: SamplingState) -> bool:
    sampling = state.sampling
    return bool(sampling.logit_bias) or (
        bool(state.counts) and bool(sampling.presence_penalty or sampling.frequency_penalty)
    )


def _touch(scores: torch.Tensor, state: SamplingState) -> None:
    """Adds logit_bias and takes the penalties off, in place; scores [V]."""
    sampling = state.sampling
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=scores.device)
        scores[ids] += torch.tensor(list(sampling.logit_bias.values()), device=scores.device)
    if state.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(state.counts), device=scores.device)
        counts = torch.tensor(list(state.counts.values()), device=scores.device, dtype=scores.dtype)
        scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(scores: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """One token a row from the nucleus of softmax(scores / temperature); scores [rows, V]."""
    device = scores.device
    temperature = torch.tensor([s.sampling.temperature for s in states], device=device)[:, None]
    top_p = torch.tensor([s.sampling.top_p for s in states], device=device)[:, None]
    u = torch.tensor([s.rng.random() for s in states], device=device)[:, None]
    probs, order = (scores / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probs.cumsum(-1)
    # The nucleus is the shortest list of likeliest tokens that reaches top_p: those before which it was not reached.
    size = (cumulative - probs < top_p).sum(-1, keepdim=True).clamp(min=1)
    total = cumulative.gather(1, size - 1)
    index = torch.searchsorted(cumulative, u * total, right=True).minimum(size - 1)
    return order.gather(1, index)[:, 0]
