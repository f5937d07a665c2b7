"""Pieces to OpenAI's JSON: whole answers, the chunks of a stream, log-probabilities, errors, the list of models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from metier.serving.models import Model
from metier.serving.sampling import TokenLogprob
from metier.serving.schema import ChatRequest, CompletionRequest
from metier.serving.service import Choice, Job, Piece, Service


def error_json(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_json(model: Model, created: int, context: int) -> dict[str, Any]:
    """An entry of /v1/models, with the lineage and how the guard is set."""
    return {
        "id": model.name, "object": "model", "created": created, "owned_by": "metier", "root": model.root,
        "parent": model.parent, "max_model_len": context, "system_fingerprint": model.fingerprint,
        "metier": {"guard": model.guard.as_json()},
    }  # fmt: skip


class Answer:
    """Writes one job's answer, whole or in chunks."""

    def __init__(self, service: Service, job: Job) -> None:
        self._service = service
        self._job = job
        self._is_chat = isinstance(job.request, ChatRequest)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._logprobs: dict[int, list[TokenLogprob]] = {c.index: [] for c in job.choices}
        self._finish: dict[int, str] = {}

    def add(self, piece: Piece) -> None:
        """Keeps what the whole answer needs of a piece; its text is kept by the choice."""
        self._logprobs[piece.index] += piece.logprobs
        if piece.finish:
            self._finish[piece.index] = piece.finish

    def whole(self) -> dict[str, Any]:
        """The response, once every choice is finished."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._whole_choice(choice) for choice in self._job.choices]
        return {**self._head(kind), "choices": choices, "usage": self._usage(), "metier": self._acts(self._job.choices)}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before any text: whose turn it is, and the echoed prompt."""
        request = self._job.request
        if self._is_chat:
            return [self._chunk(c.index, {"role": "assistant", "content": ""}, None) for c in self._job.choices]
        if isinstance(request, CompletionRequest) and request.echo:
            return [self._chunk(c.index, self._echo(c), self._echo_logprobs(c, [])) for c in self._job.choices]
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece as a chunk of the stream; the last one of a choice tells what the guard did."""
        choice = self._job.choices[piece.index]
        logprobs = None
        if self._job.request.top is not None:
            logprobs = self._chat_logprobs(piece.logprobs) if self._is_chat else self._text_logprobs(piece.logprobs)
        content: Any = piece.text
        if self._is_chat:
            content = {"content": piece.text} if piece.text or not piece.finish else {}
        chunk = self._chunk(piece.index, content, logprobs, piece.finish)
        return {**chunk, "metier": self._acts([choice])} if piece.finish else chunk

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk behind the last, when `stream_options.include_usage` asks for it."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": self._usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        model = self._job.model
        return {
            "id": self._id, "object": kind, "created": self._created, "model": model.name,
            "system_fingerprint": model.fingerprint,
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        prompt, new = self._job.prompt_tokens, self._job.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _acts(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"guard": [{"index": c.index, **c.acts.as_json()} for c in choices]}

    def _chunk(self, index: int, content: Any, logprobs: Any, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta" if self._is_chat else "text": content, "logprobs": logprobs}
        usage = {"usage": None} if self._job.request.wants_usage else {}
        return {**self._head(self._chunk_kind), "choices": [{**choice, "finish_reason": finish}], **usage}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        request, index = self._job.request, choice.index
        # What the redactor took out of the text must not stand among the tokens.
        wants = request.top is not None and not choice.acts.redacted and choice.refusal is None
        logprobs: Any = None
        if isinstance(request, ChatRequest):
            message = {"role": "assistant", "content": choice.shown, "refusal": None}
            if wants:
                logprobs = self._chat_logprobs(self._logprobs[index])
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._finish[index]}
        if wants:
            new = self._logprobs[index]
            logprobs = self._echo_logprobs(choice, new) if request.echo else self._text_logprobs(new)
        text = self._echo(choice) + choice.shown if request.echo else choice.shown
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._finish[index]}

    def _echo(self, choice: Choice) -> str:
        return self._service.models.renderer.decode(choice.prompt)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._service.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        top = self._job.request.top or 0
        content = [
            {**self._token(t.token, t.logprob), "top_logprobs": [self._token(*pair) for pair in t.top[:top]]}
            for t in logprobs
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, logprobs: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
        """OpenAI's older form; each token's own value stands among the likeliest, to the last bit."""
        names, top = self._service.token_text, self._job.request.top or 0
        tokens = [names(t.token) for t in logprobs]
        offsets = [offset]
        for text in tokens[:-1]:
            offsets.append(offsets[-1] + len(text))
        likeliest = []
        for t in logprobs:
            named: dict[str, float] = {}
            for token, value in (*t.top[:top], (t.token, t.logprob)):
                # Two tokens may be spelled alike; the likelier one keeps the name.
                named.setdefault(names(token), value)
            likeliest.append(named)
        return {
            "tokens": tokens, "token_logprobs": [t.logprob for t in logprobs],
            "top_logprobs": likeliest if top else None, "text_offset": offsets[: len(tokens)],
        }  # fmt: skip

    def _echo_logprobs(self, choice: Choice, new: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Of prompt and answer; before the first token nothing is known."""
        if self._job.request.top is None:
            return None
        first = self._service.token_text(choice.prompt[0])
        rest = self._text_logprobs([*choice.prompt_logprobs, *new], len(first))
        top = rest["top_logprobs"]
        return {
            "tokens": [first, *rest["tokens"]], "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": None if top is None else [None, *top], "text_offset": [0, *rest["text_offset"]],
        }  # fmt: skip
