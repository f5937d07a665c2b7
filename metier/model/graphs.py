"""A pass as one CUDA graph: the card never waits for the host to launch the next kernel.

A graph wants fixed sizes. So a pass is padded to a bucket: tokens to at most an eighth more, and less where kernels
are long; supervised positions to an eighth, a quarter, half or all of the tokens, documents to a power of two. Padding
tokens are documents of their own and carry no loss, so that nothing of a record changes. A bucket is recorded (about
a second) when it is first met, and replayed from then on; one of long kernels and documents of several lengths, which
may not come again and for which the host is fast enough, when it has come often. All share one memory pool. Where the
memory for that is not there, passes run as they are. In a pass of several adapters the padding is the last one's, and
where each begins and ends is an input.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.nn import functional

from metier.kernels.attention import Documents
from metier.kernels.groups import Groups

MAX_GRAPHS = 48
# From this many (tokens x weights of a layer) a padding token costs more than a bucket saves (H100): finer buckets.
MUCH_WORK = 5e11
FINE_GRAIN = 256
# From here on the host keeps up, and a graph saves 20 of 300 ms a pass but takes a second to record: it is made when
# it would have paid for itself (H100, 8,192 tokens of 7B).
LONG_WORK = 1.2e12
MEETINGS = 32


class Pass(Protocol):
    """What is recorded: the losses of a pass. `layer_size` is a layer's weights."""

    recompute: Any
    layer_size: int
    ranks: tuple[int, ...]

    @property
    def drops_out(self) -> bool: ...

    def losses_of(
        self, inputs: dict[str, torch.Tensor], documents: Documents, groups: Groups | None
    ) -> torch.Tensor: ...  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of a padded pass; `lengths` are its documents', the padding's last. `equal`: see `Documents`.

    `longest` and `is_even` are those of `Groups`.
    """

    lengths: tuple[int, ...]
    num_positions: int
    num_documents: int
    max_seqlen: int
    equal: int
    longest: int = 0
    is_even: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def key(self) -> tuple[int, ...]:
        sizes = (self.num_tokens, self.num_positions, self.num_documents, self.max_seqlen, self.equal)
        return *sizes, self.longest, self.is_even


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    buffers: dict[str, torch.Tensor]
    losses: torch.Tensor


@dataclass
class GraphedPasses:
    """Replays `run`'s forward and backward; gradients are added to `parameters`' `.grad`, or where `run` adds them."""

    run: Pass
    parameters: list[torch.nn.Parameter]
    recorded: dict[tuple[Any, ...], _Recorded] = field(default_factory=dict)
    met: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    grads: list[torch.Tensor] = field(default_factory=list)
    max_seqlen: int = 128
    num_documents: int = 8
    longest: int = 0
    pool: Any = None
    stream: Any = None
    max_graphs: int = MAX_GRAPHS

    def accumulate(
        self, batch: Any, weights: torch.Tensor, spans: tuple[tuple[int, int, int], ...] = ()
    ) -> torch.Tensor | None:  # fmt: skip
        """The pass's losses [N], the gradient of their sum times `weights` [N] added; None when no graph has room.

        `spans`: see `metier.kernels.groups.Groups`.
        """
        bucket, groups = self.bucket(batch), None
        if spans:
            number, start, _ = spans[-1]
            spans = (*spans[:-1], (number, start, bucket.num_tokens))
            groups = Groups(spans, self.run.ranks).on(weights.device)
            # A power of two: shares beyond an adapter's rows cost next to nothing.
            self.longest = max(self.longest, 1 << (groups.longest - 1).bit_length())
            bucket = replace(bucket, longest=self.longest, is_even=groups.is_even)
        key = (self.run.recompute, self.run.drops_out, *bucket.key)
        self.met[key] += 1
        is_slow = not bucket.equal and bucket.num_tokens * self.run.layer_size >= LONG_WORK
        is_rare = is_slow and self.met[key] < MEETINGS
        is_new = key not in self.recorded and not is_rare
        if not self.max_graphs or (is_new and len(self.recorded) >= self.max_graphs):
            return None
        inputs = padded_inputs(batch, bucket)
        inputs["weights"] = functional.pad(weights, (0, bucket.num_positions - weights.shape[0]))
        if self.run.drops_out:
            inputs["row_keys"] = functional.pad(batch.row_keys, (0, bucket.num_tokens - batch.row_keys.shape[0]))
        if groups is not None and groups.table is not None:
            inputs["table"] = groups.table
        self._attach_grads()
        if is_rare:
            return self._once(inputs, bucket)[: weights.shape[0]]
        if is_new:
            recorded = self._record(inputs, bucket)
            if recorded is None:
                return None
            self.recorded[key] = recorded
        found = self.recorded[key]
        for name, value in inputs.items():
            found.buffers[name].copy_(value, non_blocking=True)
        found.graph.replay()
        return found.losses[: weights.shape[0]].clone()

    def give_up(self) -> bool:
        """Frees the memory of what is recorded, if anything is, and records nothing from then on."""
        had_any = bool(self.recorded)
        if had_any:
            self._stop()
        return had_any

    def _stop(self) -> None:
        self.recorded.clear()
        self.pool, self.max_graphs = None, 0

    def _once(self, inputs: dict[str, torch.Tensor], bucket: Bucket) -> torch.Tensor:
        """The padded pass, forward and backward; its losses, detached."""
        documents = Documents(inputs["cu_seqlens"], bucket.max_seqlen, None, None, bucket.equal)
        groups = None
        if "table" in inputs:
            groups = Groups((), self.run.ranks, inputs["table"], bucket.longest, bucket.is_even)
        losses = self.run.losses_of(inputs, documents, groups)
        torch.autograd.backward(losses, inputs["weights"].to(losses.dtype))
        return losses.detach()

    def bucket(self, batch: Any) -> Bucket:
        """The sizes that `batch` is padded to. The limits on documents grow and never shrink, as that on rows does."""
        total = sum(batch.lengths)
        is_long = total * self.run.layer_size >= MUCH_WORK
        grain = FINE_GRAIN if is_long else max(128, 1 << max(0, total.bit_length() - 4))
        self.max_seqlen = max(self.max_seqlen, 1 << (max(batch.lengths) - 1).bit_length())
        lengths, rest = list(batch.lengths), -total % grain
        while rest > 0:
            lengths.append(min(rest, self.max_seqlen))
            rest -= lengths[-1]
        self.num_documents = max(self.num_documents, 1 << (len(lengths) - 1).bit_length())
        num_tokens, num_loss = sum(lengths), batch.loss_targets.shape[0]
        sizes = (num_tokens // 8, num_tokens // 4, num_tokens // 2, num_tokens)
        num_positions = next(size for size in sizes if size >= num_loss)
        is_equal = min(lengths) == max(lengths) and lengths[0] % 128 == 0
        equal = lengths[0] if is_equal else 0
        return Bucket(tuple(lengths), num_positions, self.num_documents, self.max_seqlen, equal)

    def _attach_grads(self) -> None:
        """The graphs write to the same gradients each time; a step that cleared them gets them back, zeroed."""
        if not self.grads:
            self.grads = [torch.zeros_like(p) for p in self.parameters]
        if all(p.grad is g for p, g in zip(self.parameters, self.grads, strict=True)):
            return
        others = [p.grad for p in self.parameters]
        torch._foreach_zero_(self.grads)
        for parameter, grad, other in zip(self.parameters, self.grads, others, strict=True):
            if other is not None:
                grad.copy_(other)
            parameter.grad = grad

    def _record(self, inputs: dict[str, torch.Tensor], bucket: Bucket) -> _Recorded | None:
        """The pass as a graph; None, and no graphs from then on, when memory for one is not there."""
        buffers = {name: value.clone() for name, value in inputs.items()}
        buffers["weights"].zero_()  # the pass that is made before recording adds nothing to the gradients
        if self.stream is None:  # one for all, since libraries make a workspace for each stream
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # of what earlier passes took on their stream
        try:
            with torch.cuda.stream(stream):
                self._once(buffers, bucket)  # compiles what is to be compiled, and lets libraries make their workspaces
            torch.cuda.current_stream().wait_stream(stream)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            with _no_collection(), torch.cuda.graph(graph, pool=self.pool, stream=stream):
                losses = self._once(buffers, bucket)
        except RuntimeError as error:
            # Out of memory while recording: leaving the recording then fails as well, and its error comes on top.
            if not isinstance(error, torch.OutOfMemoryError) and not isinstance(
                error.__context__, torch.OutOfMemoryError
            ):
                raise
            error.__traceback__ = error.__context__ = None  # their frames hold the activations
            self._stop()
        return _Recorded(graph, buffers, losses) if self.max_graphs else None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: freeing an old graph while one is recorded breaks the recording."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def padded_inputs(batch: Any, bucket: Bucket) -> dict[str, torch.Tensor]:
    """The batch's tensors at the bucket's sizes. Positions that carry no loss have the target -100."""
    device = batch.input_ids.device
    starts = torch.tensor([0, *bucket.lengths]).cumsum(0)
    cu_seqlens = torch.full((bucket.num_documents + 1,), bucket.num_tokens, dtype=torch.int32)
    cu_seqlens[: len(starts)] = starts
    padding = bucket.lengths[len(batch.lengths) :]
    tail = torch.cat([torch.arange(n) for n in padding]) if padding else torch.zeros(0, dtype=torch.int64)
    pad = bucket.num_positions - batch.loss_targets.shape[0]
    return {
        "input_ids": functional.pad(batch.input_ids, (0, bucket.num_tokens - batch.input_ids.shape[1])),
        "position_ids": torch.cat([batch.position_ids, tail.to(device)[None]], 1),
        "positions": functional.pad(batch.loss_positions, (0, pad)),
        "targets": functional.pad(batch.loss_targets, (0, pad), value=-100),
        "cu_seqlens": cu_seqlens.to(device, non_blocking=True),
    }
