"""One renderer for training, evaluation and serving: conversation -> input_ids and labels.

The checkpoint's own chat template is used; a base model without one gets PLAIN_TEMPLATE. The prompt's
ids in training are exactly those that generation starts from, so what is learned is what is asked for.
Loss falls on an answer and its end-of-turn token, and on nothing else, unless `train_on` says so.

Not covered: tool calls and images; a template that rewrites earlier turns when later ones are added
refuses `train_on: all_assistant`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2

from metier.errors import ControlTokenError, LabelError, ModelError
from metier.model.resolve import read_json

IGNORE_INDEX = -100
Message = dict[str, str]

# For base models that were never taught a chat format. BOS is added where the tokenizer's own encoding adds it.
PLAIN_TEMPLATE = (
    "{{ metier_bos }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Question\n{{ message['content'] }}\n\n"
    "{% else %}### Answer\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Answer\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One record as the model sees it: input_ids and labels of one length, IGNORE_INDEX where no loss falls.

    `weight` is how much the loss of each of its tokens counts in training.
    """

    input_ids: list[int]
    labels: list[int]
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


def eos_token_ids(checkpoint: Path) -> list[int]:
    """Where the checkpoint's own generation settings stop: more ids than the tokenizer's EOS, in LLaMA 3 for one."""
    for name in ("generation_config.json", "config.json"):
        if (checkpoint / name).is_file():
            value = read_json(checkpoint / name).get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            if value is not None:
                if not all(isinstance(i, int) for i in ids):
                    raise ModelError(f"`eos_token_id` in `{checkpoint / name}` is no token id and no list of them")
                return list(ids)
    return []


