"""What every request passes before the application: key, host, size, time and number.

A pure ASGI layer. In: settings. Out: an application that refuses with OpenAI's error object, or hands on. Bodies
are read here, whole, within a cap of bytes and seconds; a client that reads too slowly is let go. The log has
method, route, status, sizes and times: never a prompt, an answer, a key or a query.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from metier.serving.answers import error_json
from metier.serving.metrics import Metrics

log = logging.getLogger("metier.access")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# They hold nothing: a static page, and whether the engine is up.
OPEN_ROUTES = frozenset({("GET", "/"), ("GET", "/health")})
_ROUTES = "/ /health /metrics /v1/models /v1/chat/completions /v1/completions /tokenize /detokenize /tokenizer_info"
ROUTES = frozenset(_ROUTES.split())
# A body up to this many times the cap is read and thrown away, so that its sender hears why; a larger one is cut off.
DRAINED = 8
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"x-frame-options", b"DENY"),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DoorSettings:
    """Who may come in and how much they may bring. `hosts` None allows every Host header (a key is required then)."""

    api_keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})
    max_body_bytes: int = 2**20
    body_seconds: float = 20.0
    send_seconds: float = 30.0
    max_requests: int = 128


class Refused(Exception):
    def __init__(self, status: int, message: str, kind: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.headers = status, message, kind, list(headers)


class TooSlow(Exception):
    """The client does not read what is sent."""


class Door:
    """The layer; one instance a server."""

    def __init__(self, app: App, settings: DoorSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._running = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        # Some clients join a base URL and a path with one slash too many.
        scope["path"] = re.sub("/{2,}", "/", scope["path"])
        given = headers.get(b"x-request-id", b"")
        visit = _Visit(send, self._settings, given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode())
        begun = time.monotonic()
        self._running += 1
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
            await self._app(scope, _replayed(body, receive), visit.send)
        except Refused as refused:
            await visit.refuse(refused)
        except TooSlow:
            log.info("%s let go: the client does not read", visit.request_id.decode())
        finally:
            self._running -= 1
            self._note(scope, visit, time.monotonic() - begun)

    def _check(self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        allowed = self._settings.hosts
        if allowed is not None and name.lower() not in allowed:
            # A page of another site may have its own name point here (DNS rebinding).
            raise Refused(403, "this server does not answer under that Host", "invalid_request_error")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2].lower() != host.lower():
            raise Refused(403, "this server does not answer pages of other origins", "invalid_request_error")
        if self._digests and (scope["method"], scope["path"]) not in OPEN_ROUTES:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            digest = hashlib.sha256(key.strip()).digest()
            matches = [hmac.compare_digest(digest, known) for known in self._digests]
            if kind.lower() != b"bearer" or not any(matches):
                raise Refused(
                    401, "a valid API key is required (Authorization: Bearer KEY)", "authentication_error",
                    [(b"www-authenticate", b"Bearer")],
                )  # fmt: skip
        if self._running > self._settings.max_requests:
            raise Refused(429, "too many requests at once", "rate_limit_error", [(b"retry-after", b"1")])

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > DRAINED * limit:
            raise _too_large(limit)
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "expected a body without Content-Encoding", "invalid_request_error", _CLOSE)
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the client went away", "invalid_request_error")
                    size += len(message.get("body", b""))
                    if size > DRAINED * limit:
                        raise _too_large(limit)
                    if size <= limit:
                        body += message.get("body", b"")
                    if not message.get("more_body"):
                        if size > limit:
                            raise _too_large(limit)
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, "the body came too slowly", "invalid_request_error", _CLOSE) from None

    def _note(self, scope: MutableMapping[str, Any], visit: _Visit, seconds: float) -> None:
        path = scope["path"]
        route = path if path in ROUTES else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
        self._metrics.count("requests_total", route=route, status=str(visit.status))
        log.info(
            "%s %s %s %s %d bytes %.0f ms", visit.request_id.decode(), scope["method"][:8], route, visit.status,
            visit.num_bytes, seconds * 1000,
        )  # fmt: skip


_CLOSE = [(b"connection", b"close")]


def _too_large(limit: int) -> Refused:
    # Made where it is raised: an error that its own frame names would keep that frame's body until the next gc.
    return Refused(413, f"the body is larger than {limit} bytes", "invalid_request_error", _CLOSE)


class _Visit:
    """One request's way out: adds the headers, counts, and ends a send that takes too long."""

    def __init__(self, send: Send, settings: DoorSettings, request_id: bytes) -> None:
        self._send = send
        self._seconds = settings.send_seconds
        self.request_id = request_id
        self.status = 0
        self.num_bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *_HEADERS, (b"x-request-id", self.request_id)]
        self.num_bytes += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            raise TooSlow from None

    async def refuse(self, refused: Refused) -> None:
        body = json.dumps(error_json(refused.message, refused.kind)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers + refused.headers})
        await self.send({"type": "http.response.body", "body": body})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that brings the body that was read, and then what comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
