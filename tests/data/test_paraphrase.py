"""Tries to let a rewriting through that changes a number, a term, a negation or a name, copies, or gives the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metier.data.lines import Row, Source
from metier.data.paraphrase import can_be_asked, paraphrase, why_unfaithful
from metier.data.records import Record
from metier.domains import load_domain
from metier.model.load import load_base
from metier.model.specialist import Specialist

MEDICINE = load_domain("medicine")


def record(number: int, prompt: str, answer: str) -> Record:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record(Source(Path("a.csv"), "a.csv", "csv", is_test=False), Row(number), messages, None, prompt)


@pytest.mark.parametrize(
    ("prompt", "text", "reason"),
    [
        ("I can not pay with my card.", "I can not pay, with my card!", "copy"),
        ("Why was my card refused yesterday?", "我的卡昨天为什么被拒？", "language"),
        ("Why was my card refused yesterday?", "Why?", "language"),
        ("I waited 5 days for the card", "The card took me 3 days to wait for", "numbers"),
        ("我等了三天还没有收到卡", "等待了五天之后，我没有拿到卡", "numbers"),
        ("How is atrial fibrillation treated?", "What is the treatment of a fast heart rhythm?", "terms"),
        ("The payment was not authorised by me", "It was me who authorised that payment", "negations"),
        ("我没有授权这笔付款", "这笔付款是由我授权的", "negations"),
        ("The doctor saw me about my leg today", "Today Dr. John Carter looked at my bad leg", "names"),
        ("My card has been swallowed by a machine", "A machine ate it: card_swallowed is my problem", "answer"),
        ("How is AF treated in an older patient?", "What is the treatment of atrial fibrillation in the aged?", None),
        ("I waited 1,200 days", "The days that I waited are 1200", None),
        ("糖尿病患者能不能吃水果？", "得了糖尿病，水果可不可以吃？", None),
    ],
)
def test_a_rewriting_is_refused_for_what_it_changes(prompt: str, text: str, reason: str | None) -> None:
    assert why_unfaithful(prompt, text, "card_swallowed" if reason == "answer" else "x y z", MEDICINE) == reason


def test_choices_long_texts_and_other_languages_are_not_asked_for() -> None:
    assert can_be_asked(record(1, "Why?", "a")) and not can_be_asked(record(1, "Why? " * 200, "a"))
    assert not can_be_asked(record(1, "Which?\nA. x\nB. y", "A")) and not can_be_asked(record(1, "Почему?", "a"))


class Scripted:
    """Writes what it is given, and finds an answer the likelier the more of its letters stand in the prompt."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def generate(self, prompts: object, **options: object) -> list[str]:
        return self.texts

    def count_tokens(self, text: str) -> int:
        return len(text)

    def score(self, prompts: list[list[dict[str, str]]], answers: list[str]) -> list[float]:
        return [
            float(sum(word in prompt[-1]["content"] for word in answer.split("_")))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def test_an_answer_that_another_overtakes_is_refused_and_all_is_counted() -> None:
    records = [
        record(1, "My card is not here yet, it is late", "card_late"),
        record(2, "Where is the refund of my money?", "refund_money"),
        record(3, "My card is lost since yesterday", "card_lost"),
    ]
    texts = ["It is not arrived: refund", "Of my money, where has the refund gone?", "My card is lost since yesterday."]
    found = paraphrase(records, Scripted(texts), None, seed=0, progress=lambda text: None)  # type: ignore[arg-type]
    assert found.report() == {"asked": 3, "kept": 1, "refused": {"copy": 1, "order": 1}}
    assert found.messages[id(records[1])][0]["content"] == texts[1]


def test_the_real_base_is_asked_and_what_it_writes_is_counted(smollm2: Path) -> None:
    model = Specialist(load_base(smollm2, dtype=torch.float32, device=torch.device("cpu")))
    prompts = [
        "Why was my card payment declined?",
        "How do I change my PIN?",
        "我的银行卡丢了怎么办？",
    ]
    records = [record(i, prompt, label) for i, (prompt, label) in enumerate(zip(prompts, "abc", strict=True))]
    found = paraphrase(records, model, load_domain("finance"), seed=0, progress=lambda text: None)
    report = found.report()
    assert report["asked"] == 3 == report["kept"] + sum(report["refused"].values())
    for one in records:
        if id(one) in found.messages:
            text = found.messages[id(one)][0]["content"]
            assert why_unfaithful(one.prompt, text, one.answer, load_domain("finance")) is None
