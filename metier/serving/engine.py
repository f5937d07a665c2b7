"""One thread that owns the model, and what it is asked to continue: continuous batching over base and adapters.

In: `Generation`s from any thread. Out: events to each generation's `sink`, in the engine's thread: its prompt's
log-probabilities if asked for, one `Token` each step, and at the end one `Finished` or `Failed`.

Each turn of the loop lets waiting sequences in, computes one piece of the prompts that came in last, and one token
for all others. Prompts are let in by turns, one model's after another's, so that none waits behind another's
flood; once in, all share each pass, whatever their adapter (`metier.model.bank`). A pass that fails fails those
that were in it, the memory is given back, and the loop starts again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from metier.model.bank import AdapterBank
from metier.model.decode import Decoder
from metier.model.slots import SlotCache, context_of, forward_rows
from metier.serving.sampling import Sampling, SamplingState, TokenLogprob, logprobs_of, next_tokens

log = logging.getLogger(__name__)

# Prompt positions whose logits are kept in one pass when log-probabilities of a prompt are asked for.
PROMPT_LOGPROB_TOKENS = 256
# Prompt tokens in one pass on a CPU and on a GPU: as many as keep it busy, as few as make those who stream wait little.
PREFILL_TOKENS = (256, 2048)
# After so many failed passes with no good one between them the engine stays down.
MAX_CRASHES = 3


@dataclass(frozen=True, slots=True)
class Token:
    """One new token; the stop token comes too."""

    id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the prompt's tokens from the second on."""

    tokens: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Finished:
    """`reason` is `stop` or `length`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """`reason` is `crash`, `deadline`, `cancelled` or `shutdown`."""

    reason: str


Event = Token | PromptLogprobs | Finished | Failed


class Unavailable(Exception):
    """The engine takes nothing now: its queue is full (`is_full`), it is down or it is stopping."""

    def __init__(self, message: str, *, is_full: bool = False) -> None:
        super().__init__(message)
        self.is_full = is_full


@dataclass(eq=False)
class Generation:
    """A sequence to continue. `adapter` None is the base; `deadline` is on time.monotonic's clock."""

    prompt: list[int]
    adapter: str | None
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: Sampling
    sink: Callable[[Event], None]
    wants_prompt_logprobs: bool = False
    deadline: float = float("inf")
    is_cancelled: bool = False
    num_new: int = 0
    last_token: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    state: SamplingState = field(init=False)

    def __post_init__(self) -> None:
        self.state = SamplingState.of(self.sampling)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache once the prompt is: all but the last one chosen."""
        return len(self.prompt) + max(self.num_new - 1, 0)

    @property
    def room(self) -> int:
        return len(self.prompt) + self.max_new_tokens


@dataclass
class Counters:
    """What the engine has done since it started."""

    passes: int = 0
    crashes: int = 0
    seconds: float = 0.0


class Engine:
    """Continues sequences for whoever submits them. `start` and `close` it once.

    `max_rows` sequences are computed side by side, `max_cache_tokens` bounds rows times the longest of
    them, and `max_waiting` more may wait.
    """

    def __init__(
        self, bank: AdapterBank, *, max_rows: int = 32, max_waiting: int = 128, max_cache_tokens: int = 65_536
    ) -> None:
        self.bank = bank
        self.context = min(context_of(bank), max_cache_tokens)
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.max_cache_tokens = max_cache_tokens
        self.max_prefill_tokens = PREFILL_TOKENS[bank.base.device.type == "cuda"]
        self.counters = Counters()
        self.is_down = False
        self._cache = SlotCache(max_cache_tokens)
        self._decoder = Decoder(bank, self._cache)
        self._waiting: dict[str | None, deque[Generation]] = {name: deque() for name in (None, *bank.names)}
        self._turns = deque(self._waiting)
        # In the cache's order: those that get a token each pass, and behind them the prompts under way. Several
        # prompts are computed in one pass; a long one alone, in pieces, of which `_prefilled` tokens are done.
        self._decoding: list[Generation] = []
        self._prompts: list[Generation] = []
        self._prefilled = 0
        self._wake = threading.Condition()
        self._is_stopping = False
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)

    def start(self) -> Engine:
        self._supervisor.start()
        return self

    def close(self, *, drain_seconds: float = 0.0) -> None:
        """Takes nothing more; what runs may go on for `drain_seconds`, then fails."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._supervisor.join(drain_seconds)
        if self._supervisor.is_alive():
            for generation in self._all():
                generation.is_cancelled = True
            with self._wake:
                self._wake.notify()
            self._supervisor.join(30.0)

    def submit(self, *generations: Generation) -> None:
        """Takes all of them, or none. Raises `Unavailable`."""
        with self._wake:
            if self.is_down or self._is_stopping:
                raise Unavailable("the engine is stopping" if self._is_stopping else "the engine is down")
            if self.num_waiting + len(generations) > self.max_waiting:
                raise Unavailable(f"{self.num_waiting} requests are waiting already", is_full=True)
            for generation in generations:
                self._waiting[generation.adapter].append(generation)
            self._wake.notify()

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prompts)

    @property
    def cache_bytes(self) -> int:
        return self._cache.num_bytes

    def _all(self) -> list[Generation]:
        waiting = [generation for queue in self._waiting.values() for generation in list(queue)]
        return [*self._decoding, *self._prompts, *waiting]

    def _supervise(self) -> None:
        """Runs the loop in a thread of its own, and again when it dies of an error that nobody foresaw."""
        crashes, passes_before = 0, 0
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as pool:
            while True:
                error = pool.submit(self._loop).exception()
                if error is None:
                    break
                self.counters.crashes += 1
                crashes = 1 if self.counters.passes > passes_before + 1 else crashes + 1
                passes_before = self.counters.passes
                # The error's own text may quote what was computed, so only its kind and place are told.
                where = error.__traceback__
                while where is not None and where.tb_next is not None:
                    where = where.tb_next
                line = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else "?"
                log.error("the engine's pass failed: %s at %s", type(error).__name__, line)
                self._fail_all("crash")
                if crashes >= MAX_CRASHES:
                    self.is_down = True
                    break
        self._fail_all("shutdown")

    def _fail_all(self, reason: str) -> None:
        with self._wake:
            failed = self._all()
            for queue in self._waiting.values():
                queue.clear()
            self._decoding, self._prompts, self._prefilled = [], [], 0
        self._cache.clear()
        for generation in failed:
            generation.sink(Failed(reason))

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self.num_waiting or self.num_running or self._is_stopping):
                    self._wake.wait()
                if self._is_stopping and not (self.num_waiting or self.num_running):
                    return
            begun = time.monotonic()
            self._let_go()
            self._let_in()
            if self._prompts:
                self._prefill()
            if self._decoding:
                self._decode()
            if not self.num_running and not self._decoder.records:
                # Nobody waits for a pass, so the rectangle's memory goes back; recorded passes need it where it is.
                self._cache.clear()
            self.counters.seconds += time.monotonic() - begun

    def _let_go(self) -> None:
        """Removes what was cancelled or is late, running or waiting."""
        now = time.monotonic()

        def is_gone(generation: Generation) -> bool:
            if generation.is_cancelled or now > generation.deadline:
                generation.sink(Failed("cancelled" if generation.is_cancelled else "deadline"))
                return True
            return False

        with self._wake:
            for name, queue in self._waiting.items():
                self._waiting[name] = deque(g for g in queue if not is_gone(g))
        for row in reversed(range(self.num_running)):
            if is_gone((self._decoding + self._prompts)[row]):
                self._remove(row)

    def _remove(self, row: int) -> None:
        """Takes a row out; the last decoding row takes its place, and the prompt under way that one's."""
        last = len(self._decoding) - 1
        if row > last:
            self._prompts, self._prefilled = [], 0
            return
        if row < last:
            self._cache.move(last, row, self._decoding[last].length)
            self._decoding[row] = self._decoding[last]
        self._decoding.pop()
        if self._prompts:
            self._cache.move(last + 1, last, self._prefilled)

    def _let_in(self) -> None:
        """Starts on prompts when none is under way, one model's after another's."""
        if self._prompts:
            return
        group: list[Generation] = []
        with self._wake:
            while self.num_waiting:
                queue = self._waiting[self._turns[0]]
                if queue and not self._fits(queue[0], group):
                    break
                if queue:
                    group.append(queue.popleft())
                self._turns.rotate(-1)
            self._prompts = group
        room = max((g.room for g in self._decoding + group), default=0)
        # Recorded passes are lost when the rectangle grows, so it is as high as it will be from the start.
        is_high = self._decoder.records and self.max_rows * room <= self.max_cache_tokens
        self._cache.reserve(self.max_rows if group and is_high else self.num_running, room)

    def _fits(self, generation: Generation, group: list[Generation]) -> bool:
        """Whether a waiting sequence has room beside those that run, and in one pass with the group's prompts."""
        running = [*self._decoding, *group, generation]
        room = max(g.room for g in running)
        if len(running) > self.max_rows or (len(running) > 1 and len(running) * room > self.max_cache_tokens):
            return False
        prompts = [len(g.prompt) for g in (*group, generation)]
        return not group or (
            generation.wants_prompt_logprobs == group[0].wants_prompt_logprobs
            and len(prompts) * max(prompts) <= self._prefill_budget(generation)
        )

    def _prefill_budget(self, generation: Generation) -> int:
        return PROMPT_LOGPROB_TOKENS if generation.wants_prompt_logprobs else self.max_prefill_tokens

    def _prefill(self) -> None:
        """One pass over the prompts under way; who is through gets its first token."""
        group, start = self._prompts, self._prefilled
        end = start + self._prefill_budget(group[0])
        pieces = [g.prompt[start:end] for g in group]
        # The last token of a prompt, and for prompt log-probabilities every token behind which one is known.
        keep = [
            list(range(len(piece))) if g.wants_prompt_logprobs else [len(piece) - 1][: len(g.prompt) <= end]
            for g, piece in zip(group, pieces, strict=True)
        ]
        self.bank.select([g.adapter for g in group])
        logits = forward_rows(
            self.bank, self._cache, first=len(self._decoding), tokens=pieces, starts=[start] * len(group), keep=keep
        )
        self.counters.passes += 1
        last_rows, seen = [], 0
        for generation, kept in zip(group, keep, strict=True):
            seen += len(kept)
            last_rows.append(seen - 1)
            targets = generation.prompt[start + 1 : end + 1]
            if generation.wants_prompt_logprobs and targets:
                rows = logits[seen - len(kept) :][: len(targets)]
                generation.prompt_logprobs += logprobs_of(rows, targets, generation.sampling.top_logprobs or 0)
        self._prefilled = end
        if all(len(g.prompt) <= end for g in group):
            self._begin(group, logits[last_rows])

    def _begin(self, group: list[Generation], logits: torch.Tensor) -> None:
        """Moves prompts that are through among those that get a token each pass; the first one comes of `logits`."""
        first = len(self._decoding)
        self._decoding += group
        self._prompts, self._prefilled = [], 0
        for generation in group:
            if generation.wants_prompt_logprobs:
                generation.sink(PromptLogprobs(generation.prompt_logprobs))
        self._emit(logits, first)

    def _decode(self) -> None:
        """One token for every sequence whose prompt is through."""
        rows = self._decoding
        logits = self._decoder.decode([g.last_token for g in rows], [g.length for g in rows], [g.adapter for g in rows])
        self.counters.passes += 1
        self._emit(logits, 0)

    def _emit(self, logits: torch.Tensor, first: int) -> None:
        """Chooses a token for the rows from `first` on by `logits` [rows, V], tells it, lets the done ones go."""
        rows = self._decoding[first:]
        tokens = next_tokens(logits, [g.state for g in rows])
        asked = [i for i, g in enumerate(rows) if g.sampling.top_logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            top = max(rows[i].sampling.top_logprobs or 0 for i in asked)
            found = logprobs_of(logits[asked], [tokens[i] for i in asked], top)
            logprobs = dict(zip(asked, found, strict=True))
        for i in reversed(range(len(rows))):
            generation, token = rows[i], tokens[i]
            reason = "length"
            if generation.max_new_tokens:
                generation.num_new += 1
                generation.last_token = token
                generation.sink(Token(token, logprobs.get(i)))
                reason = "stop" if token in generation.stop_token_ids else "length"
            if reason == "stop" or generation.num_new >= generation.max_new_tokens:
                generation.sink(Finished(reason))
                self._remove(first + i)
