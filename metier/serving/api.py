"""The HTTP routes: OpenAI's, and those that operators and evaluation tools ask. No route changes the server.

In: a `Service`. Out: a FastAPI application; `metier.serving.door` stands before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from metier.serving.answers import Answer, error_json, model_json
from metier.serving.engine import Unavailable
from metier.serving.schema import ChatRequest, CompletionRequest, DetokenizeRequest, Invalid, TokenizeRequest, parse
from metier.serving.service import AnyRequest, EngineFailed, Job, Service

PAGE = Path(__file__).with_name("page.html")
# The page holds everything it needs and may talk to nobody but this server.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FAILED = {
    "crash": "the engine failed while it worked on this request; try again",
    "deadline": "the request took longer than this server allows",
    "shutdown": "the server is stopping",
    "cancelled": "the request was cancelled",
}


def create_app(service: Service) -> FastAPI:
    """The application. Bodies are read whole: the door before it caps them."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    page = PAGE.read_text(encoding="utf-8")

    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health() -> Response:
        engine = service.engine
        return JSONResponse({"status": "down" if engine.is_down else "ok"}, 503 if engine.is_down else 200)

    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(_gauges(service)), media_type="text/plain; version=0.0.4")

    async def models() -> Any:
        listed = [model_json(m, created, service.engine.context) for m in service.models.by_name.values()]
        return {"object": "list", "data": listed}

    async def model(name: str) -> Any:
        return model_json(service.model(name), created, service.engine.context)

    async def chat(request: Request) -> Response:
        return await _answer(service, request, parse(ChatRequest, await _json(request)))

    async def completions(request: Request) -> Response:
        return await _answer(service, request, parse(CompletionRequest, await _json(request)))

    async def tokenize(request: Request) -> Any:
        return await asyncio.to_thread(_tokenize, service, parse(TokenizeRequest, await _json(request)))

    async def detokenize(request: Request) -> Any:
        asked = parse(DetokenizeRequest, await _json(request))
        service.check_ids(asked.tokens, "tokens")
        return {"prompt": service.models.renderer.tokenizer.decode(asked.tokens, clean_up_tokenization_spaces=False)}

    async def tokenizer_info() -> Any:
        tokenizer = service.models.renderer.tokenizer
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return {**tokens, "chat_template": service.models.renderer.template, "model_max_length": service.engine.context}

    routes: list[tuple[str, str, Callable[..., Awaitable[Any]]]] = [
        ("GET", "/", index), ("GET", "/health", health), ("GET", "/metrics", metrics), ("GET", "/v1/models", models),
        ("GET", "/v1/models/{name}", model), ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/completions", completions), ("POST", "/tokenize", tokenize), ("POST", "/detokenize", detokenize),
        ("GET", "/tokenizer_info", tokenizer_info),
    ]  # fmt: skip
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    _add_errors(app)
    return app


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, Invalid)
        body = error_json(error.message, "invalid_request_error", error.param, error.code)
        return JSONResponse(body, error.status)

    async def unavailable(request: Request, error: Exception) -> Response:
        assert isinstance(error, Unavailable)
        body = error_json(str(error), "server_error" if not error.is_full else "rate_limit_error", code="unavailable")
        return JSONResponse(body, 429 if error.is_full else 503, {"Retry-After": "1" if error.is_full else "5"})

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineFailed)
        return JSONResponse(_failed_json(error), 503, {"Retry-After": "1"})

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is no such route", 405: "this route has another method"}.get(error.status_code, "refused")
        return JSONResponse(error_json(what, "invalid_request_error"), error.status_code, error.headers)

    async def unforeseen(request: Request, error: Exception) -> Response:
        return JSONResponse(error_json("the server made a mistake", "server_error"), 500)

    kinds: list[tuple[Any, Any]] = [
        (Invalid, invalid), (Unavailable, unavailable), (EngineFailed, failed), (HTTPException, http),
        (RequestValidationError, http), (500, unforeseen),
    ]  # fmt: skip
    for kind, answer in kinds:
        app.add_exception_handler(kind, answer)


async def _json(request: Request) -> Any:
    """The body as JSON. Raises `Invalid`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Invalid("expected Content-Type: application/json", status=415)

    def constant(name: str) -> None:
        raise Invalid(f"the body holds {name}, which is no JSON")

    try:
        text = (await request.body()).decode()
        body = json.loads(text, parse_constant=constant)
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError:
        raise Invalid("the body is not UTF-8, or a string in it is half a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"the body is not valid JSON (line {error.lineno}, column {error.colno})") from None
    except (RecursionError, ValueError):
        raise Invalid("the body is nested too deeply, or holds a number of too many digits") from None
    return body


async def _answer(service: Service, http: Request, request: AnyRequest) -> Response:
    job = await asyncio.to_thread(service.start, request, asyncio.get_running_loop())
    answer = Answer(service, job)
    if request.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(service, job, answer), media_type="text/event-stream", headers=headers)
    watcher = asyncio.create_task(_cancel_when_gone(http, job))
    try:
        async for piece in service.pieces(job):
            answer.add(piece)
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
    return JSONResponse(answer.whole())


async def _cancel_when_gone(http: Request, job: Job) -> None:
    """Ends the work when the client hangs up; the body was read, so the next message says so."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _stream(service: Service, job: Job, answer: Answer) -> AsyncIterator[bytes]:
    """Server-sent events: chunks, then `[DONE]`; what fails on the way is told as an error event before it."""
    echoes = isinstance(job.request, CompletionRequest)
    try:
        opened = False
        async for piece in service.pieces(job):
            if not opened:
                opened = True
                for chunk in answer.opening():
                    yield _event(chunk)
            yield _event(answer.chunk(piece))
        if not opened and echoes:
            for chunk in answer.opening():
                yield _event(chunk)
        if job.request.wants_usage:
            yield _event(answer.usage_chunk())
    except EngineFailed as error:
        yield _event(_failed_json(error))
    finally:
        job.cancel()
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _failed_json(error: EngineFailed) -> dict[str, Any]:
    return error_json(FAILED[error.reason], "server_error", code=error.reason)


def _tokenize(service: Service, asked: TokenizeRequest) -> dict[str, Any]:
    if (asked.prompt is None) == (asked.messages is None):
        raise Invalid("expected either `prompt` or `messages`", "prompt")
    if asked.messages is not None:
        ids = service.prompt_ids([message.plain() for message in asked.messages])
    else:
        ids = service.models.renderer.encode(asked.prompt or "", special=asked.add_special_tokens)
    return {"count": len(ids), "max_model_len": service.engine.context, "tokens": ids}


def _gauges(service: Service) -> dict[str, float]:
    engine = service.engine
    return {
        "requests_running": engine.num_running, "requests_waiting": engine.num_waiting,
        "kv_cache_bytes": engine.cache_bytes, "engine_passes": engine.counters.passes,
        "engine_crashes": engine.counters.crashes, "engine_busy_seconds": engine.counters.seconds,
        "engine_up": 0.0 if engine.is_down else 1.0,
    }  # fmt: skip
