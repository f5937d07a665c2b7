"""A server's life: the engine's thread, uvicorn in a second one, signals in the main thread.

SIGTERM or Ctrl-C: no new connections, the requests under way are finished (within `drain_seconds`), exit code 0.
"""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from metier.errors import RunError
from metier.model.device import Device, Precision
from metier.model.slots import cache_budget
from metier.model.template import TemplateProcess
from metier.serving.api import create_app
from metier.serving.door import Door, DoorSettings
from metier.serving.engine import Engine
from metier.serving.guard import RedactBy
from metier.serving.models import Models, open_models
from metier.serving.service import Limits, Service

# A connection that has sent no whole request head by then is closed.
HEAD_SECONDS = 15.0
MAX_CONNECTIONS = 512
BACKLOG = 128
KEY_VARIABLE = "METIER_API_KEY"
SWITCH_SECONDS = 0.0005
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# glibc's name for the number of heaps that threads take memory from (malloc.h).
M_ARENA_MAX = -8


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a server listens and how much it takes on; `api_keys` may be empty on loopback only."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_batch: int = 32
    max_waiting: int = 128
    max_new_tokens: int = 1024
    request_seconds: float = 300.0
    drain_seconds: float = 30.0


class Server:
    """One server: `start` it, `wait` for its end, `stop` it from any thread."""

    def __init__(self, models: Models, settings: ServerSettings) -> None:
        self.settings = settings
        check_exposure(settings.host, settings.api_keys)
        self.engine = Engine(
            models.bank, max_rows=settings.max_batch, max_waiting=settings.max_waiting,
            max_cache_tokens=cache_budget(models.bank),
        )  # fmt: skip
        limits = Limits(settings.max_new_tokens, settings.request_seconds)
        self.service = Service(models, self.engine, limits)
        hosts = DoorSettings().hosts if is_loopback(settings.host) else None
        door_settings = DoorSettings(settings.api_keys, hosts, max_requests=settings.max_batch + settings.max_waiting)
        door = Door(create_app(self.service), door_settings, self.service.metrics)
        config = uvicorn.Config(
            door, host=settings.host, port=settings.port, http=_PatientProtocol, ws="none", lifespan="off",
            log_config=None, access_log=False, server_header=False, date_header=False, proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS, backlog=BACKLOG, timeout_keep_alive=10,
            timeout_graceful_shutdown=int(settings.drain_seconds),
        )  # fmt: skip
        # Its own access log quotes paths and queries; the door's does not.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self._uvicorn = uvicorn.Server(config)
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def url(self) -> str:
        assert self._socket is not None
        host = self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._socket.getsockname()[1]}"

    def start(self) -> Server:
        """Listens and answers. Raises `RunError` when the address cannot be had."""
        self._socket = _listen(self.settings.host, self.settings.port)
        self.engine.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Asks for a gentle end; `wait` returns when it has come."""
        self._uvicorn.should_exit = True

    def wait(self) -> None:
        """Returns when the server has ended; the engine stops with it."""
        while self._thread.is_alive():
            # Signals are handled between two waits.
            self._thread.join(0.2)
            if self.engine.is_down:
                self.stop()
        self.engine.close(drain_seconds=1.0)
        if self.engine.is_down:
            raise RunError("the engine failed again and again, so the server has stopped", hint="see the log above")

    def _run(self) -> None:
        assert self._socket is not None
        self._uvicorn.run(sockets=[self._socket])


def serve(
    runs: Sequence[str],
    settings: ServerSettings | None = None,
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    redact_by: RedactBy | None = None,
    guarded: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Loads `runs` as `open_models` does and serves them until SIGTERM or Ctrl-C.

    Raises what loading a model raises, and `RunError` when it may not or cannot listen, or the engine stays down.
    """
    settings = settings or ServerSettings()
    check_exposure(settings.host, settings.api_keys)
    prepare_process()
    templates = TemplateProcess()
    try:
        models = open_models(
            runs,
            device=device,
            precision=precision,
            render=templates.render,
            redact_by=redact_by,
            guarded=guarded,
            say=say,
        )
        run_server(models, settings, say=say)
    finally:
        templates.close()


def run_server(models: Models, settings: ServerSettings, *, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises `RunError` when it cannot listen or the engine stays down."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    server = Server(models, settings).start()

    def stop(number: int, frame: FrameType | None) -> None:
        server.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        say(f"models: {', '.join(models.by_name)}")
        say(f"{server.url}  (the page; the API is at {server.url}/v1)")
        server.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_keys: tuple[str, ...]) -> None:
    """Raises `RunError` when others could reach the server without a key, or with a weak one."""
    if any(len(key) < 16 for key in api_keys):
        raise RunError("an API key is shorter than 16 characters", hint="openssl rand -hex 32")
    if not api_keys and not is_loopback(host):
        raise RunError(
            f"`{host}` can be reached from other machines, and no API key is set",
            hint=f"set {KEY_VARIABLE} (openssl rand -hex 32) or give --api-key-file; 127.0.0.1 needs none",
        )


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line, or else of the environment. Raises `RunError` for a file that has none."""
    if path is None:
        return tuple(key for key in os.environ.get(KEY_VARIABLE, "").split(",") if key)
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"`{path}` cannot be read: {type(error).__name__}") from None
    if not keys:
        raise RunError(f"`{path}` holds no API key", hint="one a line")
    return keys


def prepare_process() -> None:
    """Sets this process up for serving, before anything is computed: little kept back, and quick turns between threads.

    oneDNN and PyTorch's layer over it keep a kernel for each number of rows that they meet, 1,024 by default: 0.6 MB
    each, where making one takes under a millisecond. With a heap for each thread, what one frees serves no other
    (glibc; other C libraries have no such call). The engine lets the interpreter go at each of PyTorch's calls;
    were the HTTP thread to keep it for 5 ms each time, as it may by default, a GPU would wait for its next pass.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, "128")
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, 1)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on a client waits instead of being turned away, though uvicorn is still starting.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RunError(
            f"cannot listen at {host}, port {port}: {error.strerror}", hint="choose another --port"
        ) from None
    return listener


class _PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, for a while: a connection that brings no request is closed."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
