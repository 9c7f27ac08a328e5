"""Engine called by several threads, closed by whatever thread, and looked at from a fork of its process."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import nexusengine.engine.offline
from nexusengine import Engine, SamplingParams
from nexusengine.clock import MonotonicClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.errors import Unavailable
from nexusengine.scheduler.registry import make_policy
from tests.api.conftest import FakeTokenizer
from tests.support.fakes import VOCABULARY, FakeExecutor, continuation, make_core

TOKENIZER: Any = FakeTokenizer()
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


class Device(FakeExecutor):
    """The fake device. `happens` is called once, in the middle of a step; entered by two threads, it fails."""

    happens: Callable[[], None] | None = None
    stepping: int | None = None

    def submit(self, batch: Any) -> None:
        assert self.stepping is None, "two threads step at once"
        self.stepping = threading.get_ident()
        if self.happens is not None:
            happens, self.happens = self.happens, None
            happens()
        time.sleep(0)  # another thread's turn, if it is to have one
        super().submit(batch)

    def collect(self) -> Any:
        assert self.stepping == threading.get_ident()
        result = super().collect()
        self.stepping = None
        return result


@pytest.fixture
def core() -> EngineCore:
    device = Device(num_blocks=512, max_batch_tokens=256)
    return make_core(device, clock=MonotonicClock(), policy=make_policy("lens"), max_waiting=4)


def device_of(core: EngineCore) -> Device:
    assert isinstance(core.executor, Device)
    return core.executor


@pytest.fixture
def engine(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(nexusengine.engine.offline, "make_local", lambda config: (core, TOKENIZER, VOCABULARY))
    with Engine("fake", devices="cpu") as made:
        yield made


def answer(prompt: list[int], tokens: int = 6) -> tuple[int, ...]:
    return tuple(continuation(prompt, tokens))


def in_threads(*work: Callable[[], None]) -> None:
    """Each in a thread of its own, to the end. Raises what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def test_threads_get_their_own_answers_and_share_the_batch(engine: Engine, core: EngineCore) -> None:
    def caller(number: int) -> Callable[[], None]:
        def work() -> None:
            for turn in range(5):
                prompts = [[number, turn, i] for i in range(3 + number)]
                if turn % 2:
                    pieces = list(engine.generate(prompts, GREEDY, stream=True))
                    found = [
                        tuple(t for p in pieces if p.metadata["index"] == i for t in p.token_ids)
                        for i in range(len(prompts))
                    ]
                else:
                    found = [o.token_ids for o in engine.generate(prompts, GREEDY)]
                assert found == [answer(p) for p in prompts]

        return work

    in_threads(*(caller(n) for n in range(4)))
    assert not core.has_work
    alone = [n for n, _ in device_of(core).batches if n > 6]
    assert alone, "no step had rows of two callers"


def test_a_stream_held_open_in_one_thread_holds_up_no_other(engine: Engine, core: EngineCore) -> None:
    news = engine.generate([[1, 2], [3, 4]], GREEDY, stream=True)
    held = [next(news)]
    in_threads(*[lambda: check(engine.generate([[5, 6]], GREEDY)[0].token_ids == answer([5, 6]))] * 3)
    held += news
    for index, prompt in enumerate(([1, 2], [3, 4])):
        assert tuple(t for p in held if p.metadata["index"] == index for t in p.token_ids) == answer(prompt)
    assert not core.has_work


def check(value: bool) -> None:
    assert value


def test_a_stream_begun_in_one_thread_can_be_consumed_and_closed_in_others(engine: Engine, core: EngineCore) -> None:
    news: Any = engine.generate([[1, 2]], SamplingParams(temperature=0.0, max_tokens=60), stream=True)
    in_threads(lambda: check(bool(next(news).token_ids)))
    in_threads(news.close)
    assert not core.has_work


def test_a_stream_dropped_within_a_step_is_aborted_and_breaks_nothing(engine: Engine, core: EngineCore) -> None:
    """As the garbage collector does when it runs there: in the thread that steps, and in another meanwhile."""
    long = SamplingParams(temperature=0.0, max_tokens=90)

    def dropped_by(drop: Callable[[Callable[[], None]], None]) -> None:
        streams: list[Any] = [engine.generate([[1, 2], [3]], long, stream=True)]
        next(streams[0])
        device_of(core).happens = lambda: drop(streams.clear)
        assert engine.generate([[5, 6]], GREEDY)[0].token_ids == answer([5, 6])
        assert not core.has_work

    dropped_by(lambda clear: clear())
    dropped_by(lambda clear: in_threads(clear))
    assert core.stats().finished_abort == 4


