"""Stand-ins for the device: small, deterministic, and suspicious of what they are given."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

import numpy as np

from nexusengine.clock import Clock, VirtualClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.execute.base import ExecutorSpec
from nexusengine.execute.batch import PENDING, StepBatch, StepResult
from nexusengine.perf.registry import make_model
from nexusengine.sampling.table import SampledLogprobs
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.plan import SchedulerPolicy
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta

VOCABULARY = 97


def next_token(tokens: list[int]) -> int:
    """The fake model: the next token is a hash of everything before it."""
    digest = hashlib.blake2b(np.array(tokens, np.int32).tobytes(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCABULARY


def continuation(prompt: list[int], count: int) -> list[int]:
    """What the fake model answers, whatever the schedule."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def made_up_logprobs(tokens: np.ndarray, wanted: int) -> SampledLogprobs:
    """Token i has log-probability -i / 100; the most likely are i, i + 1, ..."""
    top_ids = tokens[:, None] + np.arange(wanted, dtype=np.int32)
    return SampledLogprobs((tokens / -100).astype(np.float32), top_ids, (top_ids / -100).astype(np.float32))


class FakeExecutor:
    """Keeps token ids where a model keeps K and V, and computes from what the block tables lead to: any mistake in
    blocks, positions or prefix reuse changes the answer or fails an assertion.

    step_s: virtual seconds a step takes. overlaps: holds two steps.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 128,
        max_batch_tokens: int = 64,
        clock: VirtualClock | None = None,
        step_s: float = 0.01,
        poison: frozenset[int] = frozenset(),
        overlaps: bool = False,
    ) -> None:
        self.spec = ExecutorSpec(
            device="fake",
            dtype="float32",
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            vocab_size=VOCABULARY,
            attention_backend="fake",
            weights_bytes=0,
            kv_bytes=0,
            overlaps=overlaps,
        )
        self.cache = np.full((num_blocks, block_size), -1, np.int64)
        self.batches: list[tuple[int, int]] = []
        self._clock, self._step_s, self.poison = clock, step_s, poison
        self._results: deque[StepResult] = deque()
        self._last: dict[int, int] = {}

    def submit(self, batch: StepBatch) -> None:
        assert len(self._results) <= self.spec.overlaps, "more steps in flight than it holds"
        assert len(batch.token_ids) == batch.counts.sum() <= self.spec.max_batch_tokens
        assert (np.diff((batch.counts > 1).astype(int)) >= 0).all(), "rows of one token come first"
        assert len(np.unique(batch.slots)) == len(batch.slots), "a slot is computed twice"
        assert (batch.starts + batch.counts <= self.spec.max_model_len).all(), "longer than the context"
        users = np.bincount(batch.block_tables.ravel(), minlength=self.spec.num_blocks)
        size, at, tokens = self.spec.block_size, 0, []
        for slot, start, count, sampled in zip(batch.slots, batch.starts, batch.counts, batch.sampled, strict=True):
            table = batch.block_tables[slot]
            for position in range(start, start + count):
                assert table[position // size] > 0, "computes into the null block"
                assert users[table[position // size]] == 1, "computes into a block that others read"
                token = int(batch.token_ids[at])
                if token == PENDING:
                    assert position == start + count - 1, "only the newest token can be unknown"
                    token = self._last[int(slot)]
                self.cache[table[position // size], position % size] = token
                at += 1
            if sampled:
                known = [int(self.cache[table[p // size], p % size]) for p in range(start + count)]
                assert min(known) >= 0, "reads a slot that was never written"
                tokens.append(-1 if self.poison & set(known) else next_token(known))
                self._last[int(slot)] = max(tokens[-1], 0)
        self.batches.append((len(batch.slots), int(batch.counts.sum())))
        wanted = int(batch.sampling.logprobs[batch.slots[batch.sampled]].max(initial=-1))
        logprobs = made_up_logprobs(np.array(tokens, np.int32), wanted) if wanted >= 0 else None
        self._results.append(StepResult(np.array(tokens, np.int32), self._step_s, logprobs))

    def collect(self) -> StepResult:
        result = self._results.popleft()
        if self._clock is not None:
            self._clock.advance(self._step_s)
        return result

    def close(self) -> None:
        self.cache[:] = -1


def make_core(
    executor: FakeExecutor | None = None,
    *,
    clock: Clock | None = None,
    policy: SchedulerPolicy | None = None,
    max_running: int = 8,
    max_waiting: int = 32,
    check_every_step: bool = True,
    **options: Any,
) -> EngineCore:
    """A core with every invariant checked after each step, unless told otherwise."""
    clock = clock or VirtualClock()
    return EngineCore(
        executor or FakeExecutor(clock=clock if isinstance(clock, VirtualClock) else None),
        policy or FCFS(),
        make_model(),
        clock=clock,
        max_running=max_running,
        max_waiting=max_waiting,
        check_every_step=check_every_step,
        **{"hash_key": b"k", **options},
    )


def request(
    request_id: str, prompt: list[int], max_tokens: int | None = 4, *, arrival_s: float = 0.0, **fields: Any
) -> EngineRequest:
    sampling = fields.pop("sampling", None) or SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=0)
    return EngineRequest(request_id, prompt, sampling, arrival_s, **fields)


def run(core: EngineCore, *, steps: int = 10_000) -> dict[str, tuple[list[int], TokenDelta]]:
    """Step until there is no work: token ids and last delta of each request that ended."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, tuple[list[int], TokenDelta]] = {}
    for _ in range(steps):
        if not core.has_work:
            return ended
        for delta in core.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                assert delta.request_id not in ended, "two ends"
                ended[delta.request_id] = (tokens[delta.request_id], delta)
    raise AssertionError(f"still at work after {steps} steps")
