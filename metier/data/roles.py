"""Columns -> roles: which column, or template over columns, is the prompt, the answer, the conversation or the text.

What the recipe names wins. The rest is found by the column names that public data sets use, in English and
Chinese, without regard to case. What was decided stands in the data set's manifest, under `roles`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metier.errors import DataError, did_you_mean
from metier.recipe import DataConfig

CONVERSATIONS = ("messages", "conversations", "对话")
TEXTS = ("text", "content", "文本", "正文")
SYSTEMS = ("system", "系统")
HISTORIES = ("history", "历史", "对话历史")
# Who or what must not stand in two splits; taken as group_id where the recipe names none. Only names that say so: a
# category or a company may have two values, and nothing could be split by it.
GROUPS = (
    "patient_id", "patientid", "patient", "subject_id", "mrn", "customer_id", "client_id", "user_id", "account_id",
    "student_id", "case_id", "document", "document_id", "doc_id", "conversation_id", "session_id", "group_id",
    "患者编号", "患者id", "病历号", "住院号", "客户编号", "客户号", "用户id", "学号", "案号", "文档",
)  # fmt: skip
# (prompt, answer), the first pair that fits is taken.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("text", "label"),
    ("text", "category"),
    ("input", "output"),
    ("指令", "输出"),
    ("问题", "答案"),
    ("问题", "回答"),
    ("提示", "回复"),
    ("文本", "标签"),
    ("文本", "类别"),
    ("输入", "输出"),
    ("source", "target"),
)
KNOWN_COLUMNS = frozenset(CONVERSATIONS + TEXTS + SYSTEMS + tuple(name for pair in PAIRS for name in pair))
# Alpaca's third column: it follows the instruction after a blank line, where it is not empty.
INPUTS = {"instruction": "input", "指令": "输入"}
# Never guessed to be a prompt or an answer.
BOOKKEEPING = (
    "id",
    "index",
    "idx",
    "uid",
    "uuid",
    "meta",
    "metadata",
    "source",
    "url",
    "date",
    "timestamp",
    "编号",
    "序号",
)


class UnclearRoles(DataError):
    """The columns fit no known shape, and the recipe does not say what they are."""


@dataclass(frozen=True)
class Template:
    """Text with columns in it: (literal, column) pairs, the column None after the last literal.

    A single column's name is the template of that column alone.
    """

    written: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> list[str]:
        return [column for _, column in self.parts if column is not None]


@dataclass(frozen=True)
class Roles:
    """Either prompt and answer, or messages, or text; the others are None."""

    prompt: Template | None = None
    input: str | None = None
    answer: Template | None = None
    messages: str | None = None
    text: str | None = None
    system: str | None = None
    system_text: str | None = None
    history: str | None = None
    group_id: str | None = None
    is_group_found: bool = False
    how: Literal["recipe", "found"] = "found"

    @property
    def required(self) -> tuple[object, ...]:
        """What two files must have in common; input and a found system column may be missing from one."""
        return (self.prompt, self.answer, self.messages, self.text, self.system_text, self.group_id)

    def describe(self) -> dict[str, str]:
        """For the manifest: each role that is filled, with its column, template or text."""
        roles = {
            "prompt": self.prompt.written if self.prompt else None,
            "input": self.input,
            "answer": self.answer.written if self.answer else None,
            "messages": self.messages,
            "text": self.text,
            "system": self.system or self.system_text,
            "history": self.history,
            "group_id": self.group_id,
            "how": self.how,
        }
        return {role: value for role, value in roles.items() if value}

    @property
    def columns(self) -> dict[str, str]:
        """Each column that is used, with its role."""
        named = {"input": self.input, "messages": self.messages, "text": self.text, "system": self.system,
                 "history": self.history, "group_id": self.group_id}  # fmt: skip
        used = {column: role for role, column in named.items() if column}
        for role, template in (("prompt", self.prompt), ("answer", self.answer)):
            used |= dict.fromkeys(template.columns if template else [], role)
        return used


def find_roles(config: DataConfig, columns: list[str], path: Path) -> Roles:
    """The roles of one file's columns. `path` stands in errors.

    Raises `DataError` for a column that the file lacks or a broken template, `UnclearRoles` for columns that fit no
    known shape.
    """
    folded = {name.casefold(): name for name in reversed(columns)}
    group_id = None
    if config.group_id is None:
        group_id = _first(GROUPS, {k: v for k, v in folded.items() if v not in _named(config, columns)})
    elif config.group_id != "none" or "none" in columns:
        group_id = _column(config.group_id, "group_id", columns, path)
    known = {k: name for k, name in folded.items() if name != group_id}
    main = _named_roles(config, columns, known, path) or _found_roles(columns, known, path)
    if main.text and config.system not in (None, "none"):
        raise DataError("`data.system` needs prompts and answers; the records here are plain text")
    system, system_text = config.system, None
    if config.system is None:
        system = None if main.text else _first(SYSTEMS, known)
        system = None if system in _used(main) else system
    elif config.system not in columns:
        system, system_text = None, None if config.system == "none" else config.system
    return replace(
        main, system=system, system_text=system_text, group_id=group_id,
        history=_history_column(config.history, main, known, columns, path),
        is_group_found=group_id is not None and config.group_id is None,
    )  # fmt: skip


def _history_column(
    named: str | None, main: Roles, known: dict[str, str], columns: list[str], path: Path
) -> str | None:
    if named not in (None, "none") and not main.prompt:
        raise DataError("`data.history` needs prompts and answers", hint="a column of messages holds all turns itself")
    if named and (named != "none" or "none" in columns):
        return _column(named, "history", columns, path)
    found = None if named or not main.prompt else _first(HISTORIES, known)
    return None if found in _used(main) else found


def _named(config: DataConfig, columns: list[str]) -> set[str]:
    """The columns that the recipe uses for something else than the group."""
    named = [config.prompt, config.answer, config.messages, config.text, config.system, config.history]
    return {name for name in columns for value in named if value and (value == name or f"{{{name}}}" in value)}


def _named_roles(config: DataConfig, columns: list[str], known: dict[str, str], path: Path) -> Roles | None:
    """What the recipe names, with the other half found where it names only the prompt or only the answer."""
    if config.messages is not None:
        return Roles(messages=_column(config.messages, "messages", columns, path), how="recipe")
    if config.text is not None:
        return Roles(text=_column(config.text, "text", columns, path), how="recipe")
    if config.prompt is not None and config.answer is not None:
        prompt = parse_template(config.prompt, "prompt", columns, path)
        return Roles(prompt=prompt, answer=parse_template(config.answer, "answer", columns, path), how="recipe")
    if config.prompt is not None:
        prompt = parse_template(config.prompt, "prompt", columns, path)
        return Roles(prompt=prompt, answer=_other_half("answer", prompt, columns, known, path))
    if config.answer is not None:
        answer = parse_template(config.answer, "answer", columns, path)
        prompt = _other_half("prompt", answer, columns, known, path)
        return Roles(prompt=prompt, input=_input(prompt, answer, known), answer=answer)
    return None


def _found_roles(columns: list[str], known: dict[str, str], path: Path) -> Roles:
    messages = _first(CONVERSATIONS, known)
    if messages:
        return Roles(messages=messages)
    free = _free(known)
    if len(free) == 1 and free[0].casefold() in TEXTS:
        return Roles(text=free[0])
    pair = next(((known[p], known[a]) for p, a in PAIRS if p in known and a in known), None)
    if pair is None and len(free) == 2:
        pair = (free[0], free[1])
    if pair is None:
        raise _unclear("which column is the prompt and which the answer", columns, path)
    prompt, answer = _single(pair[0]), _single(pair[1])
    return Roles(prompt=prompt, input=_input(prompt, answer, known), answer=answer)


def _free(known: dict[str, str]) -> list[str]:
    """The columns that may be guessed from, in the file's order."""
    return [name for folded, name in reversed(known.items()) if folded not in (*BOOKKEEPING, *SYSTEMS, *HISTORIES)]


def parse_template(text: str, role: str, columns: list[str], path: Path) -> Template:
    """A column's name, or text with columns in braces; `{{` and `}}` are braces. Raises `DataError`."""
    if text in columns or not re.search(r"[{}]", text):
        return _single(_column(text, role, columns, path))
    parts: list[tuple[str, str | None]] = []
    literal = ""
    for token in re.split(r"(\{\{|\}\}|\{[^{}]*\}|[{}])", text):
        if token in ("{", "}"):
            raise DataError(
                f"`data.{role}`: a brace stands alone in the template",
                hint="columns are written {column}; a brace itself is written twice, {{ or }}",
            )
        if token in ("{{", "}}"):
            literal += token[0]
        elif token.startswith("{"):
            parts.append((literal, _column(token[1:-1].strip(), role, columns, path)))
            literal = ""
        else:
            literal += token
    if not parts:
        raise DataError(
            f"`data.{role}`: the template names no column, so it would be the same for every record",
            hint=f"its columns are: {_listed(columns)}; write one in braces",
        )
    return Template(text, (*parts, (literal, None)))


def _single(column: str) -> Template:
    return Template(column, (("", column),))


def _column(name: str, role: str, columns: list[str], path: Path) -> str:
    if name in columns:
        return name
    raise DataError(
        f"`data.{role}`: `{path}` has no column `{name}`{did_you_mean(name, columns)}; "
        f"its columns are: {_listed(columns)}",
        hint=f"a template has its columns in braces, such as `{name} {{{_short(columns[0])}}}`"
        if " " in name
        else None,
    )


def _other_half(role: str, half: Template, columns: list[str], known: dict[str, str], path: Path) -> Template:
    """The prompt where only the answer is named, or the answer where only the prompt is."""
    left = {folded: name for folded, name in known.items() if name not in half.columns}
    free = _free(left)
    position = 0 if role == "prompt" else 1
    found = _first(tuple(pair[position] for pair in PAIRS), left) or (free[0] if len(free) == 1 else None)
    if found is None:
        raise _unclear(f"which column is the {role}", columns, path)
    return _single(found)


def _input(prompt: Template, answer: Template, known: dict[str, str]) -> str | None:
    column = known.get(INPUTS.get(prompt.written.casefold(), ""))
    return None if column in answer.columns else column


def _used(roles: Roles) -> list[str]:
    return [name for template in (roles.prompt, roles.answer) if template for name in template.columns]


def _first(names: tuple[str, ...], known: dict[str, str]) -> str | None:
    return next((known[name] for name in names if name in known), None)


def _unclear(question: str, columns: list[str], path: Path) -> UnclearRoles:
    first, last = (_short(columns[0]), _short(columns[-1])) if columns else ("question", "answer")
    return UnclearRoles(
        f"`{path}`: it is not clear {question}; its columns are: {_listed(columns)}",
        hint=f"name them in the recipe: `data: {{prompt: {first}, answer: {last}}}`, or `messages:` for "
        "conversations, or `text:` for plain text",
    )


def _listed(columns: list[str]) -> str:
    shown = ", ".join(f"`{_short(name)}`" for name in columns[:30])
    return shown if len(columns) <= 30 else f"{shown} and {len(columns) - 30} more"


def _short(column: str) -> str:
    """Where a file has no header its first row stands here: no more of it than tells what it is."""
    return column if len(column) <= 40 else f"{column[:40]}…"
