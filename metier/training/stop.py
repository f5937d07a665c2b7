"""SIGTERM and Ctrl-C during training: the step is finished, a checkpoint saved, and then metier leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from metier.errors import Interrupted


class StopRequest:
    """Inside the `with`, a first signal only sets `signal_number`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise Interrupted(number, "stopped at once; the last checkpoint is intact")
        self.signal_number = number
