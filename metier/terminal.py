"""What a person sees: one live line of progress on a terminal, one line a step elsewhere. Talk goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

# Steps between two lines where there is no terminal to redraw.
LINE_EVERY_S = 10.0


class Terminal:
    """A `metier.pipeline.Ui` on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._said = 0.0
        self._started = 0.0
        self._first = 0

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def progress(self, what: str, done: int, total: int, **numbers: float) -> None:
        if what != self._what:
            self.close()
            self._what, self._started, self._said, self._first = what, time.monotonic(), 0.0, done
        line = _numbers(numbers)
        if self.console.is_terminal:
            self._redraw(what, done, total, line)
        elif done == total or time.monotonic() - self._said > LINE_EVERY_S:
            self._said = time.monotonic()
            self.say(f"{what} {done}/{total}{line}{self._time_left(done, total)}")
        if done == total:
            self.close()

    def close(self) -> None:
        """Ends the live line, if there is one."""
        if self._live:
            self._live.stop()
        self._live, self._what = None, ""

    def _redraw(self, what: str, done: int, total: int, line: str) -> None:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._live = Progress(*columns, console=self.console)
            self._task = self._live.add_task(what, total=total, line=line)
            self._live.start()
        assert self._task is not None
        self._live.update(self._task, completed=done, total=total, line=line)

    def _time_left(self, done: int, total: int) -> str:
        if done <= self._first or done == total:
            return ""
        seconds = (time.monotonic() - self._started) / (done - self._first) * (total - done)
        return f"  {int(seconds) // 60}:{int(seconds) % 60:02d} left"


class AnswerPrinter:
    """A streamer for transformers' `generate`: writes an answer to stdout as its tokens come.

    What may still change (a half-decoded character) waits for the next token.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0
        self._is_prompt = True

    def put(self, ids: Any) -> None:
        """The first call brings the prompt, each later one a token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += ids.flatten().tolist()
        text = self._decode(self._ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Called once, after the last token."""
        self._show(self._decode(self._ids) + "\n")

    def _show(self, text: str) -> None:
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = len(text)


def _numbers(numbers: dict[str, float]) -> str:
    parts = []
    for name, form in (("loss", "loss {:.4f}"), ("val_loss", "val {:.4f}"), ("learning_rate", "lr {:.2e}"),
                       ("tok_per_sec", "{:,.0f} tok/s")):  # fmt: skip
        if name in numbers:
            parts.append(form.format(numbers[name]))
    return "  " + "  ".join(parts) if parts else ""


def tokens_as_text(tokenizer: Any, input_ids: list[int], trained: list[bool], colours: bool = True) -> Text:
    """A record token by token: trained tokens on green, masked ones dim, `·` between tokens.

    Without colours, as in a file or a pipe, what is trained stands between `[[` and `]]`. Tokens that are parts of one
    character (byte-level Chinese) are shown together.
    """
    text = Text()
    start = 0
    while start < len(input_ids):
        end = start + 1
        while end < len(input_ids) and "\ufffd" in tokenizer.decode(input_ids[start:end]) and end - start < 4:
            end += 1
        piece = tokenizer.decode(input_ids[start:end], clean_up_tokenization_spaces=False).replace("\n", "\\n\n")
        if not colours and trained[start] and (start == 0 or not trained[start - 1]):
            text.append("[[")
        text.append(piece, style="black on green" if trained[start] else "dim")
        ends = trained[start] and (end == len(input_ids) or not trained[end])
        text.append("]]·" if ends and not colours else "·", style="dim")
        start = end
    return text
