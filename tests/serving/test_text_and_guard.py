"""Tries to let something through: half characters, parts of a stop string, personal data cut in two, disguises."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.domains import known_domains, load_domain
from metier.model.chat import Renderer
from metier.recipe import ServeConfig
from metier.serving.guard import Acts, Guard, Redactor
from metier.serving.sampling import Sampling, SamplingState, logprobs_of, next_tokens
from metier.serving.text import StopStrings, TextStream, TokenTexts
from tests.model.tiny import tiny_tokenizer
from tests.serving.conftest import PACK

TEXT = "该公司 的 revenue 增长 12 % 🙂 naïve\n\n完 "


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3"])
def test_a_stream_gives_whole_characters_and_the_whole_text(template: Any) -> None:
    renderer = Renderer(tiny_tokenizer(template))
    ids = renderer.encode(TEXT)
    stream = TextStream(renderer)
    pieces = [*map(stream.push, ids), stream.end()]
    assert "".join(pieces) == renderer.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(map(len, pieces)) < len(TEXT) / 2


def test_an_answer_that_ends_within_a_character_is_shown_as_far_as_it_goes() -> None:
    renderer = Renderer(tiny_tokenizer("chatml"))
    ids = renderer.encode("a🙂")[:-1]
    stream = TextStream(renderer)
    assert "".join([*map(stream.push, ids), stream.end()]) == renderer.decode(ids)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_string_ends_the_text_however_it_is_cut(size: int) -> None:
    text = "one\n\ntwo STOP three"
    stops = StopStrings(["STOP", "three"])
    shown = "".join(stops.push(text[i : i + size]) for i in range(0, len(text), size))
    assert shown + stops.end() == "one\n\ntwo " and stops.is_hit
    unhit = StopStrings(["STOPPED"])
    assert "".join(unhit.push(c) for c in text) + unhit.end() == text and not unhit.is_hit


def test_a_tokens_text_keeps_its_space() -> None:
    tokenizer = tiny_tokenizer("llama2")
    names = TokenTexts(tokenizer)
    ids = tokenizer(" the patient", add_special_tokens=False)["input_ids"]
    assert "".join(map(names, ids)) == " the patient"
    assert names(tokenizer.eos_token_id) == "</s>"


def phone(text: str) -> tuple[str, list[str]]:
    clean, number = re.subn(r"1\d{10}", "[PHONE]", text)
    return clean, ["PHONE"] * number


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_personal_data_is_taken_out_however_the_text_comes(size: int) -> None:
    text = "Call 13812345678 now. 请拨打13912345678。" + "word " * 200 + "13712345678"
    acts = Acts()
    redactor = Redactor(phone, acts)
    shown = "".join(redactor.push(text[i : i + size]) for i in range(0, len(text), size)) + redactor.end()
    assert shown == phone(text)[0] and acts.redacted["PHONE"] == 3


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    (tmp_path / "medicine.yaml").write_text(PACK, encoding="utf-8")
    return Guard(domain=load_domain(str(tmp_path / "medicine.yaml")), redact=phone)


def test_a_red_line_is_seen_through_full_width_letters_and_capitals(guard: Guard) -> None:
    for request in ("Which POISON?", "ｐｏｉｓｏｎ", "怎么下毒"):
        assert guard.refusal(request, Acts())
    assert guard.refusal("poisonous plants", Acts()) is None


def test_each_part_can_be_switched_off(guard: Guard) -> None:
    off = Guard(ServeConfig(redact=False, notice=False, refuse=False), guard.domain, phone)
    acts = Acts()
    assert off.refusal("poison", acts) is None and off.notice("q", "a", acts) == "" and not off.redacts
    assert acts == Acts()


def test_a_notice_that_the_answer_has_is_not_said_twice(guard: Guard) -> None:
    acts = Acts()
    assert guard.notice("问", "答", acts) == "\n\n不构成医疗建议。"
    assert guard.notice("q", "Yes. No medical advice.", acts) == "" and acts.notice == "medicine"


@pytest.mark.parametrize("name", known_domains())
def test_every_domain_refuses_and_notes_in_both_languages(name: str) -> None:
    guard = Guard(domain=load_domain(name))
    for question in ("What is this?", "这是什么？"):
        assert guard.notice(question, "", Acts()) and guard.refusal(question, Acts()) is None
    assert guard.domain and set(guard.domain.refusals) == {"en", "zh"}


def test_a_long_request_is_looked_at_to_its_end_in_little_time(guard: Guard) -> None:
    slow = Guard(domain=load_domain("finance"))
    begun = time.monotonic()
    assert slow.refusal("money fake insider evade guarantee " * 3000, Acts()) is None
    assert time.monotonic() - begun < 3
    assert guard.refusal("word " * 5000 + "poison", Acts())


def draws(sampling: dict[str, Any], number: int = 2000) -> list[float]:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    state = SamplingState.of(Sampling(**sampling))
    tokens = [next_tokens(logits, [state])[0] for _ in range(number)]
    return [tokens.count(i) / number for i in range(4)]


def test_draws_follow_the_distribution_and_the_nucleus() -> None:
    want = torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(0).tolist()
    assert draws({"temperature": 1.0}) == pytest.approx(want, abs=0.04)
    half = torch.tensor([4.0, 2.0, 0.0, -2.0]).softmax(0).tolist()
    assert draws({"temperature": 0.5}) == pytest.approx(half, abs=0.04)
    nucleus = draws({"temperature": 1.0, "top_p": 0.7})
    assert nucleus[2] == nucleus[3] == 0 and nucleus[0] == pytest.approx(want[0] / (want[0] + want[1]), abs=0.04)
    assert draws({"temperature": 1.0, "top_p": 0.01}, 50)[0] == 1


def test_penalties_count_what_was_said_and_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[2.0, 1.5, 0.0]])
    state = SamplingState.of(Sampling(frequency_penalty=1.0, logit_bias={2: 1.2}))
    assert [next_tokens(logits, [state])[0] for _ in range(4)] == [0, 1, 2, 0]
    [found] = logprobs_of(logits, [2], 2)
    assert found.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 2])) and [i for i, _ in found.top] == [0, 1]
