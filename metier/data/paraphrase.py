"""Training records -> their prompts as the base model itself rewrites them, where the rewriting is faithful.

The base is shown one example and asked for other words (seeded sampling). What it writes is kept only if

    copy       it is no copy of the prompt
    language   it is in the same language, and between half and twice as long
    numbers    it holds the same numbers, digits and Chinese numerals with units alike
    terms      it holds the same terms of the domain's glossary; another name of a term is the same term
    negations  it holds as many negations
    names      it names no person, organisation or number of a kind that the prompt does not name
    answer     it does not give the answer away
    order      under the base, no answer of others (up to 7) is likelier than the record's own that was not before

and each refusal is counted by the first of these reasons. The published evidence for such paraphrases is thin beyond a
handful of records for each label (Cegin et al., 2024, arXiv 2408.16502; Piedboeuf and Langlais, 2024, arXiv
2402.14895), and a small base mostly copies or wanders off: expect that most are refused.

Limits: the same machine, base and records give the same text; another device may round otherwise.
"""

from __future__ import annotations

import difflib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from metier.data.augment import with_texts
from metier.data.balance import shuffled
from metier.data.deidentify.detect import SURE, detect
from metier.data.records import Message, Record, language_of
from metier.data.terms import find_terms
from metier.domains import Domain
from metier.recipe import Recipe

MAX_CHARS = 600
OTHERS = 7
COPY = 0.95
REASONS = ("copy", "language", "numbers", "terms", "negations", "names", "answer", "order")
_ASK = {
    "en": "Rewrite this text in other words. Keep its meaning, every number, name and technical term. "
    "Write only the new text.\n\n{prompt}",
    "zh": "请用不同的说法改写下面的文字，保持原意，保留所有数字、名称和术语。只写改写后的文字。\n\n{prompt}",
}
_EXAMPLE = {
    "en": (
        "Why was I not allowed to pay 20 euros with my card yesterday?",
        "What is the reason that a payment of 20 euros with my card was not possible yesterday?",
    ),
    "zh": ("为什么我昨天不能用卡支付20欧元？", "我昨天用卡付20欧元时付不了，是什么原因？"),
}
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|neither|nor|without|cannot|nothing|unless|except)\b|n't\b|[不没無无未非否勿]", re.I
)
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
_NUMERAL = re.compile(r"[一二三四五六七八九十百千万亿两]+(?=元|万|亿|年|月|日|天|周|岁|个|成|倍|次)")
_CHOICES = re.compile(r"^[ \t]*[(（]?B[)）]?[ \t]*[.．:：、)）]", re.M)
_LEAD_IN = re.compile(r"^[^\n]{0,80}[:：]\s*\n+")


class Model(Protocol):
    """What is asked: `metier.model.specialist.Specialist`."""

    def generate(self, prompts: Sequence[Any], **options: Any) -> list[str]: ...

    def count_tokens(self, text: str) -> int: ...

    def score(self, prompts: Sequence[Any], answers: Sequence[str]) -> list[float]: ...


