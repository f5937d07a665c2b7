"""Log-probabilities of answers and of choices, without padding.

Answers: prompt and answer lie packed in rows, as in training. Choices: a prompt is computed once and
its choices branch from it as a tree of tokens (a trie): each token attends to the prompt, its
ancestors and itself, so the cost is the prompt and the trie's inner nodes, not prompts x choices.
Sums are float64 over fp32 log-softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from metier.model.load import Base


@dataclass
class Trie:
    """Choices as a tree of tokens. Node 0 is the prompt's last token; `parents` and `tokens` are the others'.

    `edges[c]` are the (node, next token) pairs whose log-probabilities sum to choice c. The last token of a
    choice is no node unless another choice goes on from it: nothing needs to be computed behind it.
    """

    parents: list[int] = field(default_factory=lambda: [-1])
    tokens: list[int] = field(default_factory=lambda: [-1])
    edges: list[list[tuple[int, int]]] = field(default_factory=list)

    @classmethod
    def of(cls, choices: Sequence[list[int]]) -> Trie:
        """The trie of `choices`, token lists that are not empty."""
        trie = cls()
        children: dict[tuple[int, int], int] = {}
        for choice in choices:
            node, path = 0, []
            for position, token in enumerate(choice):
                path.append((node, token))
                if position == len(choice) - 1:
                    break
                if (node, token) not in children:
                    children[node, token] = len(trie.tokens)
                    trie.parents.append(node)
                    trie.tokens.append(token)
                node = children[node, token]
            trie.edges.append(path)
        return trie

    def continuations(self, choice: int) -> list[int]:
        """The choices that begin with all tokens of `choice` and go on; of those, the ones that begin with no other."""
        path = self.edges[choice]
        longer = [k for k, other in enumerate(self.edges) if len(other) > len(path) and other[: len(path)] == path]
        return [k for k in longer if not any(k in self.continuations(other) for other in longer if other != k)]

    def depths(self) -> list[int]:
        """Distance from the prompt's last token, by node."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths

    def visible(self) -> torch.Tensor:
        """[nodes, nodes] bool: whether row's node may attend to column's; node 0's column is left False."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent > 0:
                seen[node] |= seen[parent]
        return seen


def _rows(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices, the longest first, in rows of at most `max_tokens` (or one record)."""
    row: list[int] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if row and filled + lengths[index] > max_tokens:
            yield row
            row, filled = [], 0
        row.append(index)
        filled += lengths[index]
    if row:
        yield row


@torch.no_grad()
def answer_log_probs(
    base: Base, sequences: Sequence[tuple[list[int], list[int]]], *, max_tokens: int, done: Callable[[int], None]
) -> list[np.ndarray]:
    """For each (input_ids, positions): log p(input_ids[t] | before) at each position t, float64, in nats.

    `done` is told how many sequences are finished after each pass of at most `max_tokens` tokens.
    """
    results: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    finished = 0
    for row in _rows([len(ids) for ids, _ in sequences], max_tokens):
        ids: list[int] = []
        position_ids: list[int] = []
        keep: list[int] = []
        targets: list[int] = []
        for index in row:
            tokens, positions = sequences[index]
            keep += [len(ids) + t - 1 for t in positions]
            targets += [tokens[t] for t in positions]
            ids += tokens
            position_ids += range(len(tokens))
        flat = _log_probs(base, ids, position_ids, keep, None)[range(len(targets)), targets].double().cpu().numpy()
        ends = np.cumsum([len(sequences[index][1]) for index in row])
        for index, values in zip(row, np.split(flat, ends[:-1]), strict=True):
            results[index] = values
        finished += len(row)
        done(finished)
    return results


@torch.no_grad()
def choice_log_probs(
    base: Base,
    prompts: Sequence[list[int]],
    choices: Sequence[list[int]],
    *,
    max_tokens: int,
    done: Callable[[int], None],
) -> np.ndarray:
    """Log-probability of each choice after each prompt, in nats: float64 [num_prompts, num_choices].

    It is the sum over the choice's tokens. Where another choice begins with all of them, that one's probability is
    taken off: what is left is the probability of an answer that begins with this choice and is not the other.
    """
    trie = Trie.of(choices)
    depths, visible, num_nodes = trie.depths(), trie.visible(), len(trie.tokens)
    scores = np.zeros((len(prompts), len(choices)))
    edge_nodes = [[node for node, _ in path] for path in trie.edges]
    edge_tokens = [[token for _, token in path] for path in trie.edges]
    finished = 0
    for row in _rows([len(p) + num_nodes - 1 for p in prompts], max_tokens):
        ids: list[int] = []
        position_ids: list[int] = []
        nodes: list[list[int]] = []
        blocks: list[torch.Tensor] = []
        for index in row:
            prompt = prompts[index]
            last, size = len(prompt) - 1, len(prompt) + num_nodes - 1
            mask = torch.zeros(size, size, dtype=torch.bool)
            mask[: last + 1, : last + 1] = torch.ones(last + 1, last + 1, dtype=torch.bool).tril()
            mask[last + 1 :, : last + 1] = True
            mask[last + 1 :, last + 1 :] = visible[1:, 1:]
            blocks.append(mask)
            nodes.append([len(ids) + last + node for node in range(num_nodes)])
            ids += prompt + trie.tokens[1:]
            position_ids += [*range(last + 1), *(last + depth for depth in depths[1:])]
        keep = [position for positions in nodes for position in positions]
        mask = torch.block_diag(*blocks)[None, None].to(base.device)  # type: ignore[no-untyped-call]
        log_probs = _log_probs(base, ids, position_ids, keep, mask).view(len(row), num_nodes, -1)
        for choice, (at, tokens) in enumerate(zip(edge_nodes, edge_tokens, strict=True)):
            scores[row, choice] = log_probs[:, at, tokens].double().sum(1).cpu().numpy()
        finished += len(row)
        done(finished)
    return _without_continuations(scores, trie)


def _without_continuations(scores: np.ndarray, trie: Trie) -> np.ndarray:
    """log(p - sum of the continuations' p), by choice; never quite -inf, where rounding leaves nothing."""
    result = scores.copy()
    for choice in range(len(trie.edges)):
        longer = trie.continuations(choice)
        if longer:
            share = np.exp(scores[:, longer] - scores[:, [choice]]).sum(1)
            result[:, choice] += np.log1p(-np.minimum(share, 1 - 1e-12))
    return result


def _log_probs(
    base: Base, ids: list[int], position_ids: list[int], keep: list[int], mask: torch.Tensor | None
) -> torch.Tensor:
    """fp32 [len(keep), V]: log-softmax at the kept positions of one row; without a mask, position_ids divide it."""
    device = base.device
    logits = base.model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        attention_mask=mask,
        use_cache=False,
        logits_to_keep=torch.tensor(keep, device=device),
    ).logits
    log_probs: torch.Tensor = logits[0].float().log_softmax(-1)
    return log_probs
