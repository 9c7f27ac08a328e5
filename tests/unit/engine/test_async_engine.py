"""AsyncEngine and the backend of one device in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import nexusengine.engine.async_engine
from nexusengine import wire
from nexusengine.clock import MonotonicClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.engine.async_engine import AsyncEngine, retry_on_worker_loss
from nexusengine.engine.client import Sink
from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.engine.request import merge
from nexusengine.errors import DeadlineExceeded, InternalError, InvalidRequest, Unavailable, WorkerLost
from nexusengine.tokenize import Tokenizer
from nexusengine.types import EngineRequest, RequestOutput, SamplingParams, Service, Timings, TokenDelta, TokenLogprob
from tests.api.conftest import FakeTokenizer
from tests.support.fakes import VOCABULARY, FakeExecutor, continuation, make_core

TOKENIZER: Any = FakeTokenizer()
LONG = SamplingParams(temperature=0.0, max_tokens=100)
SHORT = SamplingParams(temperature=0.0, max_tokens=5)


class GatedDevice(FakeExecutor):
    """Computes only while the gate is open; fails when `broken`. close_gate: after the next step."""

    def __init__(self) -> None:
        super().__init__(num_blocks=256)
        self.gate, self.broken, self.close_gate = threading.Event(), False, False
        self.gate.set()

    def collect(self) -> Any:
        assert self.gate.wait(10)
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        if self.close_gate:
            self.gate.clear()
        return super().collect()


@pytest.fixture
def core() -> EngineCore:
    return make_core(GatedDevice(), clock=MonotonicClock())


def device_of(core: EngineCore) -> GatedDevice:
    assert isinstance(core.executor, GatedDevice)
    return core.executor


@pytest.fixture
async def engine(core: EngineCore) -> AsyncIterator[AsyncEngine]:
    backend = LocalBackend(core, "fake")
    await backend.start()
    made = AsyncEngine.from_client(backend, TOKENIZER, VOCABULARY)
    yield made
    device_of(core).gate.set()
    await made.close()


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def gather(engine: AsyncEngine, prompt: str, sampling: SamplingParams = SHORT, **options: Any) -> str:
    return "".join([o.text async for o in engine.generate(prompt, sampling, **options)])


def answer(prompt: str, tokens: int = 5) -> str:
    return str(TOKENIZER.decode(continuation(TOKENIZER.encode(prompt), tokens)))


async def test_requests_run_side_by_side(engine: AsyncEngine) -> None:
    texts = await asyncio.gather(*(gather(engine, f"prompt {i}") for i in range(12)))
    assert texts == [answer(f"prompt {i}") for i in range(12)]


async def test_a_consumer_that_is_slow_gets_what_came_meanwhile_in_one_piece(
    engine: AsyncEngine, core: EngineCore
) -> None:
    device: Any = core.executor
    device.close_gate = True
    pieces: list[RequestOutput] = []
    async for output in engine.generate("ab", SamplingParams(temperature=0.0, max_tokens=60)):
        pieces.append(output)
        if len(pieces) == 1:
            device.close_gate = False
            device.gate.set()
            await until(lambda: engine.backend.status().ledger == 0)  # type: ignore[union-attr]
    assert len(pieces) == 2
    assert "".join(p.text for p in pieces) == answer("ab", 60)
    assert pieces[-1].timings is not None


async def test_leaving_the_iterator_aborts_the_request(engine: AsyncEngine, core: EngineCore) -> None:
    device: Any = core.executor
    device.close_gate = True
    outputs = engine.generate("ab", LONG)
    await anext(outputs)
    await outputs.aclose()
    device.close_gate = False
    device.gate.set()
    await until(lambda: not core.has_work)
    assert core.stats().finished_abort == 1


@pytest.mark.parametrize("started", [True, False])
async def test_cancelling_the_consumer_aborts_the_request(engine: AsyncEngine, core: EngineCore, started: bool) -> None:
    """Also before its first token."""
    device: Any = core.executor
    if started:
        device.close_gate = True
    else:
        device.gate.clear()
    task = asyncio.create_task(gather(engine, "ab", LONG))
    await until(lambda: core.stats().steps == started and core.has_work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    device.close_gate = False
    device.gate.set()
    await until(lambda: not core.has_work)
    assert core.stats().finished_abort == 1


async def test_abort_by_id_ends_the_iterator_with_that_reason(engine: AsyncEngine, core: EngineCore) -> None:
    device: Any = core.executor
    device.close_gate = True
    outputs = engine.generate("ab", LONG, request_id="mine")
    await anext(outputs)
    engine.abort("mine")
    device.gate.set()
    assert [o.finish_reason async for o in outputs][-1] == "abort"
    engine.abort("mine")
    engine.abort("unknown")


async def test_an_id_can_be_used_again_but_not_twice_at_a_time(engine: AsyncEngine) -> None:
    first = engine.generate("ab", SHORT, request_id="mine")
    pieces = [await anext(first)]
    with pytest.raises(InvalidRequest, match="'mine'"):
        await gather(engine, "cd", request_id="mine")
    pieces += [o async for o in first]
    assert "".join(p.text for p in pieces) == answer("ab")
    assert await gather(engine, "cd", request_id="mine") == answer("cd")


async def test_a_step_that_fails_fails_every_request_and_those_that_come_later(
    engine: AsyncEngine, core: EngineCore
) -> None:
    device_of(core).gate.clear()
    tasks = [asyncio.create_task(gather(engine, p, LONG)) for p in ("ab", "cd")]
    await until(lambda: core.has_work)
    tasks.append(asyncio.create_task(gather(engine, "ef", LONG)))  # the core has not seen this one
    await asyncio.sleep(0)
    device_of(core).broken = True
    device_of(core).gate.set()
    for outcome in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5):
        assert isinstance(outcome, InternalError)
        assert "fell off the bus" in outcome.message
    with pytest.raises(InternalError, match="fell off the bus"):
        await gather(engine, "ab")
    status = engine.backend.status()
    assert status is not None
    assert (status.workers[0].state, status.ledger) == (wire.WorkerState.GONE, 0)


async def test_closing_the_engine_ends_requests_in_flight_with_an_error(engine: AsyncEngine, core: EngineCore) -> None:
    device_of(core).close_gate = True
    outputs = engine.generate("ab", LONG)
    await anext(outputs)
    late = asyncio.create_task(gather(engine, "cd", LONG))
    await asyncio.sleep(0)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.01)
    device_of(core).gate.set()
    await closing
    with pytest.raises(Unavailable, match="closed"):
        async for _ in outputs:
            pass
    with pytest.raises(Unavailable):
        await late
    with pytest.raises(Unavailable):
        await gather(engine, "ab")


class SilentBackend:
    """Takes requests and never says anything."""

    def __init__(self) -> None:
        self.aborted: list[str] = []
        self.workers: tuple[wire.WorkerStatus, ...] | None = (self.worker(wire.WorkerState.READY, 100),)

    @staticmethod
    def worker(state: wire.WorkerState, max_model_len: int) -> wire.WorkerStatus:
        info = wire.WorkerInfo("w0", "e", 1, "cpu", "fake", max_model_len=max_model_len)
        return wire.WorkerStatus(info, state, "", 0.0, 0, None)

    async def start(self) -> None: ...

    def submit(self, request: EngineRequest, sink: Sink) -> None: ...

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def status(self) -> wire.Cluster | None:
        return None if self.workers is None else wire.Cluster("r", self.workers)

    async def ask(self, *, last_steps: int = 0, request_id: str | None = None) -> list[wire.DebugReply]:
        return []

    async def close(self) -> None: ...

    def drop(self) -> None: ...


async def test_a_request_ends_at_its_deadline_even_if_the_backend_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nexusengine.engine.async_engine, "_DEADLINE_GRACE_S", 0.05)
    backend = SilentBackend()
    engine = AsyncEngine.from_client(backend, TOKENIZER, VOCABULARY)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(gather(engine, "ab", timeout_s=0.05, request_id="mine"), 5)
    assert backend.aborted == ["mine"]


async def test_the_context_length_is_remembered_while_all_workers_start_again() -> None:
    backend = SilentBackend()
    engine = AsyncEngine.from_client(backend, TOKENIZER, VOCABULARY)
    backend.workers = ()
    with pytest.raises(Unavailable, match="no worker"):
        _ = engine.max_model_len
    backend.workers = (backend.worker(wire.WorkerState.READY, 100),)
    assert engine.max_model_len == 100
    backend.workers = (backend.worker(wire.WorkerState.STARTING, 0),)
    assert engine.max_model_len == 100
    backend.workers = None
    with pytest.raises(Unavailable, match="router"):
        _ = engine.max_model_len


async def test_a_long_text_is_tokenised_beside_the_event_loop() -> None:
    threads: list[threading.Thread] = []

    class Tokenizer(FakeTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.current_thread())
            return super().encode(text)

    engine = AsyncEngine.from_client(SilentBackend(), Tokenizer(), VOCABULARY)  # type: ignore[arg-type]
    assert await engine.encode("ab") == TOKENIZER.encode("ab")
    assert len(await engine.encode("a" * 100_000)) == 100_000
    assert [t is threading.main_thread() for t in threads] == [True, False]


def generations(*lengths: int, last: int) -> tuple[list[int], Any]:
    """A generation whose worker is lost after so many pieces at each start, and that has `last` pieces in the end."""
    started: list[int] = []

    async def start() -> AsyncGenerator[RequestOutput]:
        started.append(len(started))
        lost_after = lengths[started[-1]] if started[-1] < len(lengths) else None
        for i in range(last if lost_after is None else lost_after):
            yield RequestOutput("r", (1,), str(started[-1]), (i,), "length" if i == last - 1 else None)
        if lost_after is not None:
            raise WorkerLost("lost")

    return started, start


async def test_what_is_looked_at_only_when_complete_is_generated_again_once_if_its_worker_is_lost() -> None:
    started, start = generations(3, last=4)
    assert [(o.text, o.token_ids) async for o in retry_on_worker_loss(start)] == [("1", (i,)) for i in range(4)]
    started, start = generations(3, 2, last=4)
    with pytest.raises(WorkerLost):
        _ = [o async for o in retry_on_worker_loss(start)]
    assert started == [0, 1]


async def test_a_worker_lost_before_the_first_token_is_not_this_layers_concern() -> None:
    started, start = generations(0, last=4)
    with pytest.raises(WorkerLost):
        _ = [o async for o in retry_on_worker_loss(start)]
    assert started == [0]


def test_merged_deltas_lose_nothing() -> None:
    timings, item = Timings(0.0), TokenLogprob(1, -0.5)
    service = Service("w0", 0.5)
    first = TokenDelta("r", (1,), (item,), timings=timings, cached_tokens=8, service=service)
    plain = TokenDelta("r", (2,), (item,))
    merged = merge([first, plain, plain])
    assert merged == TokenDelta("r", (1, 2, 2), (item,) * 3, timings=timings, cached_tokens=8, service=service)
    last = TokenDelta("r", (), finish_reason="stop", stop_reason=7, timings=Timings(0.0, 1.0), cached_tokens=8)
    assert merge([first, plain, last]) == TokenDelta(
        "r", (1, 2), (item,) * 2, "stop", 7, timings=Timings(0.0, 1.0), cached_tokens=8, service=service
    )


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(backend, bos_token_id=None, eos_token_ids=())
    ran, done = 0, threading.Event()

    def other() -> None:
        nonlocal ran
        while not done.wait(0.0005):
            ran += 1

    thread = threading.Thread(target=other)
    thread.start()
    before = ran
    assert len(tokenizer.encode("word " * 100_000)) == 500_000
    during = ran - before
    done.set()
    thread.join()
    assert during > 5