def test_close_ends_what_other_threads_wait_for(engine: Engine, core: EngineCore) -> None:
    news = engine.generate([[1, 2]], GREEDY, stream=True)
    next(news)
    in_threads(engine.close)
    (last,) = list(news)
    assert isinstance(last.error, Unavailable)
    with pytest.raises(Unavailable, match="closed"):
        engine.generate([[1, 2]], GREEDY)


def test_a_signal_handler_that_closes_the_engine_does_not_deadlock(engine: Engine, core: EngineCore) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: engine.close())
    try:
        device_of(core).happens = lambda: signal.raise_signal(signal.SIGUSR1)
        (output,) = engine.generate([[1, 2]], GREEDY)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert isinstance(output.error, Unavailable)


def test_a_signal_handler_that_generates_within_a_step_is_told_so(engine: Engine, core: EngineCore) -> None:
    said: list[str] = []

    def handle(number: int, frame: object) -> None:
        with pytest.raises(Unavailable) as caught:
            engine.generate([[7]], GREEDY)
        said.append(caught.value.message)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        device_of(core).happens = lambda: signal.raise_signal(signal.SIGUSR1)
        assert engine.generate([[1, 2]], GREEDY)[0].token_ids == answer([1, 2])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert said == ["the engine was called by a signal handler that interrupted one of its own steps"]


def test_a_deleted_engine_leaves_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(Device(num_blocks=64), clock=MonotonicClock())
    monkeypatch.setattr(
        nexusengine.engine.offline, "make_local", lambda config, core=core: (core, TOKENIZER, VOCABULARY)
    )
    engine = Engine("fake", devices="cpu")
    engine.generate([[1, 2]], GREEDY)
    gone = weakref.ref(core)
    monkeypatch.undo()
    gc.disable()
    try:
        del engine, core
        assert gone() is None, "only the garbage collector would find it"
    finally:
        gc.enable()


def result_in_a_fork(work: Callable[[], object]) -> str:
    """What it returns or raises, as text."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = f"{work()}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writes, text.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def test_a_fork_is_told_that_the_engine_is_not_its_own(engine: Engine, core: EngineCore) -> None:
    news = engine.generate([[1, 2]], GREEDY, stream=True)
    next(news)
    for work in (
        lambda: engine.generate([[1, 2]], GREEDY),
        lambda: next(engine.generate([[1, 2]], GREEDY, stream=True)),
        lambda: list(news),
        engine.stats,
        lambda: engine.max_model_len,
    ):
        said = result_in_a_fork(work)
        assert said.startswith(f"Unavailable: this engine was made in process {os.getpid()} and cannot be used in")
    assert result_in_a_fork(engine.close) == "None"
    assert len(list(news)) > 1
    with pytest.raises(TypeError, match="cannot be pickled: it belongs to process"):
        pickle.dumps(engine)


# ---- AsyncEngine ----------------------------------------------------------------------------------------------------


async def started() -> AsyncEngine:
    core = make_core(Device(num_blocks=256), clock=MonotonicClock())
    backend = LocalBackend(core, "fake")
    await backend.start()
    return AsyncEngine.from_client(backend, TOKENIZER, VOCABULARY)


async def tokens(engine: AsyncEngine) -> tuple[int, ...]:
    return tuple([t async for o in engine.generate([1, 2], GREEDY) for t in o.token_ids])


async def test_an_async_engine_is_of_one_event_loop() -> None:
    engine = await started()
    assert await tokens(engine) == answer([1, 2])

    def elsewhere() -> None:
        with pytest.raises(Unavailable, match="AsyncEngine was started in an event loop that is another; use it in"):
            asyncio.run(tokens(engine))
        with pytest.raises(Unavailable, match="AsyncEngine"):
            asyncio.run(engine.close())

    await asyncio.to_thread(elsewhere)
    assert await tokens(engine) == answer([1, 2])
    await engine.close()


def test_an_async_engine_whose_event_loop_has_ended_says_so_and_can_be_closed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def begin() -> AsyncEngine:
        engine = await started()
        assert await tokens(engine) == answer([1, 2])
        return engine

    engine = asyncio.run(begin())
    with pytest.raises(Unavailable, match="an event loop that has ended"):
        asyncio.run(tokens(engine))
    asyncio.run(engine.close())
    assert capfd.readouterr().err == ""


async def test_a_fork_is_told_that_an_async_engine_is_not_its_own() -> None:
    engine = await started()
    assert await tokens(engine) == answer([1, 2])
    said = await asyncio.to_thread(result_in_a_fork, lambda: asyncio.run(tokens(engine)))
    assert said.startswith("Unavailable: this engine was made in process")
    assert await asyncio.to_thread(result_in_a_fork, lambda: asyncio.run(engine.close())) == "None"
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(engine)
    await engine.close()
