"""Tries to get a model's wrong words through, and to leave a part of what it found in the open."""

from __future__ import annotations

from metier.data.deidentify.models import plausible
from metier.data.deidentify.spans import Span, whole_words


def _kept(text: str, *words: tuple[str, str, float]) -> list[str]:
    """What is left of words that a model found: (word, type, probability)."""
    spans = [Span(text.index(word), text.index(word) + len(word), kind, share) for word, kind, share in words]
    return [text[s.start : s.end] for s in plausible(text, spans)]


def test_an_address_takes_its_number_and_province_along() -> None:
    text = "Bring it to 10/03, Balan Ganj 7, Laiano (BN), please."
    assert _kept(text, ("Balan", "ADDRESS", 0.9), ("Ganj", "ADDRESS", 0.4)) == ["10/03, Balan Ganj 7, Laiano (BN)"]


def test_a_name_is_joined_over_initials_and_particles() -> None:
    assert _kept("for Graciano M. De Backer", ("Graciano", "PERSON", 0.9), ("Backer", "PERSON", 0.3)) == [
        "Graciano M. De Backer"
    ]


def test_lower_case_words_among_capitals_need_more_than_rare_ones() -> None:
    text = "Signs of dyspnea. Ask zorvik."
    assert _kept(text, ("dyspnea", "PERSON", 0.9), ("zorvik", "PERSON", 0.75)) == ["zorvik"]


def test_a_number_alone_is_no_part_of_an_address() -> None:
    assert _kept("shoes in size 44?", ("44", "ADDRESS", 0.95)) == []
    assert _kept("the gate at house 44", ("44", "ADDRESS", 0.95)) == ["44"]


def test_a_country_is_no_name_and_a_hyphened_name_is_whole() -> None:
    assert _kept("He moved to Austria.", ("Austria", "LOCATION", 1.0)) == []
    assert whole_words("by Flores-Kidd.", 3, 6) == (3, 14)


def test_levels_labels_and_numbers_without_digits_are_no_addresses_or_identifiers() -> None:
    assert _kept("Lesion of the cord level 3", ("level", "ADDRESS", 0.9), ("3", "ADDRESS", 0.9)) == []
    assert _kept("Calculous Pyelonephritis", ("Pyelonephritis", "LICENSE", 0.9)) == []
    assert _kept("NAME Michael Wang", ("NAME", "ADDRESS", 0.9), ("Michael", "PERSON", 0.9)) == ["Michael"]
