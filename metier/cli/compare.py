"""`metier chat --compare`: one question, the base's and the adapter's answers side by side as they come."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from metier.errors import ModelError

if TYPE_CHECKING:
    from metier.serving.models import Models
    from metier.serving.sampling import Sampling


@contextmanager
def comparing(models: Models) -> Iterator[SideBySide]:
    """The engine at work over `models`, a base and one adapter. Raises `ModelError` when there is no adapter."""
    from metier.serving.engine import Engine

    if len(models.by_name) < 2:
        raise ModelError(
            f"`{models.base.name}` is a base model, and there is nothing to compare it with", hint="name a run"
        )
    engine = Engine(models.bank, max_rows=2).start()
    try:
        yield SideBySide(models, engine)
    finally:
        engine.close()


class SideBySide:
    """Asks base and adapter the same, each with its own history, in one batch."""

    def __init__(self, models: Models, engine: Any) -> None:
        self._models = models
        self._engine = engine
        self.histories: dict[str, list[dict[str, str]]] = {name: [] for name in models.by_name}

    def ask(self, messages: list[dict[str, str]], max_new_tokens: int, sampling: Sampling) -> None:
        """Adds `messages` to both histories, shows both answers and keeps them."""
        from rich.console import Console
        from rich.live import Live

        from metier.serving.engine import Failed, Finished, Generation, Token
        from metier.serving.text import TextStream

        events: queue.Queue[tuple[str, Any]] = queue.Queue()
        renderer, stop = self._models.renderer, self._models.renderer.stop_token_ids
        streams = {name: TextStream(renderer) for name in self._models.by_name}
        answers = {name: _Side(name) for name in streams}
        generations = []
        for name, model in self._models.by_name.items():
            self.histories[name] += messages
            ids = self._ids(name, max_new_tokens)

            def sink(event: Any, name: str = name) -> None:
                events.put((name, event))

            generations.append(Generation(ids, model.adapter, max_new_tokens, stop, sampling, sink))
        self._engine.submit(*generations)
        console = Console(highlight=False)
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while not all(side.is_done for side in answers.values()):
                name, event = events.get()
                side = answers[name]
                if isinstance(event, Token):
                    side.add("" if event.id in stop else streams[name].push(event.id))
                elif isinstance(event, Finished | Failed):
                    side.end(streams[name].end())
                if console.is_terminal:
                    live.update(_columns(answers), refresh=True)
            live.update(_columns(answers), refresh=True)
        if not console.is_terminal:
            console.print()
        for name, side in answers.items():
            self.histories[name].append({"role": "assistant", "content": side.text})

    def _ids(self, name: str, max_new_tokens: int) -> list[int]:
        ids = self._models.renderer.prompt(self.histories[name])
        if len(ids) + max_new_tokens > self._engine.context:
            raise ModelError(
                f"the conversation has {len(ids)} tokens and the answer may have {max_new_tokens}, and the model has "
                f"room for {self._engine.context}",
                hint="/new starts afresh; or lower --max-new-tokens",
            )
        return ids


class _Side:
    """One model's answer as it grows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = ""
        self.num_tokens = 0
        self.is_done = False
        self._begun = self._now = time.monotonic()

    def add(self, text: str) -> None:
        self.text += text
        self.num_tokens += 1
        self._now = time.monotonic()

    def end(self, text: str) -> None:
        self.text += text
        self.is_done = True

    @property
    def stats(self) -> str:
        seconds = max(self._now - self._begun, 1e-9)
        return f"{self.num_tokens} tokens, {self.num_tokens / seconds:.1f} tok/s"


def _columns(answers: dict[str, _Side]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=True, expand=True, show_lines=False)
    for side in answers.values():
        table.add_column(f"{side.name}  ({side.stats})", ratio=1, overflow="fold")
    table.add_row(*(Text(side.text) for side in answers.values()))
    return table
