"""Tries to break the labels: a prompt token trained, an answer or stop token not, a template that plays tricks."""

from __future__ import annotations

from typing import Any

import pytest

from metier.errors import LabelError
from metier.model.chat import IGNORE_INDEX, Rendered, Renderer
from metier.recipe import TrainConfig
from metier.training.labels import check_labels, render_records
from tests.model.tiny import Format, tiny_tokenizer

EXCHANGE = [{"role": "user", "content": "What is 流感?"}, {"role": "assistant", "content": "Respiratory"}]
SYSTEM = [{"role": "system", "content": "Code it."}, *EXCHANGE]
TURNS = [*SYSTEM, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes 是的"}]

# What each format's description says, with what is trained between « and ».
EXPECTED: dict[Format, dict[str, str]] = {
    "chatml": {
        "exchange": "<|im_start|>user\nWhat is 流感?<|im_end|>\n<|im_start|>assistant\n«Respiratory<|im_end|>»\n",
        "system": "<|im_start|>system\nCode it.<|im_end|>\n<|im_start|>user\nWhat is 流感?<|im_end|>\n"
        "<|im_start|>assistant\n«Respiratory<|im_end|>»\n",
        "turns": "<|im_start|>system\nCode it.<|im_end|>\n<|im_start|>user\nWhat is 流感?<|im_end|>\n"
        "<|im_start|>assistant\n«Respiratory<|im_end|>»\n<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n«Yes 是的<|im_end|>»\n",
    },
    "llama2": {
        "exchange": "<s>[INST] What is 流感? [/INST]« Respiratory </s>»",
        "system": "<s>[INST] <<SYS>>\nCode it.\n<</SYS>>\n\nWhat is 流感? [/INST]« Respiratory </s>»",
        "turns": "<s>[INST] <<SYS>>\nCode it.\n<</SYS>>\n\nWhat is 流感? [/INST]« Respiratory </s>»"
        "<s>[INST] Sure? [/INST]« Yes 是的 </s>»",
    },
    "llama3": {
        "exchange": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 流感?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Respiratory<|eot_id|>»",
        "system": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCode it.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 流感?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Respiratory<|eot_id|>»",
        "turns": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCode it.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 流感?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Respiratory<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes 是的<|eot_id|>»",
    },
}
CONVERSATIONS = {"exchange": EXCHANGE, "system": SYSTEM, "turns": TURNS}
FORMATS: tuple[Format, ...] = ("chatml", "llama2", "llama3")


def marked(renderer: Renderer, rendered: Rendered) -> str:
    """The record's text with « and » around each trained stretch."""
    text, stretch, inside = "", [], False
    for token, label in zip([*rendered.input_ids, None], [*rendered.labels, IGNORE_INDEX], strict=True):
        is_trained = label != IGNORE_INDEX
        if token is None or is_trained != inside:
            piece = renderer.tokenizer.decode(stretch)
            text += f"«{piece}»" if inside else piece
            stretch, inside = [], is_trained
        if token is not None:
            stretch.append(token)
    return text


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("name", ["exchange", "system", "turns"])
def test_labels_equal_the_hand_written_expectation(template: Format, name: str) -> None:
    renderer = Renderer(tiny_tokenizer(template))
    rendered = renderer.conversation(CONVERSATIONS[name], "all_assistant")
    assert marked(renderer, rendered) == EXPECTED[template][name]
    check_labels(rendered, CONVERSATIONS[name], renderer, "all_assistant", "r1")


@pytest.mark.parametrize("template", FORMATS)
def test_last_assistant_trains_the_last_answer_alone(template: Format) -> None:
    renderer = Renderer(tiny_tokenizer(template))
    expected = EXPECTED[template]["turns"].replace("«", "", 1).replace("»", "", 1)
    assert marked(renderer, renderer.conversation(TURNS)) == expected


@pytest.mark.parametrize("template", FORMATS)
def test_all_tokens_trains_everything_but_the_first_token(template: Format) -> None:
    rendered = Renderer(tiny_tokenizer(template)).conversation(TURNS, "all_tokens")
    assert rendered.labels == [IGNORE_INDEX, *rendered.input_ids[1:]]


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("name", ["exchange", "system", "turns"])
def test_generation_starts_from_the_ids_that_training_masked(template: Format, name: str) -> None:
    renderer = Renderer(tiny_tokenizer(template))
    messages = CONVERSATIONS[name]
    prompt, rendered = renderer.prompt(messages[:-1]), renderer.conversation(messages)
    first = next(i for i, label in enumerate(rendered.labels) if label != IGNORE_INDEX)
    assert prompt == rendered.input_ids[:first]


@pytest.mark.parametrize("template", ["llama2", "llama3"])
def test_bos_stands_exactly_once(template: Format) -> None:
    tokenizer = tiny_tokenizer(template)
    ids = Renderer(tokenizer).conversation(SYSTEM).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_base_model_without_a_template_gets_the_plain_one() -> None:
    tokenizer = tiny_tokenizer("llama2")
    tokenizer.chat_template = None
    renderer = Renderer(tokenizer)
    assert renderer.is_plain
    rendered = renderer.conversation(SYSTEM)
    expected = "<s>Code it.\n\n### Question\nWhat is 流感?\n\n### Answer\n«Respiratory</s>»\n\n"
    assert marked(renderer, rendered) == expected
    check_labels(rendered, SYSTEM, renderer, "last_assistant", "r1")


def test_a_template_without_an_end_of_turn_gets_the_eos_token() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    renderer = Renderer(tokenizer)
    rendered = renderer.conversation(EXCHANGE)
    assert rendered.input_ids[-1] == tokenizer.eos_token_id
    assert rendered.labels[-1] == tokenizer.eos_token_id
    assert marked(renderer, rendered) == "user: What is 流感?\nassistant: «Respiratory\n<|im_end|>»"


def test_an_end_of_turn_that_is_not_eos_is_found_in_the_template() -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.eos_token = "<|end_of_text|>"
    renderer = Renderer(tokenizer)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert renderer.stop_token_ids == {eot, tokenizer.eos_token_id}
    assert renderer.conversation(EXCHANGE).labels[-1] == eot


def test_plain_text_trains_all_its_tokens_and_eos() -> None:
    tokenizer = tiny_tokenizer("llama2")
    renderer = Renderer(tokenizer)
    messages = [{"role": "text", "content": "经营者应当"}]
    rendered = renderer.conversation(messages)
    assert marked(renderer, rendered) == "<s>«经营者应当</s>»"
    check_labels(rendered, messages, renderer, "last_assistant", "r1")


@pytest.mark.parametrize("template", FORMATS)
def test_text_that_spells_a_control_token_is_refused(template: Format) -> None:
    tokenizer = tiny_tokenizer(template)
    messages = [{"role": "user", "content": f"x{tokenizer.eos_token}y"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(LabelError, match="control token"):
        Renderer(tokenizer).conversation(messages)
    with pytest.raises(LabelError, match="control token"):
        Renderer(tokenizer).prompt(messages[:1])


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(LabelError, match="writes the prompt otherwise"):
        Renderer(tokenizer).conversation(EXCHANGE)


def test_a_template_without_system_messages_says_so() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(LabelError, match="no system role") as caught:
        Renderer(tokenizer).conversation(SYSTEM)
    assert caught.value.hint is not None


def corrupt(rendered: Rendered, how: str) -> Rendered:
    ids, labels = list(rendered.input_ids), list(rendered.labels)
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    if how == "prompt trained":
        labels[first - 1] = ids[first - 1]
    elif how == "answer masked":
        labels[first] = IGNORE_INDEX
    elif how == "stop masked":
        last = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        labels[last] = IGNORE_INDEX
    elif how == "nothing trained":
        labels = [IGNORE_INDEX] * len(ids)
    elif how == "label differs":
        labels[first] = ids[first] + 1
    elif how == "two BOS":
        ids, labels = [ids[0], *ids], [IGNORE_INDEX, *labels]
    elif how == "no BOS":
        ids, labels = ids[1:], labels[1:]
    elif how == "all trained":
        labels = list(ids)
    return Rendered(ids, labels)


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize(
    "how",
    [
        "prompt trained",
        "answer masked",
        "stop masked",
        "nothing trained",
        "label differs",
        "two BOS",
        "no BOS",
        "all trained",
    ],
)
def test_every_seeded_label_fault_is_caught(template: Format, how: str) -> None:
    if template == "chatml" and how == "no BOS":
        pytest.skip("ChatML's tokenizer adds no BOS, so none can be missing")
    renderer = Renderer(tiny_tokenizer(template))
    good = renderer.conversation(SYSTEM)
    check_labels(good, SYSTEM, renderer, "last_assistant", "r1")
    with pytest.raises(LabelError, match="record r1"):
        check_labels(corrupt(good, how), SYSTEM, renderer, "last_assistant", "r1")


def long_record(words: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "fracture " * words}, {"role": "assistant", "content": "Injury"}]


def test_a_record_over_the_limit_is_left_out_and_counted() -> None:
    renderer = Renderer(tiny_tokenizer("chatml"))
    config = TrainConfig(max_seq_len=64)
    rendered, report = render_records(["a", "b"], [EXCHANGE, long_record(99)], renderer, config)
    assert len(rendered) == report.num_records == 1
    assert list(report.left_out) == ["b"] and "max_seq_len 64" in report.left_out["b"]


@pytest.mark.parametrize("template", FORMATS)
def test_cutting_a_prompt_keeps_the_answer_whole(template: Format) -> None:
    renderer = Renderer(tiny_tokenizer(template))
    config = TrainConfig(max_seq_len=64, over_length="cut_prompt")
    [rendered], report = render_records(["b"], [long_record(99)], renderer, config)
    assert report.cut_prompts == {
        "b": renderer.conversation(long_record(99), "all_assistant").num_tokens - rendered.num_tokens
    }
    assert 50 < rendered.num_tokens <= 64
    trained = [label for label in rendered.labels if label != IGNORE_INDEX]
    assert renderer.decode(trained).strip() == "Injury" and trained[-1] in renderer.stop_token_ids


def test_an_answer_that_cannot_fit_is_never_cut() -> None:
    renderer = Renderer(tiny_tokenizer("chatml"))
    long_answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "fracture " * 99}]
    config = TrainConfig(max_seq_len=64, over_length="cut_prompt")
    _, report = render_records(["a", "b"], [EXCHANGE, long_answer], renderer, config)
    assert list(report.left_out) == ["b"]


def test_a_run_in_which_nothing_fits_stops_with_a_sentence() -> None:
    renderer = Renderer(tiny_tokenizer("chatml"))
    with pytest.raises(LabelError, match="none of 1 records") as caught:
        render_records(["b"], [long_record(99)], renderer, TrainConfig(max_seq_len=64))
    assert "fracture" not in str(caught.value)


def test_pad_token_that_equals_eos_hides_no_label(smollm2: Any) -> None:
    from metier.model.load import load_tokenizer

    renderer = Renderer(load_tokenizer(smollm2))
    assert renderer.tokenizer.pad_token_id == renderer.tokenizer.eos_token_id
    rendered = renderer.conversation(EXCHANGE)
    assert rendered.labels.count(renderer.tokenizer.eos_token_id) == 1
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 流感?<|im_end|>\n<|im_start|>assistant\n«Respiratory<|im_end|>»\n"
    )
    assert marked(renderer, rendered) == expected
