"""AsyncEngine: requests as async iterators."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, NoReturn

from nexusengine.config import EngineConfig, parse_devices
from nexusengine.engine.client import AsyncBackend, UnboundedBackend
from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.engine.launch import Started, SupervisorThread, engine_config, start_backend
from nexusengine.engine.lifetime import Home, not_pickled
from nexusengine.engine.request import (
    DEFAULT_SAMPLING,
    Prompt,
    check_length,
    make_processor,
    make_request,
    merge,
    output_of,
)
from nexusengine.errors import ConfigError, DeadlineExceeded, InvalidRequest, Unavailable, WorkerLost
from nexusengine.slo.classes import CLASSES
from nexusengine.slo.resolve import SLOClasses, SLOLike
from nexusengine.templates.pool import PROCESSES
from nexusengine.tokenize import Tokenizer
from nexusengine.tokenize.chat_template import Message, check_template_variables
from nexusengine.types import EngineRequest, RequestOutput, SamplingParams, TokenDelta
from nexusengine.wire import WorkerState

_LONG_TEXT = 16_384
_DEADLINE_GRACE_S = 5.0


class _Resources:
    """The client, threads and processes of an AsyncEngine; outlive it only as long as it takes to end them."""

    def __init__(self) -> None:
        self.home = Home()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.backend: AsyncBackend | None = None
        self.core: LocalBackend | None = None
        self.supervisor: SupervisorThread | None = None

    async def close(self) -> None:
        if self.backend is not None:
            await self.backend.close()
            self.backend = None
        if self.supervisor is not None:
            await self.supervisor.closed()
            self.supervisor = None
        self.core = self.loop = None

    def abandon(self) -> None:
        """End it without waiting, and without the event loop if that has ended; from any thread."""
        if not self.home.here:
            return
        loop, backend = self.loop, self.backend
        if loop is not None and backend is not None and not loop.is_closed():
            loop.call_soon_threadsafe(backend.drop)
        if self.core is not None:
            self.core.stop()
        if self.supervisor is not None:
            self.supervisor.stop()
        self.backend = self.supervisor = self.core = self.loop = None


class AsyncEngine:
    """A model whose requests are async iterators.

    `AsyncEngine(model, devices=..., **settings)` loads it when it is started (`async with`, or `start`). Closing an
    iterator of `generate`, or cancelling the task that consumes it, aborts its request. An engine belongs to the
    process and the event loop that started it; elsewhere its methods raise Unavailable. When it is garbage, or at the
    end of the process, what it started ends by itself.

    Args:
        settings: the fields of `nexusengine.config.EngineConfig`.
        started: what to serve with instead; see `from_client`.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        devices: str | Sequence[str] | None = None,
        *,
        started: Started | None = None,
        **settings: Any,
    ) -> None:
        self._config: EngineConfig | None = None
        self._resources = _Resources()
        self._classes = SLOClasses(CLASSES)
        self._tokenizer: Tokenizer | None = None
        self._vocab_size = 0
        self._longest: int | None = None
        self._active: set[str] = set()
        self._render_threads = _render_threads()
        if started is not None:
            self._resources.backend = started.backend
            self._tokenizer, self._vocab_size = started.tokenizer, started.vocab_size
            return
        self._config = engine_config(model, devices, settings)
        self._classes = SLOClasses.configured(self._config.slo_classes)
        weakref.finalize(self, self._resources.abandon).atexit = False  # see lifetime.py

    @classmethod
    def from_client(cls, client: AsyncBackend, tokenizer: Tokenizer, vocab_size: int) -> AsyncEngine:
        """An engine over a client that is started already, with the limits of its queue."""
        return cls(started=Started(client, tokenizer, vocab_size))

    async def start(self) -> AsyncEngine:
        """Load the model: in this process for one device, in workers of their own for several."""
        self._check_home()
        if self._resources.backend is None:
            config, resources = self._config, self._resources
            if config is None:
                raise ConfigError("this engine was closed")
            try:
                started = await start_backend(config)
            except BaseException:
                resources.loop = None
                raise
            self._tokenizer, self._vocab_size = started.tokenizer, started.vocab_size
            resources.supervisor = started.supervisor
            resources.core = started.backend if isinstance(started.backend, LocalBackend) else None
            resources.backend = UnboundedBackend(started.backend, _places(config))
        return self

    async def close(self) -> None:
        if not self._resources.home.here:
            return
        if self._config is not None and self._tokenizer is not None:
            self._tokenizer.close()
        loop = self._resources.loop
        if loop is not None and loop.is_closed():
            self._resources.abandon()
            return
        self._check_home()
        await self._resources.close()

    async def __aenter__(self) -> AsyncEngine:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        not_pickled(self)

    def _check_home(self) -> None:
        """Raises Unavailable in a fork of its process, and in another event loop than the one it was first used in."""
        resources, loop = self._resources, asyncio.get_running_loop()
        resources.home.check()
        resources.loop = resources.loop or loop
        if resources.loop is not loop:
            ended = "has ended" if resources.loop.is_closed() else "is another"
            raise Unavailable(
                f"AsyncEngine was started in an event loop that {ended}; use it in the loop that started it (from "
                "other threads with asyncio.run_coroutine_threadsafe), or make an AsyncEngine for each loop"
            )

    @property
    def backend(self) -> AsyncBackend:
        if self._resources.backend is None:
            raise Unavailable("the engine is not started, or closed")
        return self._resources.backend

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise Unavailable("the engine is not started")
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens that some worker can hold; while all of them start again, as before.

        Raises:
            Unavailable: no worker was ready yet, or the router is silent.
        """
        cluster = self.backend.status()
        if cluster is None:
            raise Unavailable("the router does not answer", retry_after_s=1.0)
        lengths = [w.info.max_model_len for w in cluster.workers if w.state is not WorkerState.GONE]
        self._longest = max(lengths, default=0) or self._longest
        if self._longest is None:
            raise Unavailable("no worker is ready", retry_after_s=1.0)
        return self._longest

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A megabyte takes about a second, so a long one does not hold up the event loop."""
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
        return self.tokenizer.encode(text, add_special_tokens)

    async def render_chat(
        self, messages: Sequence[Message] | Callable[[], Sequence[Message]], /, **options: Any
    ) -> str:
        """The prompt of a conversation, rendered in a thread, because a template may take seconds.

        Args:
            messages: the conversation, or a function that returns it.
            options: see ChatTemplate.render.

        Raises:
            InvalidRequest: with what the template says is wrong with the messages.
        """

        def render() -> str:
            return self.tokenizer.render_chat(messages() if callable(messages) else messages, **options)

        return await asyncio.get_running_loop().run_in_executor(self._render_threads, render)

    def abort(self, request_id: str) -> None:
        """End a request; its iterator then ends with finish_reason "abort"."""
        self._check_home()
        self.backend.abort(request_id)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        slo: SLOLike = None,
        priority: int = 0,
        tenant: str | None = None,
        timeout_s: float | None = None,
        arrival_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Yield the outputs of one request, the last one with a finish_reason.

        What comes while the consumer is busy is handed over as one output. Any number of requests may be open at once.

        Args:
            slo, priority: as in Engine.generate.
            tenant: whose it is; the engine is shared fairly between tenants that wait.
            timeout_s: after arrival; None waits without limit.
            arrival_s: monotonic timestamp; None for now.

        Raises:
            NexusError: the request is wrong, or failed.
        """
        self._check_home()
        request = make_request(
            await self.encode(prompt) if isinstance(prompt, str) else prompt,
            sampling or DEFAULT_SAMPLING,
            self.tokenizer,
            arrival_s=time.monotonic() if arrival_s is None else arrival_s,
            timeout_s=timeout_s,
            request_id=request_id,
            slo=self._classes.in_python(slo),
            priority=priority,
            tenant=tenant,
        )
        check_length(request, self.max_model_len, self._vocab_size)
        async with aclosing(self.stream(request, prompt)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise output.error
                yield output

    async def stream(self, request: EngineRequest, prompt: Prompt | None = None) -> AsyncGenerator[RequestOutput]:
        """Yield the outputs of a request that is made and checked already; the lower half of `generate`.

        A request that fails ends with an output that has its error.

        Args:
            prompt: as the caller gave it; a text is repeated in the outputs.

        Raises:
            InvalidRequest: its id is in use.
            Unavailable: nothing can be served at all.
        """
        self._check_home()
        if request.request_id in self._active:
            raise InvalidRequest(f"a request with id {request.request_id!r} is being served", param="request_id")
        processor = make_processor(request, self.tokenizer, prompt)
        inbox: deque[TokenDelta] = deque()
        loop, expired = asyncio.get_running_loop(), False
        arrival: asyncio.Future[None] | None = None  # what is waited for, cheaper than an Event for each token

        def wake() -> None:
            if arrival is not None and not arrival.done():
                arrival.set_result(None)

        def sink(delta: TokenDelta) -> None:
            inbox.append(delta)
            wake()

        def expire() -> None:
            nonlocal expired
            expired = True
            wake()

        backend, ended, timer = self.backend, False, None
        self._active.add(request.request_id)
        try:
            backend.submit(request, sink)
            if request.deadline_s is not None:
                left_s = request.deadline_s + _DEADLINE_GRACE_S - time.monotonic()
                timer = loop.call_later(left_s, expire)
            while not ended:
                if not (inbox or expired):
                    arrival = loop.create_future()
                    await arrival
                silent = not inbox  # the backend should have ended the request at its deadline
                if silent:
                    error = DeadlineExceeded("the time limit of the request is over, and no answer came")
                    inbox.append(TokenDelta.failed(request.request_id, error))
                delta = merge(inbox)
                inbox.clear()
                ended = delta.finish_reason is not None and not silent
                output = output_of(processor, delta, time.monotonic())
                if (processor.stopped or silent) and not ended:
                    backend.abort(request.request_id)
                    ended = True
                if output is not None:
                    yield output
        finally:
            if timer is not None:
                timer.cancel()
            self._active.discard(request.request_id)
            if not ended:
                backend.abort(request.request_id)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """`generate` for a conversation, rendered with the model's chat template; see Engine.chat."""
        text = await self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **check_template_variables(chat_template_kwargs or {}),
        )
        prompt = await self.encode(text, add_special_tokens=False)
        async for output in self.generate(prompt, sampling, **options):
            yield output


