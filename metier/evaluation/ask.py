"""Asking base and adapter: the same items, the same prompts, one loaded model, chunk by chunk.

In: items, what to ask, a model. Out: `Answers` of both. Items are sorted by length and asked in chunks of a
fixed content, base and adapter in turn; each chunk's answers are kept in a file under the digest of all that
was asked, so that a killed evaluation goes on with the next chunk and ends with the same bytes.

Limits: one greedy completion an item, no sampling.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metier.artifacts import digest_json, disk_errors
from metier.errors import DataError, ModelError
from metier.evaluation.items import Answers, Item, Message, draw

if TYPE_CHECKING:
    from metier.model.specialist import Specialist

Progress = Callable[[str, int, int], None]

LONGEST_ANSWER = 512
# Free tokens beyond the longest reference, so that a wordier answer is not cut into a wrong one.
SPARE_TOKENS = 8
CHUNK = 64
BATCH = 32
_OPTION = re.compile(r"(?:^|\s)[(（]?([A-Ha-h])\s*[.)）:、．：]", re.MULTILINE)


@dataclass(frozen=True)
class Questions:
    """What to ask: `labels` to choose from ([] for none), tokens to generate (0 for none), and for the base
    with examples (`few_shot`, turns before the prompt). `by_options`: only what a prompt lists is offered."""

    labels: list[str] = field(default_factory=list)
    max_new_tokens: int = 0
    by_options: bool = False
    few_shot: list[Message] = field(default_factory=list)


class AnswerCache:
    """Answers on disk, one JSON line each, under the digest of what was asked. A torn last line is dropped.

    `model` says where the answers come from: device and precision; another one asks anew.
    """

    def __init__(self, path: Path, model: list[str]) -> None:
        self.path, self.model = path, model
        self._found: dict[str, Any] = {}
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            self._found[entry["key"]] = entry["value"]
            whole += line
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole)

    def get(self, asked: Any, answer: Callable[[], Any]) -> Any:
        """The stored answer to `asked` (a JSON value), or that of `answer()`, which is then stored."""
        key = digest_json([self.model, asked])
        if key not in self._found:
            self._found[key] = value = answer()
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return self._found[key]


def offered(prompt: str, labels: list[str]) -> list[bool]:
    """Which of `labels`, option letters, the prompt lists (`A. ...`); all where it lists fewer than two."""
    listed = {letter.upper() for letter in _OPTION.findall(prompt)}
    found = [label.strip().upper() in listed for label in labels]
    return found if sum(found) >= 2 else [True] * len(labels)


def longest_answer(specialist: Specialist, items: list[Item], fixed: int | str) -> int:
    """The number of tokens after which a completion is cut."""
    if isinstance(fixed, int):
        return fixed
    longest = max(specialist.count_tokens(reference) for reference in {i.reference for i in items})
    return min(longest + SPARE_TOKENS, LONGEST_ANSWER)


def leave_out(specialist: Specialist, items: list[Item], max_new_tokens: int) -> tuple[list[Item], dict[str, str]]:
    """The items that can be asked, and the reason by record_id for each of the others.

    Raises `DataError` when none can be asked.
    """
    reasons = {i.record_id: specialist.why_not(i.messages, max_new_tokens) for i in items}
    left_out = {record_id: reason for record_id, reason in reasons.items() if reason}
    if len(left_out) == len(items):
        reason = next(iter(left_out.values()))
        raise DataError(f"none of {len(items)} test records can be asked; the first: {reason}")
    return [i for i in items if i.record_id not in left_out], left_out


def examples(
    specialist: Specialist, train: list[Item], items: list[Item], *, count: int, seed: int, max_new_tokens: int
) -> list[Message]:
    """Turns of up to `count` training records, of different labels first, that leave room for every item."""
    drawn = [i for i in draw(train, None, seed) if len(i.messages) >= 2]
    by_label: dict[str, Item] = {}
    for item in drawn:
        if item.label is not None:
            by_label.setdefault(item.label, item)
    first = list(by_label.values())
    chosen = [*first, *(i for i in drawn if i not in first)][:count]
    while chosen:
        turns = [m for i in chosen for m in i.messages if m["role"] != "system"]
        longest = sorted(items, key=lambda i: len(i.prompt_text))[-3:]
        if not any(specialist.why_not(with_examples(i.messages, turns), max_new_tokens) for i in longest):
            return turns
        chosen = chosen[: len(chosen) // 2]
    return []


def with_examples(messages: list[Message], turns: list[Message]) -> list[Message]:
    """`turns` before the first message that is not the system's."""
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    return [*system, *turns, *messages[len(system) :]]


def ask(
    specialist: Specialist, items: list[Item], questions: Questions, *, cache: AnswerCache, progress: Progress
) -> tuple[dict[str, Answers], list[str] | None]:
    """What base and adapter answer to all items, and what the base answers after examples, if there are any.

    Raises `ModelError` when a likelihood is not a finite number.
    """
    gathered: dict[str, dict[int, Any]] = {"base": {}, "adapter": {}, "few_shot": {}}
    finished = 0
    for places in _chunks([len(i.prompt_text) + len(i.reference) for i in items]):
        chunk = [items[p] for p in places]
        for side in ("base", "adapter"):
            gathered[side] |= zip(places, _ask_chunk(specialist, chunk, questions, side, cache), strict=True)
        if questions.few_shot:
            answers = _ask_few_shot(specialist, chunk, questions, cache)
            gathered["few_shot"] |= zip(places, answers, strict=True)
        finished += len(places)
        progress("answers of base and adapter", finished, len(items))
    order = range(len(items))
    sides = {s: _answers(s, [gathered[s][i] for i in order], questions) for s in ("base", "adapter")}
    return sides, [gathered["few_shot"][i] for i in order] if questions.few_shot else None


