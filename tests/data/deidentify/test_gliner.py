"""Tries to get a GLiNER model's spans with wrong offsets, and a folder without weights past the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.data.deidentify import gliner as adapter
from metier.data.deidentify.models import check_recognizers
from metier.data.deidentify.policy import TYPES
from metier.errors import RecipeError

pytest.importorskip("gliner")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GLiNER with random weights, saved by the package itself."""
    import torch
    from gliner import GLiNER, GLiNERConfig
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    encoder, out = tmp_path_factory.mktemp("encoder"), tmp_path_factory.mktemp("gliner")
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(encoder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 1024,
    }
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(encoder)
    config = GLiNERConfig(model_name=str(encoder), hidden_size=32, max_width=4, span_mode="markerV0", dropout=0.0)
    GLiNER.from_config(config).save_pretrained(str(out), safe_serialization=True)
    return out


def test_spans_of_all_windows_are_words_of_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "THRESHOLD", 0.3)  # random weights are sure of nothing
    text = " ".join(f"Word{i} met Anna{i} in Town{i}." for i in range(60))
    spans = adapter.find_gliner(text, str(folder))
    assert spans and max(s.end for s in spans) > len(text) - 40  # behind the first window
    assert {s.entity_type for s in spans} <= set(TYPES)
    edges = {0, len(text)}
    for span in spans:
        assert 0 <= span.start < span.end <= len(text)
        assert span.start in edges or not text[span.start - 1].isalnum() or not text[span.start].isalnum()
        assert 0.3 <= span.score <= 1


def test_a_folder_without_weights_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gliner_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"has no model\.safetensors"):
        check_recognizers([f"gliner:{tmp_path}"])
    with pytest.raises(RecipeError, match="has no gliner_config.json"):
        check_recognizers(["gliner"])
