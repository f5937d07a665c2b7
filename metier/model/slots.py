"""Keys and values of many sequences in one rectangle, and a pass over any neighbouring rows of it.

A row is a sequence; position t of it lies at column t, so a row joins, grows and leaves without the others
being touched. A token attends to the columns up to its own position, hence what lies behind (padding of a
shorter prompt, an earlier tenant's values) is never seen, and is overwritten when the row gets there.

Limits: full attention only (a model with a sliding window is served up to the window's length), and memory
for the longest row in every row.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metier.model.bank import AdapterBank

# Columns are added in steps of this many, so that growing is rare.
STEP = 128


class SlotCache:
    """The rectangle. To the model it is a cache with `update`; per layer [rows, kv_heads, columns, head_dim]."""

    def __init__(self, max_tokens: int = 2**62) -> None:
        self._max_tokens = max_tokens
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._rows = self._columns = 0
        self.version = 0
        self._here: tuple[torch.Tensor, torch.Tensor, int, int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; `version` changes when they move to other memory."""
        return self._rows, self._columns

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._keys.values(), *self._values.values()))

    def reserve(self, rows: int, columns: int) -> None:
        """Makes room for `rows` sequences of `columns` tokens; what is there stays.

        It grows ahead of what is asked for while it stays within `max_tokens`, and else is cut to what is asked for.
        """
        if rows <= self._rows and columns <= self._columns:
            return
        more_rows = max(1 << max(rows - 1, 0).bit_length(), self._rows)
        more_columns = max(-(-columns // STEP) * STEP, self._columns)
        if more_rows * more_columns > self._max_tokens:
            more_rows, more_columns = rows, columns
        self._rows, self._columns = more_rows, more_columns
        self.version += 1
        for store in (self._keys, self._values):
            for layer, old in store.items():
                new = old.new_zeros(self._rows, old.shape[1], self._columns, old.shape[3])
                kept = old[: self._rows, :, : self._columns]
                new[: kept.shape[0], :, : kept.shape[2]] = kept
                store[layer] = new

    def clear(self) -> None:
        """Gives the memory back."""
        self._keys.clear()
        self._values.clear()
        self._rows = self._columns = 0
        self.version += 1
        _trim(0)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a row over another row."""
        for store in (self._keys, self._values):
            for tensor in store.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def place(self, first: int, positions: torch.Tensor, width: int) -> None:
        """The next pass writes rows from `first` on at `positions` [rows, tokens] and reads `width` columns."""
        rows = torch.arange(first, first + len(positions), device=positions.device)
        self._here = (rows[:, None], positions, first, first + len(positions), width)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Called by each attention layer with [rows, kv_heads, tokens, head_dim]; returns all that a row may see."""
        assert self._here is not None
        rows, positions, first, last, width = self._here
        seen = []
        for store, new in ((self._keys, keys), (self._values, values)):
            if layer_idx not in store:
                store[layer_idx] = new.new_zeros(self._rows, new.shape[1], self._columns, new.shape[3])
            store[layer_idx][rows, :, positions] = new.transpose(1, 2)
            seen.append(store[layer_idx][first:last, :, :width])
        return seen[0], seen[1]


# glibc keeps freed blocks of up to 32 MiB for itself; other C libraries have no such call.
_trim: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)


@torch.no_grad()
def forward_rows(
    bank: AdapterBank,
    cache: SlotCache,
    *,
    first: int,
    tokens: Sequence[Sequence[int]],
    starts: Sequence[int],
    keep: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Puts `tokens[i]` at position `starts[i]` of row `first + i`; logits [sum of kept, V] where `keep[i]` says.

    `keep[i]` are indices into `tokens[i]`. Whose adapter a row uses was said by `bank.select`.
    """
    device = bank.base.device
    length = max(len(ids) for ids in tokens)
    width = max(starts) + length
    # Any id may pad: the columns behind a row's own tokens are masked.
    input_ids = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in tokens], device=device)
    positions = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
    mask = torch.arange(width, device=device) <= positions[:, None, :, None]
    cache.place(first, positions, width)
    kept = sorted({index for indices in keep for index in indices})
    if not kept:
        kept = [0]
    logits: torch.Tensor = bank.base.model(
        input_ids=input_ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor(kept, device=device),
    ).logits
    place = {index: at for at, index in enumerate(kept)}
    rows = [row for row, indices in enumerate(keep) for _ in indices]
    columns = [place[index] for indices in keep for index in indices]
    return logits[rows, columns]


def cache_budget(bank: AdapterBank) -> int:
    """Tokens whose keys and values there is memory for: 0.6 of what a GPU has free, a quarter of a machine's."""
    config = bank.base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes: int = 2 * config.num_hidden_layers * heads * head_dim * bank.base.dtype.itemsize
    if bank.base.device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(bank.base.device)[0]) // token_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4 // token_bytes


def context_of(bank: AdapterBank, default: int = 2048) -> int:
    """Tokens that a sequence may have: the model's positions, or its sliding window where that is shorter."""
    config = bank.base.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    known = [int(n) for n in (getattr(config, "max_position_embeddings", None), window) if n]
    return min(known, default=default)
