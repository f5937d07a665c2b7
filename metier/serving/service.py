"""From a request to its answers: prompts to token ids, ids to the engine, its events to guarded text.

In: `ChatRequest` or `CompletionRequest`. Out: `Piece`s of choices as they come; `metier.serving.api` writes them
as OpenAI's JSON. A request that cannot be answered raises `Invalid` before the engine hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from metier.errors import LabelError, did_you_mean
from metier.serving.engine import Engine, Event, Failed, Finished, Generation, PromptLogprobs, Token, Unavailable
from metier.serving.guard import Acts
from metier.serving.metrics import Metrics
from metier.serving.models import Model, Models
from metier.serving.sampling import Sampling, TokenLogprob
from metier.serving.schema import ChatRequest, CompletionRequest, Invalid
from metier.serving.text import StopStrings, TextStream, TokenTexts

AnyRequest = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request may ask for: new tokens in each choice, and seconds until it is through."""

    max_new_tokens: int = 1024
    request_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of choice `index`; `finish` is its finish_reason when it is the last one."""

    index: int
    text: str
    logprobs: list[TokenLogprob]
    finish: str | None = None

    def then(self, later: Piece) -> Piece:
        """Both as one."""
        return Piece(self.index, self.text + later.text, self.logprobs + later.logprobs, later.finish)


@dataclass
class Choice:
    """One choice under way: its generation (None when it was refused), its text's stages and what the guard did."""

    index: int
    prompt: list[int]
    request: str
    acts: Acts
    generation: Generation | None = None
    refusal: str | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    shown: str = ""
    num_new: int = 0
    is_done: bool = False


Events = asyncio.Queue[tuple[Choice, Event]]


@dataclass
class Job:
    """A request under way."""

    model: Model
    request: AnyRequest
    choices: list[Choice]
    events: Events
    begun: float

    def cancel(self) -> None:
        """Tells the engine that nobody waits any longer."""
        for choice in self.choices:
            if choice.generation is not None:
                choice.generation.is_cancelled = True

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(len(c.prompt) for c in self.choices[:: self.request.n])

    @property
    def completion_tokens(self) -> int:
        return sum(c.num_new for c in self.choices)