def ask_alone(
    specialist: Specialist, items: list[Item], questions: Questions, side: str, *, cache: AnswerCache,
    progress: Progress,
) -> Answers:  # fmt: skip
    """What another model answers to the same; `side` says which, and is any name but base and adapter."""
    gathered: dict[int, Any] = {}
    for places in _chunks([len(i.prompt_text) + len(i.reference) for i in items]):
        gathered |= zip(places, _ask_chunk(specialist, [items[p] for p in places], questions, side, cache), strict=True)
        progress(f"answers of {side.split()[0]}", len(gathered), len(items))
    return _answers(side.split()[0], [gathered[i] for i in range(len(items))], questions)


def ask_records(
    specialist: Specialist, conversations: Sequence[list[Message]], *, cache: AnswerCache, progress: Progress, what: str
) -> dict[str, list[list[float]]]:
    """By side: [nll, num_tokens, num_bytes] of each conversation's last answer, or of a plain text."""
    gathered: dict[str, dict[int, list[float]]] = {"base": {}, "adapter": {}}
    finished = 0
    for places in _chunks([sum(len(m["content"]) for m in c) for c in conversations]):
        chunk = [conversations[p] for p in places]
        for side in gathered:
            gathered[side] |= zip(places, _score(specialist, chunk, side, cache), strict=True)
        finished += len(places)
        progress(what, finished, len(conversations))
    return {side: [found[i] for i in range(len(conversations))] for side, found in gathered.items()}


def complete(
    specialist: Specialist, prompts: list[list[Message]], side: str, max_new_tokens: int, cache: AnswerCache
) -> list[tuple[str, bool]]:
    """(text, stopped) of the greedy answer to each prompt."""

    def answer() -> list[tuple[str, bool]]:
        found = specialist.complete(
            prompts, use_adapter=side != "base", max_new_tokens=max_new_tokens, batch_size=BATCH
        )
        return [(c.text, c.stopped) for c in found]

    return [(text, stopped) for text, stopped in cache.get(["complete", side, max_new_tokens, prompts], answer)]


def _score(specialist: Specialist, chunk: Sequence[Sequence[Message]], side: str, cache: AnswerCache) -> Any:
    def answer() -> list[list[float]]:
        scores = specialist.score_records(chunk, use_adapter=side != "base")
        return [[s.nll, s.num_tokens, s.num_bytes] for s in scores]

    return cache.get(["score", side, list(chunk)], answer)


def _choose(
    specialist: Specialist, prompts: list[list[Message]], labels: list[str], side: str, cache: AnswerCache
) -> Any:
    def answer() -> Any:
        return specialist.score_choices(prompts, labels, use_adapter=side != "base").tolist()

    return cache.get(["choose", side, labels, prompts], answer)


def _ask_chunk(
    specialist: Specialist, chunk: list[Item], questions: Questions, side: str, cache: AnswerCache
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"score": s} for s in _score(specialist, [i.messages for i in chunk], side, cache)]
    prompts = [i.prompt for i in chunk]
    if questions.labels:
        for entry, item, scores in zip(
            found, chunk, _choose(specialist, prompts, questions.labels, side, cache), strict=True
        ):
            entry["labels"] = _masked(scores, item, questions)
    if questions.max_new_tokens:
        answers = complete(specialist, prompts, side, questions.max_new_tokens, cache)
        for entry, (text, stopped) in zip(found, answers, strict=True):
            entry["completion"], entry["stopped"] = text, stopped
    return found


def _ask_few_shot(specialist: Specialist, chunk: list[Item], questions: Questions, cache: AnswerCache) -> list[str]:
    prompts = [with_examples(i.prompt, questions.few_shot) for i in chunk]
    if not questions.labels:
        return [text for text, _ in complete(specialist, prompts, "base", questions.max_new_tokens, cache)]
    scores = _choose(specialist, prompts, questions.labels, "base", cache)
    best = [int(np.argmax(_masked(row, item, questions))) for row, item in zip(scores, chunk, strict=True)]
    return [questions.labels[k] for k in best]


def _masked(scores: list[float], item: Item, questions: Questions) -> list[float]:
    if not questions.by_options:
        return scores
    allowed = offered(item.prompt_text, questions.labels)
    return [s if may else float("-inf") for s, may in zip(scores, allowed, strict=True)]


def _answers(side: str, found: list[dict[str, Any]], questions: Questions) -> Answers:
    scores = np.array([entry["score"] for entry in found], dtype=np.float64)
    refused = int((~np.isfinite(scores[:, 0])).sum())
    if refused:
        raise ModelError(
            f"the {side} gives no finite likelihood for {refused} of {len(found)} test records",
            hint="a training that diverged does this: lower `train.learning_rate`, or look at loss in metrics.jsonl",
        )
    labels = np.array([entry["labels"] for entry in found]) if questions.labels else None
    generated = bool(questions.max_new_tokens)
    return Answers(
        nll=scores[:, 0], num_tokens=scores[:, 1], num_bytes=scores[:, 2],
        labels=None if labels is None else [questions.labels[k] for k in labels.argmax(axis=1)],
        label_scores=labels,
        completions=[entry["completion"] for entry in found] if generated else None,
        stopped=np.array([entry["stopped"] for entry in found], dtype=bool) if generated else None,
    )  # fmt: skip


def _chunks(lengths: list[int]) -> Iterator[list[int]]:
    """Places by length, the longest first (the largest need of memory shows at once), in chunks."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]
