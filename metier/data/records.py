"""A row and its roles -> a record: its messages, its group and its language, or the reason why it is rejected.

Messages are [optional system, user, assistant, user, assistant, ...] and end with the answer; plain text is one
message with the role `text`. Whitespace around a prompt, an answer or a column in a template is taken off; plain
text stays as it is. Conversations come as OpenAI's {role, content} or ShareGPT's {from, value}, also as JSON text
in a cell; tool calls are rejected, an empty system message is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metier.data.json_rows import parse_json
from metier.data.lines import Row, Source
from metier.data.roles import Roles, Template
from metier.data.spool import Spool

Message = dict[str, str]
Removed = tuple[tuple[str, str], ...]  # type and keyed hash
# The row's number, byte offset and place; group_id; where in this tuple the prompt stands, or the prompt; what was
# removed; then role and text of each message.
Content = tuple[Any, ...]
TURNS = 6
SPEAKERS = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
TOOLS = ("tool", "function", "function_call", "observation")
NO_HISTORY = "; `data.history: none` leaves the column out"
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_LETTERS = re.compile(r"[^\W\d_]+")


class Rejected(Exception):
    """The row is no record; the message says why and holds no record text."""


class Record:
    """One kept row (without its fields), its texts in memory or, once `store` was called, on disk.

    `prompt` is the first user message, or the text. `group` is what must not cross a split: the group_id where the
    recipe names one, or else the prompt. A synthetic record has the record it was made of as `parent`, how it was made
    as `method`, and which of these it is. `split` is where the record is, once it was split. `removed` has type and
    keyed hash of what de-identification took out. Records are told apart by identity.
    """

    __slots__ = ("_content", "_spool", "method", "number", "parent", "source", "split")

    def __init__(
        self,
        source: Source,
        row: Row,
        messages: list[Message],
        group_id: str | None,
        prompt: str,
        parent: Record | None = None,
        method: str | None = None,
        number: int = 0,
    ) -> None:
        self.source, self.parent, self.method, self.number, self.split = source, parent, method, number, ""
        self._spool: Spool | None = None
        self._content: Content | int = _content((row.number, row.byte_offset, row.place), messages, group_id, prompt)

    def __reduce__(self) -> tuple[Callable[..., Record], tuple[Any, ...]]:
        """For another process, where there is no such file."""
        return _record, (self.source, self.parent, self.method, self.number, self._load())

    @property
    def row(self) -> Row:
        return Row(*self._load()[:3])

    @property
    def row_number(self) -> int:
        number: int = self._load()[0]
        return number

    @property
    def messages(self) -> list[Message]:
        turns = iter(self._load()[TURNS:])
        return [{"role": role, "content": text} for role, text in zip(turns, turns, strict=True)]

    @property
    def turns(self) -> tuple[str, ...]:
        """Role and text of each message, one after the other."""
        return self._load()[TURNS:]

    @property
    def group_id(self) -> str | None:
        group_id: str | None = self._load()[3]
        return group_id

    @property
    def prompt(self) -> str:
        content = self._load()
        prompt: str = content[4] if isinstance(content[4], str) else content[content[4]]
        return prompt

    @property
    def removed(self) -> Removed:
        removed: Removed = self._load()[5]
        return removed

    @property
    def group(self) -> str:
        return self.prompt if self.group_id is None else self.group_id

    @property
    def answer(self) -> str:
        answer: str = self._load()[-1]
        return answer

    def store(self, spool: Spool) -> None:
        """Puts the texts on disk."""
        self._content, self._spool = spool.put(self._load()), spool

    def rewrite(self, messages: list[Message], group_id: str | None, removed: Removed) -> None:
        """Gives the record other texts."""
        prompt = next((m["content"] for m in messages if m["role"] in ("user", "text")), self.prompt)
        content = _content(self._load()[:3], messages, group_id, prompt, removed)
        self._content = content if self._spool is None else self._spool.put(content)

    def variant(self, messages: list[Message] | None, *, method: str, number: int) -> Record:
        """A synthetic record, made of this one; with the same texts where `messages` is None."""
        made = Record.__new__(Record)
        made.source, made.parent, made.method, made.number, made.split = self.source, self, method, number, ""
        made._spool, made._content = self._spool, self._content
        if messages is not None:
            made.rewrite(messages, self.group_id, self.removed)
        return made

    def _load(self) -> Content:
        content = self._content
        if not isinstance(content, int):
            return content
        assert self._spool is not None
        loaded: Content = self._spool.get(content)
        return loaded


def _content(
    place: tuple[Any, ...], messages: list[Message], group_id: str | None, prompt: str, removed: Removed = ()
) -> Content:
    turns = [text for turn in messages for text in (turn["role"], turn["content"])]
    first = next((TURNS + 2 * i + 1 for i, turn in enumerate(messages) if turn["content"] == prompt), prompt)
    return (*place, group_id, first, removed, *turns)


def _record(source: Source, parent: Record | None, method: str | None, number: int, content: Content) -> Record:
    """What `Record.__reduce__` gave."""
    made = Record.__new__(Record)
    made.source, made.parent, made.method, made.number, made.split = source, parent, method, number, ""
    made._spool, made._content = None, content
    return made


def same_input(record: Record) -> str:
    """What is equal for records that ask the same, whatever the answer: case and white space do not count."""
    return "\0".join(" ".join(message["content"].casefold().split()) for message in record.messages[:-1])


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that is no record. `problem` is the reason without the line, so that equal ones can be counted."""

    source: Source
    row: Row
    problem: str

    @property
    def reason(self) -> str:
        return f"{self.row.place}: {self.problem}" if self.row.place else self.problem


