"""Texts -> the same texts without identifiers: detect, then replace, by one policy.

    metier.deidentify(["患者王小明,电话13800138000"], policy="pipl")
    -> [("患者[PERSON],电话[PHONE_NUMBER]", [Span(2, 5, "PERSON", 0.9), Span(8, 19, "PHONE_NUMBER", 0.9)])]

Limits: rules find what has a form, a cue or a place in a list; what remains is measured (residual.py), not promised.
The output is de-identified or pseudonymised, no more than that: whoever knows the people may still recognise them.
"""

from __future__ import annotations

from collections.abc import Sequence

from metier.data.deidentify import surrogates
from metier.data.deidentify.detect import detect_together
from metier.data.deidentify.operators import Context, full_names, replace
from metier.data.deidentify.policy import Policy, load_policy
from metier.data.deidentify.spans import Span, fold
from metier.errors import RecipeError
from metier.keys import load_key

LANGUAGES = ("auto", "zh", "en")


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
    """The texts of one record together: a name found in one is found in all, dates shift by one number of days."""
    found = [
        [span for span in spans if _counts(text, span, policy, key)]
        for text, spans in zip(texts, detect_together(texts, language, more), strict=True)
    ]
    found = [
        _without_own(text, spans, key) if policy.needs_key else spans for text, spans in zip(texts, found, strict=True)
    ]
    values = (
        t[s.start : s.end] for t, spans in zip(texts, found, strict=True) for s in spans if s.entity_type == "PERSON"
    )
    context = Context(key, subject, full_names(values))
    return [(replace(text, spans, policy, context), spans) for text, spans in zip(texts, found, strict=True)]


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
