"""Microsoft Presidio's analyzer -> spans in Latin script: a further recognizer beside the rules.

`presidio` runs its pattern recognizers alone, `presidio:MODEL` also the named entities of an installed spaCy model,
such as en_core_web_sm; a model is never downloaded. Its email recognizer, which asks the net for a list of domains, is
left out: the rules find addresses. Limits: English recognizers only, some 120 texts a CPU-second with a model.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

from metier.data.deidentify.spans import Span
from metier.errors import RecipeError

_TYPES = {
    "DATE_TIME": "DATE", "US_BANK_NUMBER": "BANK_ACCOUNT", "ABA_ROUTING_NUMBER": "BANK_ACCOUNT",
    "UK_NHS": "HEALTH_PLAN", "US_MBI": "HEALTH_PLAN", "MAC_ADDRESS": "DEVICE", "US_NPI": "LICENSE",
}  # fmt: skip
_SAME = {
    "PERSON", "LOCATION", "ORGANIZATION", "NRP", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "EMAIL_ADDRESS", "URL",
    "PHONE_NUMBER", "US_SSN", "AGE",
}  # fmt: skip
# A part of the name of any other type -> ours.
_PARTS = {"PASSPORT": "PASSPORT", "LICENSE": "LICENSE", "LICENCE": "LICENSE", "DRIVER": "LICENSE", "VEHICLE": "VEHICLE"}


def check_presidio(model: str) -> None:
    """Raises `RecipeError` where the package or the spaCy model is not installed."""
    if importlib.util.find_spec("presidio_analyzer") is None:
        raise RecipeError(
            "privacy.recognizers: `presidio` needs a package that is not installed",
            hint="pip install 'metier[presidio]'",
        )
    if model and importlib.util.find_spec(model) is None:
        raise RecipeError(
            f"privacy.recognizers: there is no installed spaCy model `{model}`",
            hint="install its package, or write `presidio` for the patterns alone",
        )


def find_presidio(text: str, model: str = "") -> list[Span]:
    """What Presidio's English recognizers find in folded `text`, with its own scores."""
    found = []
    for result in _engine(model).analyze(text=text, language="en", score_threshold=0.5):
        recognizer = (result.recognition_metadata or {}).get("recognizer_name", "")
        kind = _type_of(result.entity_type)
        if kind == "DATE" and not recognizer.startswith("Date"):
            kind = "TIME"  # a model's `two weeks` and `today` are no dates
        found.append(Span(result.start, result.end, kind, float(result.score)))
    return sorted(found)


def _type_of(entity_type: str) -> str:
    if entity_type in _SAME:
        return entity_type
    part = next((ours for part, ours in _PARTS.items() if part in entity_type), "UNIQUE_ID")
    return _TYPES.get(entity_type, part)


@cache
def _engine(model: str) -> Any:
    check_presidio(model)
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    engine: Any = SpacyNlpEngine()
    engine.nlp = {"en": spacy.load(model) if model else spacy.blank("en")}  # there already: none is downloaded
    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"], nlp_engine=engine)
    registry.remove_recognizer("EmailRecognizer")
    return AnalyzerEngine(nlp_engine=engine, registry=registry, supported_languages=["en"])
