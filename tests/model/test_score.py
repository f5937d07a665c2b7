"""Tries to break scoring and generation: against one plain forward pass per item, in other batches and orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metier.errors import LabelError, ModelError
from metier.model.generate import SamplingParams, generate_ids
from metier.model.load import load_base
from metier.model.lora import attach
from metier.model.score import Trie, _without_continuations
from metier.model.specialist import Specialist, load
from metier.recipe import AdapterConfig
from tests.model.tiny import save_tiny

PROMPTS = [
    "What is 流感?",
    "a",
    "The patient has asthma. " * 5,
    [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
]
CHOICES = ["Respiratory", "Resp", "Injury", "Injury of the ankle", "行政法", "a"]


@pytest.fixture(scope="module", params=["llama3", "mistral", "smollm2"])
def specialist(request: Any, tmp_path_factory: Any) -> Specialist:
    folder = save_tiny(request.param, tmp_path_factory.mktemp("base"))
    base = load_base(folder, dtype=torch.float32, device=torch.device("cpu"))
    adapter = attach(base.model, AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.normal_(std=0.1, generator=generator)
    return Specialist(base, adapter)


def plain_score(specialist: Specialist, prompt: Any, answer: str) -> float:
    """One unpacked forward pass, float64 log-softmax: the definition."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    prompt_ids = specialist.renderer.prompt(messages)
    ids = specialist.renderer.conversation([*messages, {"role": "assistant", "content": answer}]).input_ids
    end = next(i for i in range(len(prompt_ids), len(ids)) if ids[i] in specialist.renderer.stop_token_ids)
    with torch.no_grad():
        logits = specialist.base.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[t - 1, ids[t]]) for t in range(len(prompt_ids), end))


@pytest.mark.parametrize("use_adapter", [True, False])
def test_score_and_choices_equal_one_plain_pass_each(specialist: Specialist, use_adapter: bool) -> None:
    assert specialist.adapter is not None
    choices = specialist.score_choices(PROMPTS, CHOICES, use_adapter=use_adapter)
    pairs = [(p, c) for p in PROMPTS for c in CHOICES]
    scores = specialist.score([p for p, _ in pairs], [c for _, c in pairs], use_adapter=use_adapter)
    if use_adapter:
        want = [plain_score(specialist, p, c) for p, c in pairs]
    else:
        with specialist.adapter.off():
            want = [plain_score(specialist, p, c) for p, c in pairs]
    np.testing.assert_allclose(scores, want, atol=1e-4)
    np.testing.assert_allclose(choices.ravel(), want, atol=1e-4)


def test_scores_do_not_depend_on_what_shares_a_row(specialist: Specialist) -> None:
    alone = Specialist(specialist.base, specialist.adapter, max_tokens=1)
    np.testing.assert_allclose(
        specialist.score_choices(PROMPTS, CHOICES), alone.score_choices(PROMPTS, CHOICES), atol=1e-4
    )


def test_a_record_s_score_is_the_answer_with_its_end_of_turn(specialist: Specialist) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Injury"}]
    [record] = specialist.score_records([messages])
    [answer] = specialist.score(["q"], ["Injury"])
    assert record.nll > -answer and record.num_bytes == 6
    assert record.num_tokens == specialist.renderer.conversation(messages).num_loss_tokens


def test_greedy_batches_equal_single_prompts(specialist: Specialist) -> None:
    together = specialist.generate(PROMPTS, max_new_tokens=12)
    assert together == [specialist.generate([p], max_new_tokens=12)[0] for p in PROMPTS]
    assert together != specialist.generate(PROMPTS, max_new_tokens=12, use_adapter=False)


def test_generation_ends_at_the_stop_token_and_does_not_show_it(specialist: Specialist) -> None:
    # The likeliest first token is made a stop token: then the answer must end with it at once, and not show it.
    prompt = specialist.renderer.prompt([{"role": "user", "content": "a"}])
    [(_, [first])] = generate_ids(
        specialist.base, [prompt], SamplingParams(max_new_tokens=1), stop_token_ids=frozenset({0}), batch_size=1
    )
    before = specialist.renderer.stop_token_ids
    specialist.renderer.stop_token_ids = before | {first}
    try:
        [completion] = specialist.complete(["a"], max_new_tokens=30)
    finally:
        specialist.renderer.stop_token_ids = before
    assert completion.stopped and completion.num_tokens == 1 and not completion.text


def test_sampling_follows_its_seed(specialist: Specialist) -> None:
    state = torch.get_rng_state()
    draws = [specialist.generate(["a"], max_new_tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state must not move"


def test_a_prompt_longer_than_the_model_is_a_sentence(specialist: Specialist) -> None:
    with pytest.raises(ModelError, match="room for 512"):
        specialist.generate(["word " * 600], max_new_tokens=4)


def test_control_tokens_in_a_prompt_are_refused(specialist: Specialist) -> None:
    with pytest.raises(LabelError, match="control token"):
        specialist.generate([f"x {specialist.base.tokenizer.eos_token} y"])


def test_a_trie_shares_what_choices_share() -> None:
    trie = Trie.of([[1, 2, 3], [1, 2, 4], [1, 2], [5]])
    assert trie.tokens == [-1, 1, 2] and trie.parents == [-1, 0, 1]
    assert trie.edges == [[(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 4)], [(0, 1), (1, 2)], [(0, 5)]]


def test_a_choice_that_another_begins_with_leaves_it_its_probability(specialist: Specialist) -> None:
    choices = ["Inj", "Injury", "Injury, late", "Eye"]
    scores = specialist.score_choices(PROMPTS, choices)
    plain = np.array([specialist.score([p] * len(choices), choices) for p in PROMPTS])
    ids = [specialist.renderer.encode(c) for c in choices]
    assert ids[1][: len(ids[0])] == ids[0] and ids[2][: len(ids[1])] == ids[1], "the choices must be prefixes"
    want = np.exp(plain)
    want[:, :2] -= want[:, 1:3]
    np.testing.assert_allclose(np.exp(scores), want, rtol=1e-3)


def test_a_choice_that_always_goes_on_is_not_minus_infinity() -> None:
    trie = Trie.of([[1], [1, 2], [1, 2, 3], [1, 4], [5]])
    assert trie.continuations(0) == [1, 3] and trie.continuations(1) == [2] and not trie.continuations(4)
    scores = _without_continuations(np.array([[-1.0, -1.0, -9.0, -40.0, -3.0]]), trie)
    assert np.isfinite(scores).all() and scores[0, 0] < -20 and scores[0, 3] == -40


def test_load_takes_a_base_and_refuses_an_unfinished_run(tmp_path: Path) -> None:
    save_tiny("smollm2", tmp_path / "base")
    assert load(tmp_path / "base", device="cpu", precision="fp32").adapter is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("x")
    with pytest.raises(ModelError, match="no adapter yet"):
        load(tmp_path / "run")
    with pytest.raises(ModelError):
        load(tmp_path / "nowhere")


def test_the_real_model_answers_a_plain_question(smollm2: Path) -> None:
    model = load(str(smollm2), precision="fp32", device="cpu")
    assert "Paris" in model.generate(["What is the capital of France?"], max_new_tokens=12)[0]