@dataclass
class Paraphrases:
    """`messages` by id of the record that they were made of; `refused` counts by reason."""

    asked: int = 0
    messages: dict[int, list[Message]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        """For the manifest."""
        refused = {reason: self.refused[reason] for reason in REASONS if self.refused[reason]}
        return {"asked": self.asked, "kept": len(self.messages), "refused": refused}


def base_key(recipe: Recipe) -> dict[str, str]:
    """The base's digest for the data set's key, where the data set depends on it."""
    if "paraphrase" not in recipe.augment.methods:
        return {}
    from metier.model.resolve import base_digest, resolve_base

    return {"base": base_digest(resolve_base(recipe.base, recipe.revision, progress=lambda text: None))}


def ask_base(
    train: list[Record], recipe: Recipe, domain: Domain | None, progress: Callable[[str], None]
) -> Paraphrases:
    """The paraphrases that the recipe asks for, by its base; the records are chosen by the seed."""
    if "paraphrase" not in recipe.augment.methods:
        return Paraphrases()
    from metier.model.device import resolve_device, resolve_precision
    from metier.model.load import load_base
    from metier.model.specialist import Specialist

    chosen = [record for record in shuffled(train, recipe.seed) if can_be_asked(record)][: recipe.augment.paraphrases]
    device = resolve_device("auto")
    dtype = resolve_precision("auto", device)
    model = Specialist(load_base(recipe.base, revision=recipe.revision, dtype=dtype, device=device, progress=progress))
    return paraphrase(chosen, model, domain, seed=recipe.seed, progress=progress)


def can_be_asked(record: Record) -> bool:
    """Whether the base is asked for this one: a short prompt in Chinese or English without choices."""
    is_plain = record.messages[0]["role"] != "text" and not _CHOICES.search(record.prompt)
    return is_plain and len(record.prompt) <= MAX_CHARS and language_of(record.messages) != "other"


def paraphrase(
    records: list[Record], model: Model, domain: Domain | None, *, seed: int, progress: Callable[[str], None]
) -> Paraphrases:
    """What the base makes of these training records."""
    found = Paraphrases(asked=len(records))
    progress(f"asking the base to rewrite {len(records):,} prompts")
    longest = max((model.count_tokens(record.prompt) for record in records), default=0)
    texts = model.generate(
        [_request(record) for record in records],
        max_new_tokens=3 * longest // 2 + 8,
        temperature=0.7,
        top_p=0.9,
        seed=seed,
    )
    near: list[tuple[Record, list[Message]]] = []
    for record, raw in zip(records, texts, strict=True):
        text = _LEAD_IN.sub("", raw.strip()).strip().strip('"“”')
        reason = why_unfaithful(record.prompt, text, record.answer, domain)
        if reason:
            found.refused[reason] += 1
        else:
            near.append((record, with_texts(record, text, record.answer)))
    answers = sorted({record.answer for record in records})
    for record, messages in near:
        others = random.Random(f"{seed}|{record.row.number}").sample(answers, min(OTHERS, len(answers)))
        choices = [record.answer, *(answer for answer in others if answer != record.answer)]
        if _likelier(model, messages[:-1], choices) <= _likelier(model, record.messages[:-1], choices):
            found.messages[id(record)] = messages
        else:
            found.refused["order"] += 1
    progress(f"{len(found.messages):,} of {found.asked:,} paraphrases are faithful; refused: {_counts(found.refused)}")
    return found


def why_unfaithful(prompt: str, text: str, answer: str, domain: Domain | None) -> str | None:
    """The reason of REASONS why `text` cannot stand for `prompt`, or None; all but the model's own opinion."""
    if difflib.SequenceMatcher(None, _plain(prompt), _plain(text), autojunk=False).ratio() >= COPY:
        return "copy"
    languages = {language_of([{"role": "user", "content": part}]) for part in (prompt, text)}
    if len(languages) > 1 or not 0.5 <= len(text) / len(prompt) <= 2:
        return "language"
    if _numbers(prompt) != _numbers(text):
        return "numbers"
    if domain and _terms(domain, prompt) != _terms(domain, text):
        return "terms"
    if len(_NEGATION.findall(prompt)) != len(_NEGATION.findall(text)):
        return "negations"
    if any(s.score >= SURE and text[s.start : s.end] not in prompt for s in detect(text)):
        return "names"
    if _plain(answer) in _plain(text) and _plain(answer) not in _plain(prompt):
        return "answer"
    return None


def _request(record: Record) -> list[Message]:
    language = "zh" if language_of(record.messages) == "zh" else "en"
    shown, rewritten = _EXAMPLE[language]
    return [
        {"role": "user", "content": _ASK[language].format(prompt=shown)},
        {"role": "assistant", "content": rewritten},
        {"role": "user", "content": _ASK[language].replace("{prompt}", record.prompt)},
    ]


def _likelier(model: Model, prompt: list[Message], choices: list[str]) -> set[str]:
    """The choices that the model finds likelier than the first one."""
    scores = model.score([prompt] * len(choices), choices)
    return {choice for choice, score in zip(choices, scores, strict=True) if score > scores[0]}


def _terms(domain: Domain, text: str) -> set[int]:
    names = {span.name for span in find_terms(domain, [text])[0]}
    return {i for i, term in enumerate(domain.terms) if not names.isdisjoint((*term.en, *term.zh))}


def _numbers(text: str) -> Counter[str]:
    text = unicodedata.normalize("NFKC", text).replace(",", "")
    return Counter(_DIGITS.findall(text) + _NUMERAL.findall(text))


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {counts[reason]}" for reason in REASONS if counts[reason]) or "none"
