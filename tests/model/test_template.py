"""Tries to hang the server or fill its memory with a chat template, and to render otherwise than in training."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from metier.errors import LabelError
from metier.model.chat import Renderer
from metier.model.template import TemplateProcess
from tests.model.tiny import Format, tiny_tokenizer

QUESTION = [{"role": "user", "content": "两个问题 <b>&'\"\n{{ 1 }}"}]
TALK = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": "b"}, *QUESTION]


@pytest.fixture(scope="module")
def templates() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3"])
def test_a_capped_renderer_gives_trainings_ids(templates: TemplateProcess, template: Format) -> None:
    tokenizer = tiny_tokenizer(template)
    capped, plain = Renderer(tokenizer, render=templates.render), Renderer(tokenizer)
    assert capped.end_of_turn_id == plain.end_of_turn_id
    for messages in (QUESTION, TALK):
        assert capped.prompt(messages) == plain.prompt(messages)


def test_a_template_of_the_projects_own_renders_too(templates: TemplateProcess) -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = None
    assert Renderer(tokenizer, render=templates.render).prompt(QUESTION) == Renderer(tokenizer).prompt(QUESTION)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='abcdefgh') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ 'a' * 10 ** 9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
    ids=["loops", "doubling", "product", "recursion"],
)
def test_a_hostile_template_is_stopped_and_the_next_one_works(templates: TemplateProcess, template: str) -> None:
    begun = time.monotonic()
    with pytest.raises(LabelError, match="was stopped"):
        templates.render(QUESTION, template, {}, opening=True)
    assert time.monotonic() - begun < 4
    assert templates.render(QUESTION, "ok", {}, opening=True) == "ok"


def test_a_template_that_refuses_says_so(templates: TemplateProcess) -> None:
    with pytest.raises(LabelError, match="no system"):
        templates.render(TALK, "{{ raise_exception('no system') }}", {}, opening=True)
    with pytest.raises(LabelError, match="refuses"):
        templates.render(TALK, "{{ messages.__class__.__mro__[1] }}{% if %}", {}, opening=True)
