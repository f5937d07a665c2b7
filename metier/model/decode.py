"""One new token for many rows in one launch: the decoding pass over the slots' rectangle as a CUDA graph.

A pass of one token a row is over 2,000 small kernels that the host launches one by one, slower than a GPU runs them.
A graph wants fixed sizes and addresses: rows are padded to a power of two, the columns that are read to another, and
ids, positions and adapters lie in buffers of their own. A size is recorded when it is first met and replayed from
then on, as long as the rectangle stays where it is. Padding rows
write where nobody has written yet: in the rectangle's last column.

Limits: a model whose pass needs the host (a rotary scale that follows the longest row) cannot be recorded; then, and on
a CPU, passes run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metier.model.bank import AdapterBank
from metier.model.slots import STEP, SlotCache, forward_rows

log = logging.getLogger(__name__)

# Rows, columns that are read, and whether a row asks for an adapter.
Size = tuple[int, int, bool]


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    buffers: torch.Tensor
    logits: torch.Tensor


class Decoder:
    """Decodes the first rows of `cache`; one instance a cache, used by one thread."""

    def __init__(self, bank: AdapterBank, cache: SlotCache) -> None:
        self._bank = bank
        self._cache = cache
        self.records = bank.base.device.type == "cuda"
        self._recorded: dict[Size, _Recorded] = {}
        self._pool: Any = None
        self._version = -1

    def decode(self, tokens: Sequence[int], starts: Sequence[int], adapters: Sequence[str | None]) -> torch.Tensor:
        """Puts `tokens[i]` at `starts[i]` of row i, under its adapter; logits [rows, V], until the next call."""
        self._bank.select(adapters)
        if self.records:
            try:
                return self._replay(tokens, starts, adapters)[: len(tokens)]
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.warning("the decoding pass cannot be recorded and runs slower: %s", type(error).__name__)
                self.records = False
                self._recorded = {}
                self._bank.select(adapters)
        return forward_rows(
            self._bank, self._cache, first=0, tokens=[[t] for t in tokens], starts=starts, keep=[[0]] * len(tokens)
        )

    def _replay(self, tokens: Sequence[int], starts: Sequence[int], adapters: Sequence[str | None]) -> torch.Tensor:
        if self._version != self._cache.version:
            # The recorded addresses are another rectangle's.
            self._recorded, self._pool = {}, torch.cuda.graph_pool_handle()
            self._version = self._cache.version
        inputs, size = self.padded(tokens, starts, adapters)
        if size not in self._recorded:
            self._recorded[size] = self._record(inputs.to(self._bank.base.device), size)
        found = self._recorded[size]
        found.buffers.copy_(inputs.pin_memory(), non_blocking=True)
        found.graph.replay()
        return found.logits

    def padded(
        self, tokens: Sequence[int], starts: Sequence[int], adapters: Sequence[str | None]
    ) -> tuple[torch.Tensor, Size]:
        """Ids, positions and adapters' numbers [3, padded rows], and the size that they are padded to."""
        rows, columns = self._cache.shape
        spare = min(1 << (len(tokens) - 1).bit_length(), rows) - len(tokens)
        width = min(max(1 << max(starts).bit_length(), STEP), columns)
        inputs = [
            [*tokens, *[0] * spare],
            [*starts, *[columns - 1] * spare],
            [*self._bank.numbers(adapters), *[-1] * spare],
        ]
        return torch.tensor(inputs), (len(inputs[0]), width, any(name is not None for name in adapters))

    def _record(self, buffers: torch.Tensor, size: Size) -> _Recorded:
        """Runs the pass once beside the main stream, as recording asks for, and records it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(buffers, size)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self.run(buffers, size)
        torch.cuda.current_stream().wait_stream(stream)
        return _Recorded(graph, buffers, logits)

    @torch.no_grad()
    def run(self, inputs: torch.Tensor, size: Size) -> torch.Tensor:
        """The pass itself: logits [padded rows, V] of `padded`'s inputs on the device."""
        _, width, has_adapters = size
        positions = inputs[1][:, None]
        self._bank.select_numbers(inputs[2] if has_adapters else None)
        self._cache.place(0, positions, width)
        logits: torch.Tensor = self._bank.base.model(
            input_ids=inputs[0][:, None],
            position_ids=positions,
            attention_mask=torch.arange(width, device=inputs.device) <= positions[:, None, :, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits[:, -1]
