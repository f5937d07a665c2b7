"""Tries to get Presidio's finds through with types that no policy knows, and a missing model past the recipe."""

from __future__ import annotations

import pytest

from metier.data.deidentify.detect import detect
from metier.data.deidentify.models import check_recognizers
from metier.data.deidentify.policy import TYPES
from metier.errors import RecipeError

TEXT = "DEA BB1388568, wallet 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ, ask Ａnna on 3/4/2021; HbA1c 7.2 %, Crohn's disease."


def test_an_unknown_recognizer_is_named_with_its_neighbour() -> None:
    with pytest.raises(RecipeError, match="presido.*did you mean `presidio`"):
        check_recognizers(["presido"])


def test_presidio_finds_beside_the_rules_what_they_do_not_know() -> None:
    pytest.importorskip("presidio_analyzer")
    wallet = TEXT.index("16Y")
    assert not any(s.start == wallet for s in detect(TEXT))
    spans = detect(TEXT, more=["presidio"])
    found = {TEXT[s.start : s.end]: s.entity_type for s in spans}
    assert found["16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ"] == "UNIQUE_ID" and found["BB1388568"] == "LICENSE"
    assert {s.entity_type for s in spans} <= set(TYPES)
    assert not any("HbA1c" in value or "Crohn" in value for value in found)


def test_a_spacy_model_that_is_not_installed_is_a_sentence() -> None:
    pytest.importorskip("presidio_analyzer")
    with pytest.raises(RecipeError, match="no installed spaCy model `en_core_web_none`"):
        check_recognizers(["presidio:en_core_web_none"])