def _places(config: EngineConfig) -> int:
    """Requests that the queues behind the engine take without refusing any, enough to keep every worker at work."""
    workers = len(parse_devices(config.devices))
    return max(config.max_waiting, workers * min(2 * config.max_running, config.max_waiting))


def _render_threads() -> ThreadPoolExecutor:
    """Threads that wait for chat templates, apart from asyncio's own: those that tokenise are not to wait for them."""
    return ThreadPoolExecutor(PROCESSES, thread_name_prefix="chat template")


async def retry_on_worker_loss(start: Callable[[], AsyncGenerator[RequestOutput]]) -> AsyncGenerator[RequestOutput]:
    """Yield the outputs of a generation whose caller looks at them only when they are complete.

    They are kept until then, and generated a second time if the worker is lost in the middle. A worker lost before the
    first token is the router's concern.

    Args:
        start: begins the generation, of `generate` or of `stream`.
    """
    outputs: list[RequestOutput] = []
    try:
        async with aclosing(start()) as first:
            async for output in first:
                outputs.append(output)  # noqa: PERF401 (what came before an error counts)
        lost = isinstance(outputs[-1].error, WorkerLost) and any(output.token_ids for output in outputs)
    except WorkerLost:
        if not outputs:
            raise
        lost = True
    if lost:
        async with aclosing(start()) as second:
            outputs = [output async for output in second]
    for output in outputs:
        yield output
