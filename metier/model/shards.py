"""A frozen base shared over the processes of a training: each keeps a part of every decoder layer's bytes.

All frozen tensors of a layer (fp32, bf16, e4m3 or NF4 alike) lie in one row of bytes, of which a process keeps 1 / n.
Before a layer is computed, forward or backward, one all-gather puts the row together; the next layer's travels
meanwhile. The layers' tensors are views of two buffers, layer by layer in turn, so nothing is allocated on the way.

In: a model being loaded, in a process group that has begun. Out: its layers' tensors, whole while a pass needs them.

Limits: embeddings, final norm and head are whole in every process. Nothing frozen has a gradient, so none is reduced.
Every process must make the same number of passes: `one_pass` without a computation takes part and computes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed, nn

from metier.model.quantise import FrozenLinear

# Vector loads and FP8 products want their operands on multiples of it.
ALIGNMENT = 16


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's decoder layers, in their order."""
    count = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def when_whole(model: Any, act: Callable[[int], None]) -> Callable[[str], None]:
    """What is to hear of each parameter that is loaded: it calls `act` with a layer's number when that was its last."""
    layers, names = decoder_layers(model), {id(module): name for name, module in model.named_modules()}
    missing = [{f"{names[id(layer)]}.{name}" for name, _ in layer.named_parameters()} for layer in layers]

    def placed(name: str) -> None:
        for number, some in enumerate(missing):
            if name in some:
                some.remove(name)
                if not some:
                    act(number)

    return placed


def shards_of(model: Any) -> Shards | None:
    """How `model`'s layers are shared, or None where every process has them whole."""
    return getattr(model, "shards", None)


class Shards:
    """The decoder layers of `model`, shared over the processes once `take` has had each of them."""

    def __init__(self, model: Any) -> None:
        self.layers = list(decoder_layers(model))
        self.size, self.rank = distributed.get_world_size(), distributed.get_rank()
        self.own: dict[int, torch.Tensor] = {}
        self.rows: dict[int, torch.Tensor] = {}
        self.buffers: list[torch.Tensor | None] = [None, None]
        self._held: list[int | None] = [None, None]
        self._order: list[int] = []
        self._at = -1
        self._travelling: Any = None
        model.shards = self

    def take(self, number: int) -> None:
        """Keeps this process's part of a loaded layer, and makes its tensors views of a buffer."""
        layer = self.layers[number]
        tensors = _frozen_tensors(layer)
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        part = -(-end // (self.size * ALIGNMENT)) * ALIGNMENT
        whole = torch.zeros(part * self.size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, start in zip(tensors, starts, strict=True):
            _view(whole, start, tensor).copy_(tensor)
        self.own[number] = whole[part * self.rank : part * (self.rank + 1)].clone()
        self.rows[number] = self._row(number % 2, whole)
        for tensor, start in zip(tensors, starts, strict=True):
            tensor.data = _view(self.rows[number], start, tensor)
        layer.register_forward_pre_hook(lambda *_: self.need(number))
        layer.register_forward_hook(lambda module, inputs, output: _marked(output, self, number))

    def _row(self, buffer: int, whole: torch.Tensor) -> torch.Tensor:
        """A view of the buffer's first bytes, as many as `whole` has; the buffer grows where it is too small."""
        there = self.buffers[buffer]
        if there is None:
            there = self.buffers[buffer] = torch.empty_like(whole)
        storage = there.untyped_storage()
        if storage.nbytes() < whole.numel():
            storage.resize_(whole.numel())
        return torch.empty(0, dtype=torch.uint8, device=whole.device).set_(storage, 0, whole.shape, (1,))

    @contextlib.contextmanager
    def one_pass(self, *, backward: bool) -> Iterator[None]:
        """Inside, the layers are computed once from the first to the last, and with `backward` back to the first.

        What is not asked for inside is gathered at the end: the other processes wait for this one's part.
        """
        count = len(self.layers)
        self._order = [*range(count), *(range(count - 2, -1, -1) if backward else ())]
        self._at = -1
        yield
        while self._at < len(self._order) - 1:
            self._advance()

    @contextlib.contextmanager
    def lead(self, model: Any) -> Iterator[None]:
        """Inside, the other processes `follow` each call of `model` in this one, the first, without backward."""
        passes: list[contextlib.AbstractContextManager[None]] = []

        def before(*_: Any) -> None:
            _told(True)
            passes.append(self.one_pass(backward=False))
            passes[-1].__enter__()

        def after(*_: Any) -> None:
            passes.pop().__exit__(None, None, None)

        hooks = model.register_forward_pre_hook(before), model.register_forward_hook(after, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _told(False)

    def follow(self) -> None:
        """Gathers with the first process until its `lead` ends."""
        while _told(False):
            with self.one_pass(backward=False):
                pass

    def need(self, number: int) -> None:
        """Waits until the layer's tensors are whole; they stay so until the layer after the next is asked for."""
        if number not in self._order[max(0, self._at) :]:
            raise RuntimeError(f"layer {number} of a shared base was asked for outside of a pass")
        while self._at < 0 or self._order[self._at] != number:
            self._advance()

    def until_backward(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """`x`, the layer's output: when its gradient is there, the layer is asked for."""
        return _Mark.apply(x, self, number)  # type: ignore[no-any-return, no-untyped-call]

    def _advance(self) -> None:
        self._at += 1
        self._send(self._at)
        if self._travelling is not None:
            self._travelling.wait()
            self._travelling = None
        if self._at + 1 < len(self._order):
            self._send(self._at + 1)

    def _send(self, place: int) -> None:
        """Begins to put together the layer that stands at `place` in the order, unless it is there or on its way."""
        number = self._order[place]
        if self._held[number % 2] == number:
            return
        self._held[number % 2] = number
        # Its name since torch 2.13, and before.
        gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        self._travelling = gather(self.rows[number], self.own[number], async_op=True)


def _told(goes_on: bool) -> bool:
    """The first process's word to all."""
    box = [goes_on]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


class _Mark(torch.autograd.Function):
    """x as it is; its gradient's arrival asks for the layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards, number: int) -> torch.Tensor:
        ctx.shards, ctx.number = shards, number
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.shards.need(ctx.number)
        return grads[0], None, None


def _marked(output: Any, shards: Shards, number: int) -> Any:
    """A transformers layer's output: a tensor, or a tuple that begins with one."""
    if isinstance(output, tuple):
        return (shards.until_backward(number, output[0]), *output[1:])
    return shards.until_backward(number, output)


def _frozen_tensors(layer: nn.Module) -> list[torch.Tensor]:
    """Every tensor of the layer once, those of one role side by side, so that q/k/v and gate/up lie in one piece."""
    found: list[tuple[str, torch.Tensor]] = []
    for module in layer.modules():
        found += module.named_parameters(recurse=False)
        if isinstance(module, FrozenLinear):
            found += [(f"frozen {place}", tensor) for place, tensor in enumerate(module.frozen.tensors())]
    roles = list(dict.fromkeys(role for role, _ in found))
    return [tensor for _, tensor in sorted(found, key=lambda each: roles.index(each[0]))]


def _view(row: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return row[start : start + like.nbytes].view(like.dtype).view(like.shape)