def build_record(source: Source, row: Row, roles: Roles) -> Record:
    """The record of a readable row. Raises `Rejected`."""
    place = Row(row.number, row.byte_offset, row.place)
    group_id = _group_id(row, roles)
    if roles.text:
        text = text_of(row.fields.get(roles.text), "text")
        return Record(source, place, [{"role": "text", "content": text}], group_id, text)
    if roles.messages:
        messages = conversation(row.fields.get(roles.messages))
    else:
        assert roles.prompt and roles.answer
        prompt = _fill(roles.prompt, row, "prompt")
        if roles.input and not _is_empty(row.fields.get(roles.input)):
            prompt = f"{prompt}\n\n{text_of(row.fields[roles.input], 'input').strip()}"
        answer = _fill(roles.answer, row, "answer")
        messages = _history(row.fields.get(roles.history)) if roles.history else []
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    system = roles.system_text
    if roles.system and not _is_empty(row.fields.get(roles.system)):
        system = text_of(row.fields[roles.system], "system").strip()
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    first_user = next(m["content"] for m in messages if m["role"] == "user")
    return Record(source, place, messages, group_id, first_user)


def _group_id(row: Row, roles: Roles) -> str | None:
    """The row's group; a column that was found and not named may be empty here and there."""
    value = row.fields.get(roles.group_id) if roles.group_id else None
    if roles.group_id is None or (roles.is_group_found and _is_empty(value)):
        return None
    return text_of(value, "group_id").strip()


def _history(value: Any) -> list[Message]:
    """Earlier turns: [[user, assistant], ...], also as JSON text. Raises `Rejected`."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            raise Rejected(f"history is not valid JSON{NO_HISTORY}") from None
    if _is_empty(value):
        return []
    if not isinstance(value, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        raise Rejected(f"history is not a list of [question, answer] pairs{NO_HISTORY}")
    return [
        {"role": role, "content": text_of(said, "history").strip()}
        for turn in value
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]


def text_of(value: Any, role: str) -> str:
    """The text of a scalar value, as it is written in the file. Raises `Rejected` where there is none."""
    if _is_empty(value):
        raise Rejected(f"{role} is empty")
    if isinstance(value, list | dict | bytes):
        kind = {list: "a list", dict: "an object", bytes: "bytes"}[type(value)]
        raise Rejected(f"{role} is {kind}, not text")
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    if (isinstance(value, float) and not math.isfinite(value)) or text.strip() in ("NaN", "nan"):
        raise Rejected(f"{role} is NaN or infinite")
    if "\0" in text:
        raise Rejected(f"{role} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected(f"{role} holds half of a surrogate pair") from None
    return text


def conversation(value: Any) -> list[Message]:
    """Messages from a cell: a list of objects, or JSON text of one. Raises `Rejected`."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            raise Rejected("messages are not valid JSON") from None
    if _is_empty(value) or value == []:
        raise Rejected("messages are empty")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Rejected("messages are not a list of objects")
    messages = [_message(turn) for turn in value]
    if messages[0]["role"] == "system" and not messages[0]["content"]:
        messages = messages[1:]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or turns[0]["role"] != "user":
        raise Rejected("the first message, after an optional system message, is not the user's")
    if any(turn["role"] == "system" for turn in turns):
        raise Rejected("a system message stands inside the conversation")
    if any(a["role"] == b["role"] for a, b in zip(turns, turns[1:], strict=False)):
        raise Rejected("user and assistant do not alternate")
    if turns[-1]["role"] != "assistant":
        raise Rejected("the last message is not the assistant's: there is no answer")
    if not turns[-1]["content"]:
        raise Rejected("answer is empty")
    empty = next((turn["role"] for turn in turns if not turn["content"]), None)
    if empty:
        raise Rejected("prompt is empty: a user message" if empty == "user" else "an assistant message is empty")
    return messages


def language_of(messages: list[Message]) -> str:
    """`zh`, `en` or `other`, by script; a Han character weighs as much as three Latin letters.

    Kana, Hangul, Cyrillic, Arabic and the like make it `other` from 3 letters in 13 (Han and Latin: 10) on.
    """
    text = "\n".join(m["content"] for m in messages if m["role"] != "system")
    if text.isascii():
        return "en" if _LATIN.search(text) else "other"
    han = sum(map(len, _HAN.findall(text)))
    latin = sum(map(len, _LATIN.findall(text)))
    letters = sum(map(len, _LETTERS.findall(text)))
    if letters - han - latin > 0.3 * (han + latin):
        return "other"
    if han and 3 * han >= 0.3 * latin:
        return "zh"
    return "en" if latin else "other"


def _fill(template: Template, row: Row, role: str) -> str:
    text = ""
    for literal, column in template.parts:
        text += literal
        if column is None:
            continue
        try:
            text += text_of(row.fields.get(column), role).strip()
        except Rejected as error:
            raise Rejected(f"{error}" if template.written == column else f"{error}: column `{column}`") from None
    return text.strip()


def _message(turn: dict[str, Any]) -> Message:
    role_key, content_key = ("role", "content") if "role" in turn else ("from", "value")
    speaker = turn.get(role_key)
    if speaker in TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise Rejected("tool messages and tool calls are not supported")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Rejected("a message's role is none of system, user, assistant (human, gpt)")
    content = turn.get(content_key)
    if _is_empty(content):
        return {"role": SPEAKERS[speaker], "content": ""}
    return {"role": SPEAKERS[speaker], "content": text_of(content, "a message's content").strip()}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