class EngineFailed(Exception):
    """The engine gave the request up; `reason` is that of `Failed`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Service:
    """Answers requests with the models of one server."""

    def __init__(self, models: Models, engine: Engine, limits: Limits | None = None) -> None:
        self.models = models
        self.engine = engine
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.token_text = TokenTexts(models.renderer.tokenizer)
        self._outbox: Outbox | None = None
        self.num_embeddings: int = models.bank.base.model.get_input_embeddings().num_embeddings

    def model(self, name: str) -> Model:
        """Raises `Invalid` (404) for a name that is not served."""
        if name not in self.models.by_name:
            known = list(self.models.by_name)
            raise Invalid(
                f"there is no model `{name[:64]}`{did_you_mean(name[:64], known)}; there is {', '.join(known)}",
                "model", code="model_not_found", status=404,
            )  # fmt: skip
        return self.models.by_name[name]

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's ids, rendered as in training. Raises `Invalid` when the template refuses it."""
        try:
            return self.models.renderer.prompt(messages)
        except LabelError as error:
            raise Invalid(error.message, "messages") from None

    def start(self, request: AnyRequest, loop: asyncio.AbstractEventLoop) -> Job:
        """Hands a request to the engine; may block for a while (a long prompt), so it is called in a thread.

        Raises `Invalid` and `Unavailable`.
        """
        model = self.model(request.model)
        if request.stream and request.top is not None and model.guard.redacts:
            raise Invalid(
                "`logprobs` cannot be streamed while personal data is redacted: tokens would tell what was taken out",
                "logprobs", code="unsupported_parameter",
            )  # fmt: skip
        if self._outbox is None or self._outbox.loop is not loop:
            self._outbox = Outbox(loop)
        events: Events = asyncio.Queue()
        seed = random.getrandbits(62) if request.seed is None else request.seed
        choices: list[Choice] = []
        for ids, text in self._prompts(request):
            max_new = self._max_new(request, len(ids))
            for number in range(request.n):
                choice = Choice(len(choices), ids, text, Acts())
                choices.append(choice)
                is_scoring = isinstance(request, CompletionRequest) and request.echo and max_new <= 1
                choice.refusal = None if is_scoring else model.guard.refusal(text, choice.acts)
                if choice.refusal is None:
                    choice.generation = self._generation(request, choice, model, max_new, seed + number)
                    choice.generation.sink = self._outbox.sink(events, choice)
        self.engine.submit(*(c.generation for c in choices if c.generation is not None))
        return Job(model, request, choices, events, time.monotonic())

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """The choices' pieces as they come. Raises `EngineFailed`."""
        writers = {c.index: _Writer(self, job, c) for c in job.choices}
        running = len(job.choices)
        try:
            for choice in job.choices:
                if choice.refusal is not None:
                    choice.shown, running = choice.refusal, running - 1
                    yield Piece(choice.index, choice.refusal, [], "content_filter")
            while running:
                # What came meanwhile goes out in one piece a choice: the faster the engine, the longer the pieces.
                events = [await job.events.get()]
                while not job.events.empty():
                    events.append(job.events.get_nowait())
                for piece in self._joined(job, writers, events):
                    running -= piece.finish is not None
                    yield piece
        finally:
            job.cancel()
            self._account(job)

    def _joined(self, job: Job, writers: dict[int, _Writer], events: list[tuple[Choice, Event]]) -> Iterator[Piece]:
        """What `events` complete, one piece a choice at most. Raises `EngineFailed` behind them."""
        is_chat = isinstance(job.request, ChatRequest)
        ready: dict[int, Piece] = {}
        failed = next((event for choice, event in events if isinstance(event, Failed) and not choice.is_done), None)
        for choice, event in events:
            if choice.is_done or isinstance(event, Failed):
                continue
            if isinstance(event, Token) and not job.completion_tokens:
                self.metrics.observe("time_to_first_token_seconds", time.monotonic() - job.begun)
            piece = writers[choice.index].take(event, is_chat=is_chat)
            if piece is not None:
                choice.shown += piece.text
                ready[choice.index] = ready[choice.index].then(piece) if choice.index in ready else piece
        yield from ready.values()
        if failed is not None:
            raise EngineFailed(failed.reason)

    def _account(self, job: Job) -> None:
        name = job.model.name
        self.metrics.count("prompt_tokens_total", job.prompt_tokens, model=name)
        self.metrics.count("completion_tokens_total", job.completion_tokens, model=name)
        self.metrics.observe("request_seconds", time.monotonic() - job.begun)
        for choice in job.choices:
            for entity, number in choice.acts.redacted.items():
                self.metrics.count("redacted_total", number, entity=entity)
            if choice.acts.refused:
                self.metrics.count("refused_total", domain=choice.acts.refused)

    def _prompts(self, request: AnyRequest) -> list[tuple[list[int], str]]:
        """The ids of each prompt, and the text that the guard reads."""
        renderer = self.models.renderer
        if isinstance(request, ChatRequest):
            messages = [message.plain() for message in request.messages]
            asked = "\n".join(m["content"] for m in messages if m["role"] == "user")
            return [(self.prompt_ids(messages), asked)]
        prompts: list[tuple[list[int], str]] = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                prompts.append((renderer.encode(prompt, special=True), prompt))
            else:
                self.check_ids(prompt, "prompt")
                prompts.append((prompt, renderer.decode(prompt)))
        return prompts

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises `Invalid` when one of `ids` is no token of the model."""
        if ids and max(ids) >= self.num_embeddings:
            raise Invalid(f"`{param}` holds the id {max(ids)}, and ids end at {self.num_embeddings - 1}", param)

    def _max_new(self, request: AnyRequest, length: int) -> int:
        """New tokens at most. Raises `Invalid`, with the lengths, when prompt and answer do not fit."""
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        context, asked = self.engine.context, request.max_new_tokens
        if not length:
            raise Invalid(f"`{param}` has no tokens", param)
        if asked is not None and asked > self.limits.max_new_tokens:
            raise Invalid(
                f"{asked} new tokens are asked for, and this server gives {self.limits.max_new_tokens}", "max_tokens"
            )
        if length + (1 if asked is None else asked) > context:
            new = "" if asked is None else f" and {asked} new ones are asked for"
            raise Invalid(
                f"the prompt has {length} tokens{new}, and the model has room for {context} in all",
                param, code="context_length_exceeded",
            )  # fmt: skip
        return min(self.limits.max_new_tokens, context - length) if asked is None else asked

    def _generation(self, request: AnyRequest, choice: Choice, model: Model, max_new: int, seed: int) -> Generation:
        bias = {int(key): value for key, value in request.logit_bias.items()}
        self.check_ids(list(bias), "logit_bias")
        return Generation(
            choice.prompt, model.adapter, max_new, self.models.renderer.stop_token_ids,
            Sampling(
                temperature=request.temperature, top_p=request.top_p, seed=seed, logit_bias=bias,
                presence_penalty=request.presence_penalty, frequency_penalty=request.frequency_penalty,
                top_logprobs=request.top,
            ),
            sink=lambda event: None,
            wants_prompt_logprobs=isinstance(request, CompletionRequest) and request.echo and request.top is not None,
            deadline=time.monotonic() + self.limits.request_seconds,
        )  # fmt: skip


class _Writer:
    """One choice's events to pieces: whole characters, ended at a stop string, without personal data."""

    def __init__(self, service: Service, job: Job, choice: Choice) -> None:
        self._choice = choice
        self._guard = job.model.guard
        self._stop_ids = service.models.renderer.stop_token_ids
        self._text = TextStream(service.models.renderer)
        self._stops = StopStrings(job.request.stops)
        self._redactor = self._guard.redactor(choice.acts)
        self._logprobs: list[TokenLogprob] = []

    def take(self, event: Event, *, is_chat: bool) -> Piece | None:
        """The piece that `event` completes, if it does."""
        if isinstance(event, PromptLogprobs):
            self._choice.prompt_logprobs = event.tokens
            return None
        text, reason = "", None
        if isinstance(event, Token):
            self._choice.num_new += 1
            is_stop = event.id in self._stop_ids
            if event.logprob is not None and not (is_stop and is_chat):
                self._logprobs.append(event.logprob)
            if not is_stop:
                text = self._stops.push(self._text.push(event.id))
        elif isinstance(event, Finished):
            text, reason = self._stops.push(self._text.end()), event.reason
            text += self._stops.end()
        if self._stops.is_hit:
            reason = "stop"
        shown = self._redactor.push(text)
        if reason is not None:
            shown += self._end(is_chat=is_chat, shown=shown)
        elif not shown:
            return None
        logprobs, self._logprobs = self._logprobs, []
        return Piece(self._choice.index, shown, logprobs, reason)

    def _end(self, *, is_chat: bool, shown: str) -> str:
        """The rest of the text, and the domain's notice."""
        choice = self._choice
        choice.is_done = True
        if choice.generation is not None:
            choice.generation.is_cancelled = True
        rest = self._redactor.end()
        notice = self._guard.notice(choice.request, choice.shown + shown + rest, choice.acts) if is_chat else ""
        return rest + notice


class Outbox:
    """From the engine's thread to the loop's: what one pass brings, for however many requests, wakes the loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pending: deque[tuple[Events, Choice, Event]] = deque()
        self._is_awake = False

    def sink(self, events: Events, choice: Choice) -> Callable[[Event], None]:
        """Puts what it is called with into `events`, in the loop's thread."""

        def put(event: Event) -> None:
            self._pending.append((events, choice, event))
            if not self._is_awake:
                self._is_awake = True
                # The loop may be gone when the server is stopped in the middle of an answer.
                with contextlib.suppress(RuntimeError):
                    self.loop.call_soon_threadsafe(self._deliver)

        return put

    def _deliver(self) -> None:
        # First: what is put while this empties the queue wakes the loop again.
        self._is_awake = False
        while self._pending:
            events, choice, event = self._pending.popleft()
            events.put_nowait((choice, event))


__all__ = ["EngineFailed", "Invalid", "Job", "Limits", "Piece", "Service", "Unavailable"]
