"""The command line: one thin command per verb. Exit code 0, 2 (the user's to mend) or 1 (ours)."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from metier.cli import audit, export, judge, plan, serve, stages, sweep, use
from metier.cli.app import app
from metier.errors import Interrupted, MetierError

__all__ = ["app", "audit", "export", "judge", "main", "plan", "serve", "stages", "sweep", "use"]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, "stopped; what was complete is intact")


def main() -> None:
    """The console script: runs a command and turns errors into sentences and exit codes."""
    # Two threads that spin while they wait for each other collapse on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except MetierError as error:
        _fail(f"error: {error}", error.exit_code)
    except Interrupted as error:
        _fail(error.message, error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        # Of a file that no stage expected to fail on: a name too long, no permission to read, ...
        _fail(f"error: `{error.filename}`: {error.strerror}", MetierError.exit_code)


def _fail(text: str, exit_code: int) -> None:
    # The name of a file may hold bytes that are no text.
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.exit(exit_code)
