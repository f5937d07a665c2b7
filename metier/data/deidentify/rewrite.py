"""Texts -> the same texts without identifiers: detect, then replace, by one policy.

    metier.deidentify(["患者王小明,电话13800138000"], policy="pipl")
    -> [("患者[PERSON],电话[PHONE_NUMBER]", [Span(2, 5, "PERSON", 0.9), Span(8, 19, "PHONE_NUMBER", 0.9)])]

Limits: rules find what has a form, a cue or a place in a list; what remains is measured (residual.py), not promised.
The output is de-identified or pseudonymised, no more than that: whoever knows the people may still recognise them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from metier.data.deidentify import surrogates
from metier.data.deidentify.detect import detect_together
from metier.data.deidentify.operators import Context, full_names, replace
from metier.data.deidentify.policy import Policy, load_policy
from metier.data.deidentify.spans import Span, fold
from metier.errors import RecipeError
from metier.keys import load_key

LANGUAGES = ("auto", "zh", "en")
ROUNDS = 4


def deidentify(
    texts: Sequence[str], policy: str = "hipaa-safe-harbor", language: str = "auto"
) -> list[tuple[str, list[Span]]]:
    """Each text without the identifiers that `policy` names, and the spans (in the input) that were replaced.

    `policy` is hipaa-safe-harbor, gdpr-pseudonymised, pipl, `none` (finds nothing, changes nothing) or the path of a
    YAML file; `language` is zh, en or auto. Offsets count code points of the input. Raises `RecipeError` for another
    policy or language, `RunError` where a policy needs the key and it cannot be read.
    """
    if isinstance(texts, str):
        raise RecipeError("deidentify takes a list of texts, not one text", hint='deidentify(["..."])')
    if language not in LANGUAGES:
        raise RecipeError(f"deidentify: language is `{language}`; there is {', '.join(LANGUAGES)}")
    if policy == "none":
        return [(text, []) for text in texts]
    loaded = load_policy(policy)
    key = load_key() if loaded.needs_key else b""
    return [rewrite([text], loaded, key=key, language=language)[0] for text in texts]


def rewrite(
    texts: Sequence[str],
    policy: Policy,
    *,
    key: bytes = b"",
    subject: str = "",
    language: str = "auto",
    more: Sequence[str] = (),
) -> list[tuple[str, list[Span]]]:
    """The texts of one record together: a name found in one is found in all, dates shift by one number of days.

    What is written is looked at again, and what is found then is taken out too, so that a second pass over the result
    changes nothing; only dates that were shifted would be shifted again.
    """
    found = _look(texts, policy, key, language, more)
    for _ in range(ROUNDS):
        context = Context(key, subject, full_names(_names(texts, found)))
        written = [replace(text, spans, policy, context) for text, spans in zip(texts, found, strict=True)]
        if not any(found):
            break
        again = _look([text for text, _ in written], policy, key, language, more)
        again = [[s for s in spans if policy.operators[s.entity_type] != "date_shift"] for spans in again]
        if not any(again):
            break
        found = [_joined(*three) for three in zip(found, (places for _, places in written), again, strict=True)]
    return [(text, spans) for (text, _), spans in zip(written, found, strict=True)]


def _look(texts: Sequence[str], policy: Policy, key: bytes, language: str, more: Sequence[str]) -> list[list[Span]]:
    """The spans that the policy does something about, without those that touch a stand-in of an earlier pass."""
    found = []
    for text, spans in zip(texts, detect_together(texts, language, more), strict=True):
        spans = [span for span in spans if _counts(text, span, policy, key)]
        found.append(_without_own(text, spans, key) if policy.needs_key else spans)
    return found


def _names(texts: Sequence[str], found: list[list[Span]]) -> Iterator[str]:
    for text, spans in zip(texts, found, strict=True):
        yield from (text[span.start : span.end] for span in spans if span.entity_type == "PERSON")


def _joined(spans: list[Span], places: list[tuple[int, int]], again: list[Span]) -> list[Span]:
    """The spans of the input, with those that a look at the output found; `places` are where stand-ins were written."""
    joined = list(spans)
    for new in again:
        start, end = _in_input(new.start, spans, places, at_end=False), _in_input(new.end, spans, places, at_end=True)
        touched = [s for s in joined if s.start < end and start < s.end]
        start, end = min([start, *(s.start for s in touched)]), max([end, *(s.end for s in touched)])
        joined = [s for s in joined if s not in touched] + [Span(start, end, new.entity_type, new.score)]
    return sorted(joined)


def _in_input(place: int, spans: list[Span], places: list[tuple[int, int]], *, at_end: bool) -> int:
    """The place in the input of a place in the output; inside a stand-in, that of its span's start or end."""
    moved = 0
    for span, (start, end) in zip(spans, places, strict=True):
        if place > end or (place == end and not at_end):
            moved = span.end - end
        elif start < place or (place == start and not at_end):
            return span.end if at_end else span.start
        else:
            break
    return place + moved


def _counts(text: str, span: Span, policy: Policy, key: bytes) -> bool:
    """Whether the policy does anything about this span."""
    operator = policy.operators.get(span.entity_type, "keep")
    if operator == "keep":
        return False
    value = fold(text[span.start : span.end])[0]
    if span.entity_type == "AGE":
        return not value.isdigit() or int(value) >= policy.age_from
    return not (operator == "surrogate" and surrogates.is_number(value, key))


def _without_own(text: str, spans: list[Span], key: bytes) -> list[Span]:
    """Spans without those that touch a stand-in of an earlier pass."""
    own = surrogates.own_names(text, key)
    return [span for span in spans if not any(start < span.end and span.start < end for start, end in own)]
