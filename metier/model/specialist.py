"""A model to ask: the base, with an adapter that can be switched off. What `metier.load` returns.

A prompt is a string (one user message) or a list of messages, rendered as in training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metier.artifacts import read_manifest
from metier.errors import LabelError, ModelError
from metier.model.chat import IGNORE_INDEX, Message, Renderer, eos_token_ids
from metier.model.device import Device, Precision, resolve_device, resolve_precision, storage_of, tokens_per_pass
from metier.model.generate import SamplingParams, generate_ids
from metier.model.load import Base, load_base
from metier.model.lora import Adapter, load_adapter, read_adapter_config
from metier.model.score import answer_log_probs, choice_log_probs

Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Completion:
    """`text` without the stop token, which `num_tokens` counts; `stopped` says whether the model ended by itself."""

    text: str
    num_tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """An answer's negative log-likelihood in nats with its end-of-turn token, its tokens, and its UTF-8 bytes."""

    nll: float
    num_tokens: int
    num_bytes: int


def _quiet(done: int) -> None:
    pass


class Specialist:
    """A base model and, where there is one, its adapter; `use_adapter=False` asks the base alone."""

    def __init__(self, base: Base, adapter: Adapter | None = None, max_tokens: int | None = None) -> None:
        self.base = base
        self.adapter = adapter
        self.renderer = Renderer(base.tokenizer, eos_token_ids(base.path))
        self.context: int | None = getattr(base.config, "max_position_embeddings", None)
        self.max_tokens = max_tokens or tokens_per_pass(base.device)
        base.model.eval()

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[str]:
        """The completions' texts; options as `complete` takes them."""
        return [completion.text for completion in self.complete(prompts, **options)]

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        use_adapter: bool = True,
        batch_size: int = 16,
        streamer: Any = None,
        done: Callable[[int], None] = _quiet,
        **sampling: Any,
    ) -> list[Completion]:
        """One completion a prompt, in their order; `sampling` are SamplingParams' fields.

        Raises `LabelError` when a prompt cannot be rendered and `ModelError` when it is too long.
        """
        params = SamplingParams(**sampling)
        ids = [self.renderer.prompt(_messages(prompt)) for prompt in prompts]
        longest = max((len(i) for i in ids), default=0) + params.max_new_tokens
        if self.context is not None and longest > self.context:
            raise ModelError(
                f"a prompt and its answer would take {longest} tokens, and the model has room for {self.context}",
                hint="shorten the prompt or lower max_new_tokens",
            )
        completions: list[Completion] = [Completion("", 0, False)] * len(prompts)
        stop = self.renderer.stop_token_ids
        with self._adapter(use_adapter):
            results = generate_ids(
                self.base, ids, params, stop_token_ids=stop, batch_size=batch_size, streamer=streamer
            )
            for finished, (index, new) in enumerate(results, 1):
                stopped = bool(new) and new[-1] in stop
                text = self.renderer.decode(new[:-1] if stopped else new)
                completions[index] = Completion(text, len(new), stopped)
                done(finished)
        return completions

    def continue_from(self, beginnings: Sequence[list[int]], *, use_adapter: bool, max_new_tokens: int) -> list[str]:
        """The greedy continuation of each beginning, token ids as they are, without the stop token."""
        texts = [""] * len(beginnings)
        stop = self.renderer.stop_token_ids
        with self._adapter(use_adapter):
            params = SamplingParams(max_new_tokens=max_new_tokens)
            for index, new in generate_ids(self.base, beginnings, params, stop_token_ids=stop, batch_size=16):
                texts[index] = self.renderer.decode(new)
        return texts

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], *, use_adapter: bool = True) -> list[float]:
        """Summed log-probability in nats of each answer's tokens after its prompt, without the end-of-turn token."""
        sequences = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, positions = self._answer([*_messages(prompt), {"role": "assistant", "content": answer}])
            sequences.append((ids, positions[:-1]))
        with self._adapter(use_adapter):
            values = answer_log_probs(self.base, sequences, max_tokens=self.max_tokens, done=_quiet)
        return [float(v.sum()) for v in values]

    def score_records(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        use_adapter: bool = True,
        done: Callable[[int], None] = _quiet,
    ) -> list[AnswerScore]:
        """How surprising each conversation's last answer is (or a plain text's tokens), end-of-turn token included."""
        sequences = [self._answer(messages) for messages in conversations]
        with self._adapter(use_adapter):
            values = answer_log_probs(self.base, sequences, max_tokens=self.max_tokens, done=done)
        return [
            AnswerScore(-float(v.sum()), len(v), len(messages[-1]["content"].encode()))
            for v, messages in zip(values, conversations, strict=True)
        ]

    def score_choices(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[str],
        *,
        use_adapter: bool = True,
        done: Callable[[int], None] = _quiet,
    ) -> np.ndarray:
        """Log-probability in nats of each choice as the answer to each prompt, without the end-of-turn token.

        float64 [num_prompts, num_choices]. A choice that another one begins with (宪法, 宪法相关法) has the
        probability of the answers that do not go on to the other; any other's equals `score`.
        """
        if not prompts:
            return np.zeros((0, len(choices)))
        prompt_ids = [self.renderer.prompt(_messages(prompt)) for prompt in prompts]
        # A prompt always ends with the template's opening of an answer, so a choice has the same ids behind each.
        first = _messages(prompts[0])
        choice_ids = []
        for choice in choices:
            ids, positions = self._answer([*first, {"role": "assistant", "content": choice}])
            choice_ids.append([ids[t] for t in positions[:-1]])
        with self._adapter(use_adapter):
            return choice_log_probs(self.base, prompt_ids, choice_ids, max_tokens=self.max_tokens, done=done)

    def why_not(self, messages: Sequence[Message], max_new_tokens: int) -> str | None:
        """Why a record's last answer cannot be scored and generated, or None: control tokens, or no room for it."""
        try:
            whole = self.renderer.conversation(messages).num_tokens
            prompt = 0 if messages[0]["role"] == "text" else len(self.renderer.prompt(messages[:-1]))
        except LabelError as error:
            return error.message
        longest = max(prompt + max_new_tokens, whole)
        if self.context is not None and longest > self.context:
            return f"{longest} tokens with its answer, and the model has room for {self.context}"
        return None

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` alone."""
        return len(self.renderer.encode(text))

    def _answer(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """A conversation's ids and the positions of its last answer's tokens, the stop token last."""
        rendered = self.renderer.conversation(messages)
        positions = [t for t, label in enumerate(rendered.labels) if label != IGNORE_INDEX]
        if len(positions) < 2 and messages[0]["role"] != "text":
            raise LabelError("an answer is empty once it is rendered")
        return rendered.input_ids, positions

    def _adapter(self, use_adapter: bool) -> contextlib.AbstractContextManager[None]:
        if use_adapter or self.adapter is None:
            return contextlib.nullcontext()
        return self.adapter.off()


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def load(
    run_or_base: str | Path,
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    shared: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Specialist:
    """Loads a run's folder, a PEFT adapter's folder or a base model (alias, folder, GGUF file or hub id).

    A run is loaded as it was measured: its adapter in the precision of its training, where the device has it. With
    `shared` the base's layers are divided over the processes (`metier.model.shards`). Raises `ModelError` when there is
    nothing to load there.
    """
    folder = Path(run_or_base)
    adapter_folder = next((f for f in (folder / "adapter", folder) if (f / "adapter_config.json").is_file()), None)
    if adapter_folder is None:
        if (folder / "recipe.yaml").exists():
            raise ModelError(f"the run in `{folder}` has no adapter yet", hint=f"metier run {folder / 'recipe.yaml'}")
        return Specialist(_base(str(run_or_base), None, device, precision, say))
    _, entries = read_adapter_config(adapter_folder)
    manifest = read_manifest(adapter_folder) or {}
    trained = precision_of(adapter_folder)
    stated = manifest.get("base")
    name = stated.get("name") if isinstance(stated, dict) else None
    name = name if isinstance(name, str) and name else entries.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"`{adapter_folder}` does not name its base model", hint="set `base_model_name_or_path` in it")
    same_device = manifest.get("device") == resolve_device(device).type
    as_trained = trained if precision == "auto" and same_device else precision
    base = _base(name, entries.get("revision"), device, as_trained, say, shared=shared)
    return Specialist(base, load_adapter(base.model, adapter_folder))


def precision_of(adapter_folder: Path) -> Precision:
    """The precision that an adapter was trained in; `auto` where its folder does not say."""
    names: dict[str, Precision] = {
        "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "nf4": "nf4",
    }  # fmt: skip
    return names.get(str((read_manifest(adapter_folder) or {}).get("precision")), "auto")


def _base(
    name: str, revision: str | None, device: Device, precision: Precision, say: Callable[[str], None], *,
    shared: bool = False,
) -> Base:  # fmt: skip
    where = resolve_device(device)
    return load_base(
        name, revision=revision, dtype=resolve_precision(precision, where), device=where,
        storage=storage_of(precision), shared=shared, progress=say,
    )  # fmt: skip
