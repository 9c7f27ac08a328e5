"""How a synchronous Engine runs its requests: a core's loop in the caller's thread, or an event loop in another."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from nexusengine.async_engine import AsyncEngine, once_more
from nexusengine.config import EngineConfig
from nexusengine.errors import NexusError, Unavailable
from nexusengine.requests import Prompt, delta_error, make_processor
from nexusengine.slo_classes import promise_of
from nexusengine.start import make_local
from nexusengine.types import EngineRequest, RequestOutput, TokenDelta

_SCHEDULER = "lens:cap_ms=500"
"""Of an engine in its caller's thread: nobody comes while it computes a step, so none is kept short for newcomers."""


class LocalRunner:
    """Runs the core's loop in the caller's thread."""

    def __init__(self, config: EngineConfig) -> None:
        if config.scheduler == "lens":
            config = dataclasses.replace(config, scheduler=_SCHEDULER)
        self.core, self.tokenizer, self.vocab_size = make_local(config)
        self.max_model_len = self.core.max_model_len
        self._inboxes: dict[str, deque[TokenDelta]] = {}
        self._closed = False

    def stats(self) -> dict[str, float]:
        return self.core.stats().totals()

    def run(self, requests: list[EngineRequest], prompts: Sequence[Prompt], *, stream: bool) -> Iterator[RequestOutput]:
        """stream: whether the caller looks at the news before a request's end."""
        if self._closed:
            raise Unavailable("the engine was closed")
        processors = {
            r.request_id: (i, make_processor(r, self.tokenizer, p))
            for i, (r, p) in enumerate(zip(requests, prompts, strict=True))
        }
        waiting = list(reversed(requests))
        inbox: deque[TokenDelta] = deque()
        try:
            while processors:
                while waiting and self.core.stats().waiting < self.core.max_waiting:
                    self._inboxes[waiting[-1].request_id] = inbox
                    self.core.add(waiting.pop())
                if not inbox:
                    self._step()
                while inbox:
                    delta = inbox.popleft()
                    if delta.request_id not in processors:
                        continue
                    if delta.finish_reason == "error":
                        raise delta_error(delta)
                    index, processor = processors[delta.request_id]
                    output = processor.push(delta, time.monotonic())
                    if processor.stopped and delta.finish_reason is None:
                        self.core.abort(delta.request_id)
                    if processor.stopped or delta.finish_reason is not None:
                        del processors[delta.request_id], self._inboxes[delta.request_id]
                    if output is not None:
                        output.metadata["index"] = index
                        yield output
        finally:
            for request_id in processors:
                self._inboxes.pop(request_id, None)
                self.core.abort(request_id)

    def _step(self) -> None:
        """One step of the core. Its tokens go to whoever asked for them: several streams may be open at a time."""
        with _interrupts_deferred():
            deltas = self.core.step()
        for delta in deltas:
            if (inbox := self._inboxes.get(delta.request_id)) is not None:
                inbox.append(delta)

    def close(self) -> None:
        self._closed = True
        self.core.executor.close()


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


class RemoteRunner:
    """Runs an AsyncEngine in an event loop of its own, in a background thread."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine client", daemon=True)
        self._thread.start()
        self._engine = AsyncEngine(**dataclasses.asdict(config))
        try:
            self._call(self._engine.start())
        except BaseException:
            self.close()
            raise
        self.tokenizer, self.vocab_size = self._engine.tokenizer, self._engine.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    def stats(self) -> dict[str, float]:
        cluster = self._engine.backend.status()
        if cluster is None:
            raise Unavailable("the router is silent")
        totals: dict[str, float] = {}
        for worker in cluster.workers:
            for name, value in (worker.load.totals if worker.load else {}).items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def run(self, requests: list[EngineRequest], prompts: Sequence[Prompt], *, stream: bool) -> Iterator[RequestOutput]:
        """stream: whether the caller looks at the news before a request's end; else it may be generated twice."""
        if self._loop.is_closed():
            raise Unavailable("the engine was closed")
        news: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()
        running = asyncio.run_coroutine_threadsafe(self._run_all(requests, prompts, stream, news), self._loop)
        left = len(requests)
        try:
            while left:
                item = news.get()
                if isinstance(item, BaseException):
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            running.cancel()

    async def _run_all(
        self,
        requests: list[EngineRequest],
        prompts: Sequence[Prompt],
        stream: bool,
        news: queue.SimpleQueue[RequestOutput | BaseException],
    ) -> None:
        seats = asyncio.Semaphore(self._config.max_waiting)

        async def one(index: int, request: EngineRequest, prompt: Prompt) -> None:
            start = partial(
                self._engine.generate,
                prompt,
                request.sampling,
                request_id=request.request_id,
                slo=promise_of(request),
                priority=request.priority,
                arrival_s=request.arrival_s,
            )
            async with seats:
                async for output in start() if stream else once_more(start):
                    output.metadata["index"] = index
                    news.put(output)

        try:
            async with asyncio.TaskGroup() as group:
                for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                    group.create_task(one(index, request, prompt))
        except* NexusError as errors:
            news.put(errors.exceptions[0])
        except* Exception as errors:
            news.put(errors.exceptions[0])

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        """Close the engine, and see what was interrupted to its end."""
        await self._engine.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    def _call(self, coroutine: Any) -> Any:
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise
