"""A chat template in Jinja -> the same in the Go template language of Ollama's Modelfile, or nothing.

The pieces around each message are read off from conversations rendered with marks in place of the messages; what
is put together again from the pieces must equal the original on conversations with and without a system message,
of one turn and of three, or the template is not given out: Ollama would silently ask another prompt.

Limits: messages alternate between user and assistant, a system message stands first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from os.path import commonprefix

import jinja2

from metier.model.chat import Message, Renderer

SYSTEM, USER, ANSWER, SECOND = "\u2042s\u2042", "\u2042u\u2042", "\u2042a\u2042", "\u2042w\u2042"


@dataclass(frozen=True, slots=True)
class Pieces:
    """What stands around messages: a system message or its default, a user's with the answer's opening, an answer."""

    before_system: str
    after_system: str
    default_system: str
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of `messages`, the last of which is a user's."""
        system = [m["content"] for m in messages if m["role"] == "system"]
        text = self.before_system + system[0] + self.after_system if system else self.default_system
        for message in messages:
            if message["role"] == "user":
                text += self.before_user + message["content"] + self.after_user
            elif message["role"] == "assistant":
                text += self.before_answer + message["content"] + self.after_answer
        return text

    def template(self) -> str:
        """The Go template. No dash in its brackets: a dash would eat the line breaks beside it."""
        system = f"{self.before_system}{{{{ .System }}}}{self.after_system}"
        user = f"{self.before_user}{{{{ .Content }}}}{self.after_user}"
        answer = f"{self.before_answer}{{{{ .Content }}}}{self.after_answer}"
        turn = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{self.default_system}{{{{ end }}}}"
        return f"{start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}"


def ollama_template(renderer: Renderer) -> str | None:
    """The renderer's chat template for a Modelfile's TEMPLATE, or None where it cannot be written there."""
    try:
        pieces = _pieces(renderer)
        same = all(_render(renderer, m) == pieces.render(m) for m in _trials())
    except (jinja2.TemplateError, ValueError):
        return None
    text = pieces.template()
    spoils = any("{{" in piece or '"""' in piece for piece in astuple(pieces))
    return text if same and not spoils else None


def _pieces(renderer: Renderer) -> Pieces:
    alone = _render(renderer, [_message("user", USER)])
    turns = [
        _message("system", SYSTEM),
        _message("user", USER),
        _message("assistant", ANSWER),
        _message("user", SECOND),
    ]
    whole = _render(renderer, turns)
    before_system, rest = whole.split(SYSTEM)
    between, rest = rest.split(USER)
    opening, rest = rest.split(ANSWER)
    after, opened = rest.split(SECOND)
    default, _ = alone.split(USER)
    # What every user message begins with, whatever stands before it.
    user = commonprefix([text[::-1] for text in (between, after, default)])[::-1]
    cut = len(user)
    if not opening.startswith(opened):
        raise ValueError("what follows a user's message depends on what follows")
    return Pieces(
        before_system, between[: len(between) - cut], default[: len(default) - cut], user, opened,
        opening[len(opened) :], after[: len(after) - cut],
    )  # fmt: skip


def _render(renderer: Renderer, messages: Sequence[Message]) -> str:
    """The prompt's text without the BOS that llama.cpp adds by itself."""
    text = str(
        renderer.tokenizer.apply_chat_template(
            list(messages), chat_template=renderer.template, tokenize=False, add_generation_prompt=True,
            enable_thinking=False,
        )
    )  # fmt: skip
    return text.removeprefix(renderer.tokenizer.bos_token) if renderer.adds_bos else text


def _trials() -> list[list[Message]]:
    system, turns = [_message("system", "Be brief. 请简短。")], [_message("user", "one"), _message("assistant", "two")]
    last = [_message("user", "three")]
    return [last, [*system, *last], [*turns, *last], [*system, *turns, *turns, *last]]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
