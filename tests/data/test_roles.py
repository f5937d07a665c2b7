"""Tries to make columns be taken for what they are not, and templates and conversations become wrong records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metier.data.lines import Row, Source
from metier.data.records import Rejected, build_record, language_of
from metier.data.roles import Roles, find_roles
from metier.errors import DataError
from metier.recipe import DataConfig

HERE = Path("data.csv")
SOURCE = Source(HERE, "data.csv", "csv", is_test=False)


def roles_of(columns: list[str], **names: Any) -> Roles:
    return find_roles(DataConfig(sources=["data.csv"], **names), columns, HERE)


def messages_of(fields: dict[str, Any], **names: Any) -> list[tuple[str, str]]:
    record = build_record(SOURCE, Row(1, fields=fields), roles_of(list(fields), **names))
    return [(message["role"], message["content"]) for message in record.messages]


def reason_of(fields: dict[str, Any], **names: Any) -> str:
    with pytest.raises(Rejected) as caught:
        messages_of(fields, **names)
    return str(caught.value)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "Question", "Answer", "source"], {"prompt": "Question", "answer": "Answer"}),
        (["instruction", "input", "output"], {"prompt": "instruction", "input": "input", "answer": "output"}),
        (["指令", "输入", "输出"], {"prompt": "指令", "input": "输入", "answer": "输出"}),
        (["编号", "问题", "答案"], {"prompt": "问题", "answer": "答案"}),
        (["问题", "回答", "科室"], {"prompt": "问题", "answer": "回答"}),
        (["提示", "回复"], {"prompt": "提示", "answer": "回复"}),
        (["文本", "标签"], {"prompt": "文本", "answer": "标签"}),
        (["prompt", "completion"], {"prompt": "prompt", "answer": "completion"}),
        (["prompt", "response", "score"], {"prompt": "prompt", "answer": "response"}),
        (["query", "response", "n"], {"prompt": "query", "answer": "response"}),
        (["text", "category", "n"], {"prompt": "text", "answer": "category"}),
        (["label", "text"], {"prompt": "text", "answer": "label"}),
        (["input", "output", "n"], {"prompt": "input", "answer": "output"}),
        (["system", "prompt", "completion"], {"prompt": "prompt", "answer": "completion", "system": "system"}),
        (["messages", "prompt", "completion"], {"messages": "messages"}),
        (["conversations", "system"], {"messages": "conversations", "system": "system"}),
        (["text"], {"text": "text"}),
        (["id", "content"], {"text": "content"}),
        (["term", "chapter"], {"prompt": "term", "answer": "chapter"}),
        (["id", "term", "chapter"], {"prompt": "term", "answer": "chapter"}),
    ],
)
def test_roles_are_found_by_the_names_of_the_columns(columns: list[str], expected: dict[str, str]) -> None:
    assert roles_of(columns).describe() == {**expected, "how": "found"}


def test_the_recipe_wins_over_what_would_be_found() -> None:
    roles = roles_of(["question", "answer", "topic"], prompt="{topic}: {question}", answer="topic")
    assert roles.describe() == {"prompt": "{topic}: {question}", "answer": "topic", "how": "recipe"}


def test_the_other_half_is_found_when_the_recipe_names_one() -> None:
    assert roles_of(["q", "x", "answer"], prompt="Say {q}").describe()["answer"] == "answer"
    assert roles_of(["question", "x", "y"], answer="y").describe()["prompt"] == "question"
    assert roles_of(["term", "case", "chapter"], prompt="{term}", group_id="case").describe()["answer"] == "chapter"
    with pytest.raises(DataError, match="which column is the answer"):
        roles_of(["q", "x", "y"], prompt="q")


def test_unclear_columns_are_listed_with_the_way_to_name_them() -> None:
    with pytest.raises(DataError, match="its columns are: `a`, `b`, `c`") as caught:
        roles_of(["a", "b", "c"])
    assert caught.value.hint is not None and "data: {prompt: a, answer: c}" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"prompt": "trem"}, r"no column `trem` \(did you mean `term`\?\); its columns are: `term`, `chapter`"),
        ({"prompt": "Assign: {trem}"}, r"no column `trem` \(did you mean `term`\?\)"),
        ({"prompt": "Assign: {term"}, "a brace stands alone"),
        ({"prompt": "Assign: term}"}, "a brace stands alone"),
        ({"prompt": "Assign {{term}}"}, "names no column"),
        ({"prompt": ""}, "no column ``"),
        ({"group_id": "patient"}, r"`data.group_id`: .* no column `patient`"),
        ({"messages": "chat"}, r"`data.messages`: .* no column `chat`"),
        ({"text": "term", "system": "Be brief."}, "plain text"),
    ],
)
def test_a_wrong_name_in_the_recipe_is_a_sentence(names: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        roles_of(["term", "chapter"], **names)


def test_templates_are_filled_in_both_languages_with_escaped_braces() -> None:
    fields = {"text": " 茅台 {x} ", "涨跌": "涨", "n": "0001"}
    assert messages_of(fields, prompt="分析股票走势:{text}", answer="涨跌") == [
        ("user", "分析股票走势:茅台 {x}"),
        ("assistant", "涨"),
    ]
    filled = messages_of(fields, prompt='{{"id": {n}, "t": "{ text }"}}', answer="{涨跌}!")
    assert filled == [("user", '{"id": 0001, "t": "茅台 {x}"}'), ("assistant", "涨!")]


def test_alpaca_input_follows_after_a_blank_line_where_it_is_filled() -> None:
    row = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert messages_of(row)[0] == ("user", "Translate.\n\nchat")
    assert messages_of({**row, "input": "  "})[0] == ("user", "Translate.")
    assert messages_of({**row, "input": None})[0] == ("user", "Translate.")


def test_a_system_message_is_a_text_or_a_column() -> None:
    row = {"q": "a", "role": "Be a nurse.", "a": "b"}
    assert messages_of(row, prompt="q", answer="a", system='Reply {"json": 1}.')[0] == ("system", 'Reply {"json": 1}.')
    assert messages_of(row, prompt="q", answer="a", system="role")[0] == ("system", "Be a nurse.")
    assert messages_of({**row, "role": ""}, prompt="q", answer="a", system="role")[0] == ("user", "a")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (7, "7"),
        (1.5, "1.5"),
        ("0001", "0001"),
        (" مرحبا 👩‍⚕️\n", "مرحبا 👩‍⚕️"),
        ("null", "null"),
    ],
)
def test_scalar_answers_become_their_text(value: Any, text: str) -> None:
    assert messages_of({"prompt": "p", "completion": value})[-1] == ("assistant", text)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "answer is empty"),
        ("", "answer is empty"),
        (" \t\u3000\n", "answer is empty"),
        (float("nan"), "answer is NaN or infinite"),
        ("NaN", "answer is NaN or infinite"),
        (float("inf"), "answer is NaN or infinite"),
        (["a"], "answer is a list, not text"),
        ({"a": 1}, "answer is an object, not text"),
        (b"a", "answer is bytes, not text"),
        ("a\0b", "answer holds a NUL character"),
        ("\ud83d", "answer holds half of a surrogate pair"),
    ],
)
def test_unusable_answers_are_rejected_with_a_reason(value: Any, reason: str) -> None:
    assert reason_of({"prompt": "p", "completion": value}) == reason


def test_an_empty_prompt_or_group_is_rejected() -> None:
    assert reason_of({"q": " ", "a": "x"}) == "prompt is empty"
    assert reason_of({"q": "", "a": "x"}, prompt="Code: {q}", answer="a") == "prompt is empty: column `q`"
    assert reason_of({"q": "x", "a": "y", "p": ""}, group_id="p") == "group_id is empty"


CHAT = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize("chat", [CHAT, SHAREGPT, json.dumps(CHAT), json.dumps(SHAREGPT)])
def test_conversations_are_read_in_both_shapes_and_as_json_text(chat: Any) -> None:
    assert messages_of({"messages": chat}) == [("user", "hi"), ("assistant", "hello")]


def test_a_conversation_keeps_its_own_system_message() -> None:
    chat = [{"role": "system", "content": "own"}, *CHAT]
    assert messages_of({"messages": chat}, system="other")[0] == ("system", "own")
    assert messages_of({"messages": CHAT}, system="other")[0] == ("system", "other")
    assert messages_of({"messages": [{"role": "system", "content": ""}, *CHAT]}) == [
        ("user", "hi"),
        ("assistant", "hello"),
    ]


def turn(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "messages are empty"),
        ("[]", "messages are empty"),
        (None, "messages are empty"),
        ("[{", "messages are not valid JSON"),
        ("plain text", "messages are not valid JSON"),
        (["hi"], "not a list of objects"),
        ([turn("user")], "the last message is not the assistant's"),
        ([turn("assistant")], "is not the user's"),
        ([turn("system")], "is not the user's"),
        ([turn("user"), turn("user"), turn("assistant")], "do not alternate"),
        ([turn("user"), turn("system"), turn("assistant")], "a system message stands inside"),
        ([turn("user"), turn("tool"), turn("assistant")], "tool messages and tool calls"),
        ([turn("user"), turn("assistant", "x", tool_calls=[{"id": 1}])], "tool messages and tool calls"),
        ([turn("user"), turn("Dr. Secret")], "a message's role is none of"),
        ([turn("user"), turn("assistant", " ")], "answer is empty"),
        ([turn("user", None), turn("assistant")], "prompt is empty"),
        ([turn("user"), turn("assistant", ""), turn("user"), turn("assistant")], "an assistant message is empty"),
        ([turn("user", [{"type": "text"}]), turn("assistant")], "a message's content is a list"),
    ],
)
def test_unusable_conversations_are_rejected_with_a_reason(chat: Any, reason: str) -> None:
    found = reason_of({"messages": chat})
    assert reason in found and "Secret" not in found


def test_plain_text_is_kept_as_it_is() -> None:
    assert messages_of({"text": "  def f():\n    pass\n"}) == [("text", "  def f():\n    pass\n")]
    assert reason_of({"text": "\n"}) == "text is empty"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("分析股票走势", "zh"),
        ("用 Python 写一个函数", "zh"),
        ("the word 中 in a long English sentence about it", "en"),
        ("β-blocker", "en"),
        ("東京へ行きましょう", "other"),
        ("안녕하세요", "other"),
        ("привет", "other"),
        ("مرحبا iPhone كيف حالك", "other"),
        ("123 %", "other"),
        ("Ménière", "en"),
    ],
)
def test_language_goes_by_script(text: str, language: str) -> None:
    assert language_of([{"role": "system", "content": "系统"}, {"role": "user", "content": text}]) == language
