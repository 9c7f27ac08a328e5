"""How a synchronous Engine runs its requests: a core in this process, or an event loop in a thread of its own.

Either may be called by any number of threads at once; their requests share the batch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import queue
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from nexusengine.config import EngineConfig
from nexusengine.engine.async_engine import AsyncEngine, retry_on_worker_loss
from nexusengine.engine.launch import make_local
from nexusengine.engine.lifetime import Home
from nexusengine.engine.request import Prompt, make_processor, output_of
from nexusengine.errors import InternalError, NexusError, Unavailable
from nexusengine.obs.logs import get_logger
from nexusengine.slo.due import first_token_due_s
from nexusengine.types import EngineRequest, RequestOutput, TokenDelta

Outputs = Callable[[], AsyncGenerator[RequestOutput]]
log = get_logger("engine")


class LocalRunner:
    """A core in this process, stepped by its callers.

    Whoever has no output to yield computes the next step, for all of them, with the lock held. Only the holder of the
    lock touches the core. A generator may be closed by the garbage collector, in any thread and also within a step, so
    its end takes no lock: the requests that it leaves go into `_left`, and the holder aborts them.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._home = Home()
        self.core, self.tokenizer, self.vocab_size = make_local(config)
        self.max_model_len = self.core.max_model_len
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._submitted = 0
        self._queue: list[tuple[float, int, EngineRequest]] = []  # before the core's, which is bounded
        self._inboxes: dict[str, deque[TokenDelta]] = {}
        self._left: deque[str] = deque()
        self._failure: NexusError | None = None
        self._closing = False

    def check(self) -> None:
        """Raises Unavailable in a fork of the engine's process."""
        self._home.check()

    def stats(self) -> dict[str, float]:
        return self.core.stats().counters()

    def run(self, requests: list[EngineRequest], prompts: Sequence[Prompt], *, stream: bool) -> Iterator[RequestOutput]:
        """Yield the outputs of all requests. stream: whether the caller looks at them before a request's end."""
        processors = {
            r.request_id: (i, make_processor(r, self.tokenizer, p))
            for i, (r, p) in enumerate(zip(requests, prompts, strict=True))
        }
        inbox: deque[TokenDelta] = deque()
        try:
            self._submit(requests, inbox)
            while processors:
                if not inbox:
                    self._step(inbox)
                while inbox:
                    delta = inbox.popleft()
                    if delta.request_id not in processors:
                        continue
                    index, processor = processors[delta.request_id]
                    output = output_of(processor, delta, time.monotonic())
                    if processor.stopped and delta.finish_reason is None:
                        self._leave(delta.request_id)
                    if processor.stopped or delta.finish_reason is not None:
                        del processors[delta.request_id]
                        self._inboxes.pop(delta.request_id, None)
                    if output is not None:
                        output.metadata["index"] = index
                        yield output
        finally:
            self._leave(*processors)

    def close(self) -> None:
        """End what is in flight with an error."""
        if not self._home.here:
            return
        self._closing = True
        if self._holder != threading.get_ident():  # else a signal came within a step, which sees to it at its end
            with self._turn():
                pass

    # ---- with the lock held --------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The core is the caller's alone. Raises Unavailable if the caller, interrupted by a signal, has it already."""
        self.check()
        if self._holder == threading.get_ident():
            raise Unavailable("the engine was called by a signal handler that interrupted one of its own steps")
        with self._lock:
            try:
                self._holder = threading.get_ident()
                self._abort_left()
                yield
            finally:
                if self._closing and self._failure is None:
                    self._fail(Unavailable("the engine was closed"))
                    self.core.executor.close()
                self._holder = None
        self._tidy()

    def _submit(self, requests: list[EngineRequest], inbox: deque[TokenDelta]) -> None:
        with self._turn():
            if self._failure is not None:
                raise type(self._failure)(self._failure.message)
            for request in requests:
                self._submitted += 1
                self._inboxes[request.request_id] = inbox
                due_s = first_token_due_s(request.arrival_s, request.slo)
                heapq.heappush(self._queue, (due_s, self._submitted, request))

    def _step(self, inbox: deque[TokenDelta]) -> None:
        """Compute one step, unless another thread's has brought something meanwhile; its tokens go to all inboxes."""
        with self._turn(), _interrupts_deferred():
            if inbox or self._failure is not None:
                return
            try:
                self._feed()
                self._deliver(self.core.step())
            except Exception as error:  # whatever it is, all that are in flight must end
                log.exception("a step failed; the engine cannot be used any more")
                self._fail(InternalError(f"a step failed: {error}"))

    def _feed(self) -> None:
        """Requests into the core while it has room, those whose first token is due first."""
        while self._queue and self.core.room:
            request = heapq.heappop(self._queue)[-1]
            if request.request_id in self._inboxes:  # else its caller has left
                try:
                    self.core.add(request)
                except NexusError as error:
                    self._deliver([TokenDelta.failed(request.request_id, error)])

    def _deliver(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            if (inbox := self._inboxes.get(delta.request_id)) is not None:
                inbox.append(delta)

    def _fail(self, error: NexusError) -> None:
        """The end of the engine, and of all that is in flight."""
        self._failure = error
        self._queue.clear()
        self._deliver([TokenDelta.failed(request_id, error) for request_id in list(self._inboxes)])

    def _abort_left(self) -> None:
        while self._left:
            request_id = self._left.popleft()
            if self._failure is None:
                self.core.abort(request_id)
        if not self._inboxes:
            self._queue.clear()

    # ---- without it ----------------------------------------------------------------------------------------------

    def _leave(self, *request_ids: str) -> None:
        """Nobody waits for these any more."""
        for request_id in request_ids:
            self._inboxes.pop(request_id, None)
            self._left.append(request_id)
        self._tidy()

    def _tidy(self) -> None:
        """Abort those left, unless another has the core: then that one does, at the latest when it gives it back."""
        if not self._left:
            return
        with _interrupts_deferred():
            while self._left and self._lock.acquire(blocking=False):
                try:
                    self._abort_left()
                finally:
                    self._lock.release()


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block, so that a step is never left half done; a second one at once."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    seen: list[tuple[Any, Any]] = []

    def defer(number: int, frame: Any) -> None:
        seen.append((number, frame))
        if len(seen) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        before(*seen[0])


class _Session:
    """An AsyncEngine in an event loop of its own, in a background thread.

    Knows nothing of the RemoteRunner it is for, so that this can be garbage while the thread runs.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.home = Home()
        self.engine = AsyncEngine(**dataclasses.asdict(config))
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="engine client", daemon=True)
        self.thread.start()
        self._closing = threading.RLock()

    def call(self, coroutine: Any) -> Any:
        running = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise

    def close(self) -> None:
        if not self.home.here:
            return
        with self._closing:
            if self.loop.is_closed():
                return
            self.call(self._end())
            if self.loop.is_closed():  # by a handler of a signal meanwhile
                return
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()

    def abandon(self) -> None:
        """`close`, from whatever thread the garbage collector runs in."""
        if self.home.here and threading.current_thread() is self.thread:
            threading.Thread(target=self.close, name="engine end").start()
        else:
            self.close()

    async def _end(self) -> None:
        """Close the engine, and see what was interrupted to its end."""
        await self.engine.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


class RemoteRunner:
    """Runs an AsyncEngine in an event loop of its own, in a background thread."""

    def __init__(self, config: EngineConfig) -> None:
        self._session = _Session(config)
        weakref.finalize(self, self._session.abandon).atexit = False  # see lifetime.py
        try:
            self._session.call(self._session.engine.start())
        except BaseException:
            self.close()
            raise
        engine = self._session.engine
        self.tokenizer, self.vocab_size = engine.tokenizer, engine.vocab_size

    def check(self) -> None:
        """Raises Unavailable in a fork of the engine's process."""
        self._session.home.check()

    @property
    def max_model_len(self) -> int:
        return self._session.engine.max_model_len

    def stats(self) -> dict[str, float]:
        cluster = self._session.engine.backend.status()
        if cluster is None:
            raise Unavailable("the router is silent")
        counters: dict[str, float] = {}
        for worker in cluster.workers:
            for name, value in (worker.load.counters if worker.load else {}).items():
                counters[name] = counters.get(name, 0.0) + value
        return counters

    def run(self, requests: list[EngineRequest], prompts: Sequence[Prompt], *, stream: bool) -> Iterator[RequestOutput]:
        """Yield the outputs of all requests.

        Args:
            stream: whether the caller looks at them before a request's end; else one may be generated twice.
        """
        session = self._session
        if session.loop.is_closed():
            raise Unavailable("the engine was closed")
        outputs: queue.SimpleQueue[RequestOutput | None] = queue.SimpleQueue()
        pairs = list(zip(requests, prompts, strict=True))
        starts: list[Outputs] = [partial(session.engine.stream, request, prompt) for request, prompt in pairs]
        if not stream:
            starts = [partial(retry_on_worker_loss, start) for start in starts]
        running = asyncio.run_coroutine_threadsafe(_serve_all(starts, outputs), session.loop)
        running.add_done_callback(lambda _: outputs.put(None))
        left = len(requests)
        try:
            while left:
                self.check()
                output = outputs.get()
                if output is None:
                    raise _cause(running)
                left -= output.finished
                yield output
        finally:
            running.cancel()

    def close(self) -> None:
        self._session.close()


async def _serve_all(starts: list[Outputs], outputs: queue.SimpleQueue[RequestOutput | None]) -> None:
    async def one(index: int, start: Outputs) -> None:
        async for output in start():
            output.metadata["index"] = index
            outputs.put(output)

    async with asyncio.TaskGroup() as group:
        for index, start in enumerate(starts):
            group.create_task(one(index, start))


def _cause(running: Future[None]) -> BaseException:
    """Why requests ended without their last output."""
    if running.cancelled():
        return Unavailable("the engine was closed")
    error = running.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error or InternalError("requests ended without an output")
