"""Chat templates rendered in a child process, under caps of time and memory.

A template is a program from the checkpoint. transformers runs it in a sandbox that keeps it from files and
attributes, but not from looping for minutes or from building a string of gigabytes. Here a child with nothing else
in it renders: the same function of transformers as in training, so the text is the same; who takes longer
than SECONDS or more than MEMORY_BYTES beyond the child's own is ended, and the next conversation gets a new child.

In: messages and the tokenizer's special tokens. Out: the text. Limits: the memory cap needs Linux.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from metier.errors import LabelError

SECONDS = 2.0
MEMORY_BYTES = 64 * 2**20
# To start a child takes about a second where nothing else runs.
START_SECONDS = 60.0


class TemplateProcess:
    """Renders conversations with one child process, one at a time. Its calls may come from any thread."""

    def __init__(self, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[Mapping[str, str]], template: str, special_tokens: Mapping[str, Any], *, opening: bool
    ) -> str:
        """The conversation as text; with `opening`, the beginning of the answer behind it.

        Raises `LabelError` when the template refuses the conversation, or goes over a cap.
        """
        order = json.dumps([list(messages), template, dict(special_tokens), opening])
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = self._start()
            answer = self._ask(self._child, order)
        kind, text = answer
        if kind == "refused":
            roles = ", ".join(m["role"] for m in messages)
            raise LabelError(
                f"the model's chat template refuses the turns {roles}: {text}",
                hint="leave the system message out if the template knows none",
            )
        if kind != "text":
            raise LabelError(f"the model's chat template {text}, so it was stopped", hint="is the template genuine?")
        return text

    def close(self) -> None:
        """Ends the child."""
        with self._lock:
            if self._child is not None:
                self._end(self._child)
                self._child = None

    def _start(self) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "metier.model.template", str(self._memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
            start_new_session=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        if self._exchange(child, "", START_SECONDS) != "ready\n":
            self._end(child)
            raise LabelError("the process that renders chat templates did not start")
        return child

    def _ask(self, child: subprocess.Popen[str], order: str) -> tuple[str, str]:
        line = self._exchange(child, order + "\n", self._seconds)
        if line is None:
            self._end(child)
            return "stopped", f"took more than {self._seconds:g} s"
        if not line:
            self._end(child)
            return "stopped", f"took more than {self._memory_bytes >> 20} MiB"
        kind, text = json.loads(line)
        return str(kind), str(text)

    def _exchange(self, child: subprocess.Popen[str], text: str, seconds: float) -> str | None:
        """Writes `text`, reads a line: None after `seconds`, empty when the child died."""
        lines: list[str] = []

        def talk() -> None:
            assert child.stdin and child.stdout
            try:
                child.stdin.write(text)
                child.stdin.flush()
                lines.append(child.stdout.readline())
            except (BrokenPipeError, ValueError):
                lines.append("")

        talker = threading.Thread(target=talk, daemon=True)
        talker.start()
        talker.join(seconds)
        return lines[0] if lines else None

    def _end(self, child: subprocess.Popen[str]) -> None:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe
            # What was not written any more is of no use to anybody.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _serve(orders: IO[str], answers: IO[str], memory_bytes: int) -> None:
    """The child: one order a line, one answer a line."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    _cap_memory(memory_bytes)
    print("ready", file=answers, flush=True)
    for line in orders:
        messages, template, special_tokens, opening = json.loads(line)
        try:
            rendered = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=opening, **special_tokens,
                enable_thinking=False,
            )  # fmt: skip
            answer = ["text", rendered[0][0]]
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            answer = ["refused", str(error)[:200]]
        except (MemoryError, RecursionError):
            answer = ["stopped", "took more memory or deeper recursion than it may"]
        print(json.dumps(answer), file=answers, flush=True)


def _cap_memory(memory_bytes: int) -> None:
    status = Path("/proc/self/statm")
    if not status.exists():
        return
    import resource

    now = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory_bytes, now + memory_bytes))


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout, int(sys.argv[1]))
