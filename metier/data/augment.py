"""Training records -> variants of them whose answer is still right; each keeps the record it was made of as parent.

But for `entities`, only the first user message changes, never the answer but for the letters of shuffled choices. Which
method a record gets, and what is drawn, follows from the seed and the record's place alone.

    instruction  another of the domain's wordings around the prompt
    options      the choices A, B, C, ... in another order, the answer's letter following
    terms        one of the domain's terms under another name of the same language
    units        a quantity in another unit (8.4 % HbA1c is 68 mmol/mol)
    typo         2 % of the letters, two neighbours exchanged inside of long lower-case words
    width        punctuation in the other width, in Chinese text
    entities     other people, organisations, dates and amounts, in all of the record (entities.py)
    paraphrase   what the base makes of the prompt, where that is faithful (paraphrase.py)

Limits, on purpose: no method touches negations or, but for `units` and `entities`, numbers. A term or a quantity that
the answer holds too is left alone, since the question may be about it. Where no method applies, there is no variant.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Mapping, Sequence

from metier.data.entities import swap_entities
from metier.data.partitions import Workers, parts
from metier.data.records import Message, Record, language_of
from metier.data.terms import Span, find_terms, whole_word
from metier.domains import Domain, Unit
from metier.recipe import AugmentConfig

Variant = tuple[str, int, list[Message]]  # the method, the number among the record's variants, the messages

TYPO_SHARE = 0.02
_CHOICE = re.compile(r"^[ \t]*[(（]?([A-H])[)）]?[ \t]*[.．:：、)）][ \t]*(.+?)[ \t]*$", re.M)
_ORDERED = re.compile(r"above|below|以上|上述|both|[A-H] (?:and|or) [A-H]|[A-H][和与或][A-H]")
_ANSWER = re.compile(r"^[(（]?([A-H])[)）]?(?=$|[\s.．:：、,，)）])")
_WORD = re.compile(r"(?<![^\W_])[a-z]{6,}(?![^\W_])")
_NEGATIONS = frozenset(["without", "cannot", "neither", "nothing", "unless", "except"])
_HALF, _FULL = ",?!:;()", "，？！：；（）"
_WIDTH = str.maketrans(_HALF + _FULL, _FULL + _HALF)


@dataclasses.dataclass(frozen=True, slots=True)
class Variation:
    """What the variants of records are made by; `task` is classification where answers are labels."""

    config: AugmentConfig
    domain: Domain | None
    seed: int
    task: str


def augment(
    train: list[Record],
    variation: Variation,
    *,
    rewritten: Mapping[int, list[Message]],
    workers: Workers | None = None,
) -> list[Record]:
    """At most `config.copies` variants of each record, in the records' order.

    `rewritten` are the base model's paraphrases by id of the record: each is its record's first variant.
    """
    methods = [method for method in variation.config.methods if method != "paraphrase"]
    if not methods and not rewritten:
        return []
    asked = ([(record, rewritten.get(id(record))) for record in part] for part in parts(train))
    done = (workers or Workers()).map(variants_part, asked, variation)
    variants = (some for part in done for some in part)
    return [
        record.variant(messages, method=method, number=number)
        for record, some in zip(train, variants, strict=True)
        for method, number, messages in some
    ]


def variants_part(part: Sequence[tuple[Record, list[Message] | None]], variation: Variation) -> list[list[Variant]]:
    """(record, paraphrase) -> the variants of each record."""
    config, domain = variation.config, variation.domain
    is_needed = domain is not None and not {"terms", "typo"}.isdisjoint(config.methods)
    spans = find_terms(domain, [record.prompt for record, _ in part]) if domain and is_needed else [[] for _ in part]
    return [
        list(_variants(record, paraphrase, terms, variation))
        for (record, paraphrase), terms in zip(part, spans, strict=True)
    ]


def _variants(
    record: Record, paraphrase: list[Message] | None, terms: list[Span], variation: Variation
) -> Iterator[Variant]:
    if record.messages[0]["role"] == "text":
        return
    methods = [method for method in variation.config.methods if method != "paraphrase"]
    seed, domain, is_label = variation.seed, variation.domain, variation.task == "classification"
    seen = [record.messages]
    for number in range(1, variation.config.copies + 1):
        if number == 1 and paraphrase:
            yield "paraphrase", number, paraphrase
            continue
        rng = random.Random(f"{seed}|{record.source.name}|{record.row.number}|{number}")
        for method in rng.sample(methods, len(methods)):
            if method == "entities":
                key = f"{seed}|{record.group_id or f'{record.source.name}:{record.row.number}'}|{number}".encode()
                changed = swap_entities(record.messages, domain, is_label=is_label, key=key)
            else:
                changed = _variant(method, record, domain, terms, rng)
            if changed is not None and changed not in seen:
                seen.append(changed)
                yield method, number, changed
                break


def _variant(
    method: str, record: Record, domain: Domain | None, terms: list[Span], rng: random.Random
) -> list[Message] | None:
    """The messages as `method` changes prompt and answer, or None where it does not apply."""
    prompt, answer = record.prompt, record.answer
    language = "zh" if language_of(record.messages) == "zh" else "en"
    if method == "options":
        shuffled = shuffle_options(prompt, answer, rng)
        return None if shuffled is None else with_texts(record, *shuffled)
    text: str | None = None
    if method == "instruction" and domain:
        wordings = [w for w in domain.instructions.get(language, []) if w != "{prompt}"]  # type: ignore[call-overload]
        text = rng.choice(wordings).replace("{prompt}", prompt) if wordings else None
    elif method == "terms" and domain:
        text = swap_term(prompt, answer, domain, terms, rng)
    elif method == "units" and domain:
        text = convert_unit(prompt, answer, domain.units, rng)
    elif method == "typo":
        text = add_typos(prompt, terms, rng)
    elif method == "width" and language == "zh":
        text = prompt.translate(_WIDTH)
    return None if text is None else with_texts(record, text, answer)


def shuffle_options(prompt: str, answer: str, rng: random.Random) -> tuple[str, str] | None:
    """The choices, one a line, in another order, and the answer with its letter following; None without choices."""
    choices = list(_CHOICE.finditer(prompt))
    letters = [choice[1] for choice in choices]
    picked = _ANSWER.match(answer)
    if len(choices) < 2 or letters != [chr(65 + i) for i in range(len(choices))] or not picked:
        return None
    # "All of the above" and "A and C" depend on the order.
    if picked[1] not in letters or _ORDERED.search(prompt):
        return None
    order = rng.sample(range(len(choices)), len(choices))
    text = prompt
    for place in reversed(range(len(choices))):
        start, end = choices[place].span(2)
        text = text[:start] + choices[order[place]][2] + text[end:]
    letter = letters[order.index(letters.index(picked[1]))]
    return text, answer[: picked.start(1)] + letter + answer[picked.end(1) :]


def swap_term(prompt: str, answer: str, domain: Domain, terms: list[Span], rng: random.Random) -> str | None:
    """The prompt with one term under another name; None where no term has one, or it holds it or the answer does."""
    found = []
    for span in terms:
        for term in domain.terms:
            for names in (term.en, term.zh):
                others = [name for name in names if name != span.name]
                is_asked = any(whole_word(name).search(answer) for name in (*term.en, *term.zh))
                is_there = any(whole_word(name).search(prompt) for name in others)
                if span.name in names and others and not is_asked and not is_there:
                    found.append((span, others))
    if not found:
        return None
    span, others = rng.choice(found)
    return prompt[: span.start] + rng.choice(others) + prompt[span.end :]


def convert_unit(prompt: str, answer: str, units: list[Unit], rng: random.Random) -> str | None:
    """The prompt with one quantity in another unit; None where there is none, or the answer holds the number."""
    found = []
    for unit in units:
        names = "|".join(re.escape(name) for name in sorted(unit.after, key=len, reverse=True))
        pattern = rf"(?i:{names})[^\d\n]{{0,12}}?((?<![\d.])\d+(?:\.\d+)?)\s*{re.escape(unit.source)}(?![A-Za-z/])"
        for match in re.finditer(pattern, prompt):
            if match[1] not in answer and unit.target not in answer:
                found.append((match, unit))
    if not found:
        return None
    match, unit = rng.choice(found)
    value = round(float(match[1]) * unit.factor + unit.offset, unit.digits)
    written = f"{value:.{unit.digits}f}" if unit.digits else f"{value:.0f}"
    gap = " " if prompt[match.end(1)] == " " else ""
    return prompt[: match.start(1)] + written + gap + unit.target + prompt[match.end() :]


def add_typos(prompt: str, terms: list[Span], rng: random.Random) -> str | None:
    """The prompt with neighbouring letters exchanged, never in terms or negations; None without a long word."""
    words = [
        match.start()
        for match in _WORD.finditer(prompt)
        if match[0] not in _NEGATIONS
        and not any(span.start < match.end() and match.start() < span.end for span in terms)
    ]
    if not words:
        return None
    letters = list(prompt)
    for start in rng.sample(words, min(len(words), max(1, round(TYPO_SHARE * len(prompt) / 2)))):
        place = start + rng.randrange(1, 4)
        letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def with_texts(record: Record, prompt: str, answer: str) -> list[Message]:
    """The record's messages with another first user message and another last answer."""
    messages = [dict(message) for message in record.messages]
    next(m for m in messages if m["role"] == "user")["content"] = prompt
    messages[-1]["content"] = answer
    return messages
