"""AsyncEngine: requests as async iterators over any backend."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from nexusengine.backend import AsyncBackend
from nexusengine.config import EngineConfig
from nexusengine.errors import ConfigError, Unavailable
from nexusengine.requests import (
    DEFAULT_SAMPLING,
    Prompt,
    check_length,
    delta_error,
    make_processor,
    make_request,
    merge,
)
from nexusengine.tokenize import Tokenizer
from nexusengine.tokenize.chat_template import Message
from nexusengine.types import SLO, RequestOutput, SamplingParams, TokenDelta
from nexusengine.wire import WorkerState


class AsyncEngine:
    """`AsyncEngine(model, devices=..., **settings)` loads a model when it is started (`async with`, or `start`).

    Closing an iterator of `generate`, or cancelling the task that consumes it, aborts its request.
    """

    def __init__(
        self, model: str = "smollm2-135m", devices: str | Sequence[str] | None = None, **settings: Any
    ) -> None:
        from nexusengine.engine import engine_config

        self._config: EngineConfig | None = engine_config(model, devices, settings)
        self._backend: AsyncBackend | None = None
        self._tokenizer: Tokenizer | None = None
        self._supervisor: Any = None
        self._vocab_size = 0

    @classmethod
    def over(cls, backend: AsyncBackend, tokenizer: Tokenizer, vocab_size: int) -> AsyncEngine:
        """An engine over a backend that is started already."""
        engine = cls.__new__(cls)
        engine._config, engine._supervisor = None, None
        engine._backend, engine._tokenizer, engine._vocab_size = backend, tokenizer, vocab_size
        return engine

    async def start(self) -> AsyncEngine:
        """Load the model: in this process for one device, in workers of their own for several."""
        if self._backend is None:
            if self._config is None:
                raise ConfigError("this engine was closed")
            from nexusengine.engine import start_backend

            started = await start_backend(self._config)
            self._backend, self._tokenizer, self._vocab_size, self._supervisor = started
        return self

    async def close(self) -> None:
        if self._backend is not None:
            await self._backend.close()
            self._backend = None
        if self._supervisor is not None:
            await asyncio.to_thread(self._supervisor.close)
            self._supervisor = None

    async def __aenter__(self) -> AsyncEngine:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def backend(self) -> AsyncBackend:
        if self._backend is None:
            raise Unavailable("the engine is not started, or closed")
        return self._backend

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
        """Longest prompt + output in tokens that some worker can hold. Raises Unavailable before one is ready."""
        cluster = self.backend.status()
        lengths = [w.info.max_model_len for w in cluster.workers if w.state is not WorkerState.GONE] if cluster else []
        if not any(lengths):
            raise Unavailable("no worker is ready", retry_after_s=1.0)
        return max(lengths)

    def abort(self, request_id: str) -> None:
        """End a request; its iterator then ends with finish_reason "abort"."""
        self.backend.abort(request_id)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        slo: SLO | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        arrival_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """The news of one request, the last one with a finish_reason. What comes in while the consumer is busy is
        handed over as one piece. Raises NexusError."""
        request = make_request(
            prompt,
            sampling or DEFAULT_SAMPLING,
            self.tokenizer,
            arrival_s=time.monotonic() if arrival_s is None else arrival_s,
            timeout_s=timeout_s,
            request_id=request_id,
            slo=slo,
            priority=priority,
        )
        check_length(request, self.max_model_len, self._vocab_size)
        processor = make_processor(request, self.tokenizer, prompt)
        inbox: deque[TokenDelta] = deque()
        arrived = asyncio.Event()

        def sink(delta: TokenDelta) -> None:
            inbox.append(delta)
            arrived.set()

        backend, over = self.backend, False
        backend.submit(request, sink)
        try:
            while not over:
                await arrived.wait()
                arrived.clear()
                delta = merge(inbox)
                inbox.clear()
                over = delta.finish_reason is not None
                if delta.finish_reason == "error":
                    raise delta_error(delta)
                output = processor.push(delta, time.monotonic())
                if processor.stopped and not over:
                    backend.abort(request.request_id)
                    over = True
                if output is not None:
                    yield output
        finally:
            if not over:
                backend.abort(request.request_id)

    async def chat(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput]:
        """`generate` for a conversation, rendered with the model's chat template."""
        async for output in self.generate(self.tokenizer.encode_chat(messages), sampling, **options):
            yield output
