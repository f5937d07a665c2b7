"""A GLiNER model's weights -> spans: a further recognizer beside the rules, for whichever languages the model knows.

`gliner:FOLDER` names a folder with gliner_config.json, model.safetensors and the tokenizer (Zaratiana et al. 2023,
arXiv 2311.08526); nothing is downloaded. Texts are read in overlapping windows, so that none is cut at the model's
length. Limits: a model whose words are split at spaces does not see Chinese names inside a sentence.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from metier.data.deidentify.spans import Span
from metier.errors import RecipeError

THRESHOLD = 0.5
WINDOW = 400  # characters; the encoders take 512 tokens, and the labels are among them
OVERLAP = 80
# What the model is asked for -> the type.
LABELS = {
    "person": "PERSON", "organization": "ORGANIZATION", "city": "LOCATION", "street address": "ADDRESS",
    "date of birth": "DATE", "phone number": "PHONE_NUMBER", "email address": "EMAIL_ADDRESS",
    "username": "SOCIAL_ACCOUNT", "identity document number": "UNIQUE_ID", "bank account number": "BANK_ACCOUNT",
    "credit card number": "CREDIT_CARD", "medical record number": "MEDICAL_RECORD",
    "health insurance number": "HEALTH_PLAN", "license plate": "VEHICLE",
}  # fmt: skip


def check_gliner(folder: str) -> None:
    """Raises `RecipeError` where the package or the weights are not there."""
    if importlib.util.find_spec("gliner") is None:
        raise RecipeError(
            "privacy.recognizers: `gliner` needs a package that is not installed",
            hint="pip install 'metier[gliner]'; pip install --no-deps gliner",
        )
    missing = [name for name in ("gliner_config.json", "model.safetensors") if not (Path(folder) / name).is_file()]
    if not folder or missing:
        raise RecipeError(
            f"privacy.recognizers: `gliner:{folder}` has no {' and no '.join(missing) or 'folder'}",
            hint="name the folder of a downloaded model, gliner:models/gliner-pii; of one with pytorch_model.bin alone "
            "GLiNER.from_pretrained(F).save_pretrained(F, safe_serialization=True) writes the safe form",
        )


def find_gliner(text: str, folder: str) -> list[Span]:
    """What the model finds in folded `text`, with its probabilities; of a span that two windows saw, the higher one."""
    model = _model(folder)
    found: dict[tuple[int, int, str], float] = {}
    for at in range(0, max(len(text) - OVERLAP, 1), WINDOW - OVERLAP):
        start = _word_start(text, at)
        for entity in model.predict_entities(text[start : at + WINDOW], list(LABELS), threshold=THRESHOLD):
            place = (start + entity["start"], start + entity["end"], LABELS[entity["label"]])
            found[place] = max(found.get(place, 0.0), float(entity["score"]))
    return sorted(Span(start, end, kind, score) for (start, end, kind), score in found.items())


def _word_start(text: str, at: int) -> int:
    """`at`, or the start of the Latin word that it would cut."""
    while at > 0 and text[at : at + 1].isalnum() and text[at - 1].isalnum() and text[at - 1].isascii():
        at -= 1
    return at


@cache
def _model(folder: str) -> Any:
    check_gliner(folder)
    from gliner import GLiNER

    try:
        model = GLiNER.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = f"`gliner:{folder}` cannot be loaded: {type(error).__name__}"
        raise RecipeError(
            f"privacy.recognizers: {reason}", hint="is the model complete, with its tokenizer?"
        ) from error
    return model.eval()
