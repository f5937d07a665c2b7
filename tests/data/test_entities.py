"""Tries to make a surrogate change a label, a fact, a term, an interval or an order, or to name one person twice."""

from __future__ import annotations

import re

import pytest

from metier.data.entities import swap_entities
from metier.domains import load_domain

FINANCE = load_domain("finance")


def swapped(prompt: str, answer: str, *, is_label: bool = True, key: bytes = b"k") -> tuple[str, str] | None:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    new = swap_entities(messages, FINANCE, is_label=is_label, key=key)
    assert messages[0]["content"] == prompt
    return None if new is None else (new[0]["content"], new[1]["content"])


def test_one_person_has_one_stand_in_in_prompt_and_answer() -> None:
    new = swapped("患者李娜就诊于北京市第一人民医院，李女士主诉头痛。", "请李娜复查。", is_label=False)
    assert new is not None
    name = re.match("患者(.{3})就诊于.{2}医院，(.)女士主诉头痛。", new[0])
    assert name and name[1] != "李娜" and name[2] == name[1][0] and new[1] == f"请{name[1]}复查。"
    english = swapped("John Carter called Acme Widgets Ltd; Carter was angry.", "complaint")
    assert english is not None
    first, last = english[0].split()[:2]
    assert english[0] == f"{first} {last} called {english[0].split()[3]} Ltd; {last} was angry." and last != "Carter"


def test_another_key_gives_another_person_and_the_same_key_the_same() -> None:
    made = {swapped("客户王小明来电投诉", "投诉", key=bytes([i])) for i in range(9)}
    assert len(made) > 6
    assert swapped("客户王小明来电投诉", "投诉") == swapped("客户王小明来电投诉", "投诉")


def test_dates_move_together_by_whole_weeks() -> None:
    import datetime

    for key in range(20):
        new = swapped("Booked on 2024-03-04, paid on 12 March 2024, 合同日期2024年2月28日", "late", key=bytes([key]))
        assert new is not None
        first = datetime.date.fromisoformat(new[0][10:20])
        second = datetime.datetime.strptime(new[0].split("paid on ")[1].split(",")[0], "%d %B %Y").date()
        year, month, day = map(int, re.findall(r"(\d+)年(\d+)月(\d+)日", new[0])[0])
        assert (second - first).days == 8 and (first - datetime.date(year, month, day)).days == 5
        assert first.weekday() == 0 and first != datetime.date(2024, 3, 4)


def test_amounts_keep_their_order_size_and_form() -> None:
    for key in range(20):
        new = swapped("paid $1,250.00, then $1,310.50 and 5000元; 1250 again", "refund", key=bytes([key]))
        assert new is not None
        a, b, c, d = re.findall(r"[\d,.]*\d", new[0])
        assert c == "5000" and a.replace(",", "") == f"{d}.00" and a != "1,250.00"
        assert re.fullmatch(r"1,\d{2}0\.00", a) and re.fullmatch(r"1,\d{2}0\.\d0", b)
        assert float(a.replace(",", "")) < float(b.replace(",", ""))


@pytest.mark.parametrize(
    ("prompt", "answer", "is_label"),
    [
        ("Who founded Acme Widgets Ltd?", "John Carter", False),  # a fact about the world
        ("How much interest is due on $1,250 after 2024-03-04?", "It is $37.50.", False),  # computed
        ("贷款12,350元，期限从2024年3月1日起", "三个月", False),
        ("The P/E of the bank, please", "ratio", True),
        ("[PERSON] owes [PERSON] money", "debt", True),  # one person or two
        ("a fee of 3% on 12 items in 2024", "fee", True),
        ("John Carter", "John Carter", True),  # the label itself
    ],
)
def test_what_could_make_the_answer_wrong_is_left_alone(prompt: str, answer: str, is_label: bool) -> None:
    assert swapped(prompt, answer, is_label=is_label) is None


def test_a_slot_that_an_earlier_pass_left_gets_a_name() -> None:
    new = swapped("客户[PERSON]来电投诉", "投诉")
    assert new is not None and re.fullmatch("客户[\u4e00-\u9fff]{3}来电投诉", new[0])
