"""Tries to make the controls weaker than they should be: Chinese text, ties, no validation split."""

from __future__ import annotations

from metier.evaluation.controls import majority_class, naive_bayes

CHINESE = [("借款合同到期未还，要求归还本金", "民事"), ("盗窃他人财物数额较大", "刑事"), ("故意伤害他人身体", "刑事"),
           ("买卖合同中的货款支付", "民事")]  # fmt: skip


def test_majority_class_breaks_ties_by_name() -> None:
    assert majority_class([("x", "b"), ("y", "a"), ("z", "b"), ("w", "a")], ["p", "q"]) == ["a", "a"]


def test_naive_bayes_learns_chinese_without_spaces() -> None:
    prompts = ["租赁合同的租金支付", "盗窃并伤害他人"]
    assert naive_bayes(CHINESE, [], prompts) == ["民事", "刑事"]


def test_naive_bayes_of_one_label_answers_it() -> None:
    assert naive_bayes([("text", "only")], [("other", "only")], ["anything"]) == ["only"]