class CappedRender(Protocol):
    """Renders as transformers does, elsewhere and under caps: `metier.model.template.TemplateProcess.render`."""

    def __call__(
        self, messages: Sequence[Message], template: str, special_tokens: dict[str, Any], *, opening: bool
    ) -> str: ...


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    `stop_token_ids` are where generation stops: the template's end-of-turn token and the checkpoint's
    EOS tokens. A server gives `render`, since it runs the template on what strangers send.
    Raises `LabelError` when the tokenizer has no EOS, or its template fails on a plain exchange.
    """

    def __init__(
        self, tokenizer: Any, eos_token_ids: Sequence[int] = (), *, render: CappedRender | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._render = render
        if tokenizer.eos_token_id is None:
            raise LabelError("the tokenizer has no end-of-sequence token, so no answer could be taught to end")
        plain = self.encode("a", special=True)
        self.adds_bos = tokenizer.bos_token_id is not None and plain[:1] == [tokenizer.bos_token_id]
        self.is_plain = not tokenizer.chat_template
        bos = tokenizer.bos_token if self.adds_bos else ""
        self.template = PLAIN_TEMPLATE.replace("{{ metier_bos }}", bos) if self.is_plain else tokenizer.chat_template
        # The named special tokens, and those that the tokenizer only marks as special (LLaMA 3's headers).
        marked = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._control = marked | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_token_ids = frozenset({tokenizer.eos_token_id, *eos_token_ids})
        if self.end_of_turn_id is not None:
            self.stop_token_ids |= {self.end_of_turn_id}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special`, what the tokenizer adds around a text of its own is added."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that generation starts from: the conversation so far and the opening of the answer.

        Raises `LabelError` when the template refuses the conversation or a message holds control tokens.
        """
        self._refuse_control_tokens(messages)
        return self.encode(self._text(messages, opening=True))

    def conversation(self, messages: Sequence[Message], train_on: str = "last_assistant") -> Rendered:
        """The ids of a whole conversation and the labels that `train_on` asks for.

        Raises `LabelError` as `prompt` does, and when the conversation does not end with an answer.
        """
        self._refuse_control_tokens(messages)
        if messages[0]["role"] == "text":
            return self._plain_text(messages[0]["content"])
        if messages[-1]["role"] != "assistant":
            raise LabelError("the conversation does not end with an answer")
        text = self._text(messages)
        prompt_ids, input_ids = self._split(text, self._text(messages[:-1], opening=True))
        spans = [self._answer_span(input_ids, len(prompt_ids))]
        if spans[0][1] > len(input_ids):
            input_ids.append(self.tokenizer.eos_token_id)
        if train_on == "all_assistant":
            spans += self._earlier_answers(messages, text, input_ids)
        labels = [IGNORE_INDEX] * len(input_ids)
        for start, end in spans if train_on != "all_tokens" else [(1, len(input_ids))]:
            labels[start:end] = input_ids[start:end]
        return Rendered(input_ids, labels)

    def shorten(self, messages: Sequence[Message], max_tokens: int, train_on: str) -> list[Message] | None:
        """The conversation with its last user message cut at the end so that the whole renders to `max_tokens` at most.

        The answer is never cut; None when it does not fit even beside one character of prompt.
        """
        index = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if index is None:
            return None
        content = messages[index]["content"]

        def cut(size: int) -> list[Message]:
            return [*messages[:index], {**messages[index], "content": content[:size].rstrip()}, *messages[index + 1 :]]

        low, high = 0, len(content)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.conversation(cut(middle), train_on).num_tokens <= max_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        return cut(low) if low else None

    def _text(self, messages: Sequence[Message], *, opening: bool = False) -> str:
        if self._render is not None:
            return self._render(messages, self.template, dict(self.tokenizer.special_tokens_map), opening=opening)
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=opening,
                enable_thinking=False,
            )
        except jinja2.TemplateError as error:
            raise LabelError(
                f"the model's chat template refuses the turns {', '.join(m['role'] for m in messages)}: {error}",
                hint="leave `data.system` out if the template knows no system message",
            ) from None
        return str(text)

    def _split(self, text: str, prompt_text: str) -> tuple[list[int], list[int]]:
        """The prompt's ids, and the ids of the whole text, which begin with them."""
        if not text.startswith(prompt_text):
            raise LabelError(
                "the model's chat template writes the prompt otherwise once the answer follows",
                hint="such a template would be trained on one prompt and asked with another; name another base",
            )
        prompt_ids, input_ids = self.encode(prompt_text), self.encode(text)
        if input_ids[: len(prompt_ids)] != prompt_ids:
            # A token would straddle the boundary; at generation the prompt ends before it, so it does here.
            input_ids = prompt_ids + self.encode(text[len(prompt_text) :])
        return prompt_ids, input_ids

    def _answer_span(self, input_ids: list[int], start: int) -> tuple[int, int]:
        """[start, end) of an answer with its stop token; one past the end when the template gives it none."""
        for position in range(start, len(input_ids)):
            if input_ids[position] in self.stop_token_ids:
                return start, position + 1
        return start, len(input_ids) + 1

    def _earlier_answers(self, messages: Sequence[Message], text: str, input_ids: list[int]) -> list[tuple[int, int]]:
        spans = []
        for index, message in enumerate(messages[:-1]):
            if message["role"] != "assistant":
                continue
            prompt_text = self._text(messages[:index], opening=True)
            prompt_ids = self.encode(prompt_text)
            if not text.startswith(prompt_text) or input_ids[: len(prompt_ids)] != prompt_ids:
                raise LabelError(
                    "the model's chat template rewrites earlier turns, so their labels would be wrong",
                    hint="use `train.train_on: last_assistant`",
                )
            spans.append(self._answer_span(input_ids, len(prompt_ids)))
        return spans

    def _plain_text(self, text: str) -> Rendered:
        input_ids = self.encode(text, special=True)
        if input_ids[-1] != self.tokenizer.eos_token_id:
            input_ids.append(self.tokenizer.eos_token_id)
        return Rendered(input_ids, [IGNORE_INDEX, *input_ids[1:]])

    def _find_end_of_turn(self) -> int | None:
        """The first special token that the template writes behind an answer, if it writes any."""
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        text = self._text([question, answer])
        tail = text[text.rindex("b") + 1 :]
        return next((i for i in self.encode(tail) if i in self._control), None)

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """Text that spells a control token would close its own turn: a record could write its own labels."""
        for message in messages:
            for token in self._control.values():
                if token in message["content"]:
                    raise ControlTokenError(f"a {message['role']} message spells the model's control token {token!r}")
