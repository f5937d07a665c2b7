"""Tries to make a refused request leave its body behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import MutableMapping
from typing import Any

from metier.serving import door
from metier.serving.metrics import Metrics


def test_a_body_over_the_cap_goes_with_its_request() -> None:
    sent: list[MutableMapping[str, Any]] = []
    pieces = [{"type": "http.request", "body": b"x" * 600, "more_body": i < 3} for i in range(4)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("a refused request came through")

    async def receive() -> MutableMapping[str, Any]:
        return pieces.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"localhost")]}
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        asyncio.run(door.Door(app, door.DoorSettings(max_body_bytes=1000), Metrics())(scope, receive, send))
        gc.collect()
        kept = [o for o in gc.garbage if inspect.isframe(o) and o.f_code.co_filename == door.__file__]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert sent[0]["status"] == 413
    assert not kept, "frames of the door, with the body in them, wait for the garbage collector"
