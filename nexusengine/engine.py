"""Engine: text generation from Python, in this process or over several devices."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from nexusengine.async_engine import AsyncEngine
from nexusengine.backend import AsyncBackend
from nexusengine.clock import MonotonicClock
from nexusengine.config import EngineConfig, ServeConfig, load, parse_devices
from nexusengine.core.core import EngineCore
from nexusengine.errors import ConfigError, InvalidRequest, NexusError, Unavailable
from nexusengine.execute.base import make_executor
from nexusengine.loading.resolve import resolve_model
from nexusengine.local import LocalBackend
from nexusengine.requests import DEFAULT_SAMPLING, Prompt, check_length, delta_error, make_processor, make_request
from nexusengine.serve.build import executor_options, make_core
from nexusengine.serve.client import RouterClient
from nexusengine.serve.supervisor import Supervisor
from nexusengine.tokenize import Tokenizer, load_tokenizer
from nexusengine.tokenize.chat_template import Message
from nexusengine.types import SLO, EngineRequest, RequestOutput, SamplingParams, TokenLogprob

_PROGRESS_FROM = 9

__all__ = ["AsyncEngine", "Engine"]


def engine_config(model: str, devices: str | Sequence[str] | None, settings: dict[str, Any]) -> EngineConfig:
    """Settings given in Python. Raises ConfigError for a name or value that does not exist."""
    unknown = sorted(set(settings) - set(EngineConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}", param=unknown[0])
    if devices is not None:
        settings["devices"] = devices if isinstance(devices, str) else ",".join(devices)
    return load(EngineConfig, {**settings, "model": model})


def make_local(config: EngineConfig) -> tuple[EngineCore, Tokenizer, int]:
    """The core of a one-device engine, its tokenizer and the size of its vocabulary."""
    device = parse_devices(config.devices)[0]
    files = resolve_model(config.model, revision=config.revision, weights=device.kind != "emulated")
    tokenizer = load_tokenizer(files)
    executor = make_executor(files, device, executor_options(config))
    return make_core(executor, config, MonotonicClock()), tokenizer, files.config.vocab_size


async def start_backend(config: EngineConfig) -> tuple[AsyncBackend, Tokenizer, int, SupervisorThread | None]:
    """One device: a core in a thread of this process. Several: router and workers in processes of their own."""
    if len(parse_devices(config.devices)) == 1:
        core, tokenizer, vocab_size = await asyncio.to_thread(make_local, config)
        local = LocalBackend(core, config.model)
        await local.start()
        return local, tokenizer, vocab_size, None
    supervisor = SupervisorThread(config)
    try:
        files = await asyncio.to_thread(resolve_model, config.model, revision=config.revision, weights=False)
        tokenizer = await asyncio.to_thread(load_tokenizer, files)
        await asyncio.to_thread(supervisor.wait_until_ready)
        client = RouterClient(supervisor.front)
        await client.start()
        await client.wait_for_ready(10.0)
    except BaseException:
        await asyncio.to_thread(supervisor.close)
        raise
    return client, tokenizer, files.config.vocab_size, supervisor


class SupervisorThread:
    """A supervisor without HTTP, in a thread of the caller's process."""

    def __init__(self, config: EngineConfig) -> None:
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        serve = ServeConfig(**dataclasses.asdict(config))
        self._supervisor = Supervisor(serve, with_server=False, on_event=self._on_event)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    @property
    def front(self) -> str:
        return self._supervisor.front

    def wait_until_ready(self) -> None:
        """Raises what kept the workers from starting."""
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._supervisor.stop()
        self._thread.join()

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["type"] == "ready":
            self._ready.set()

    def _run(self) -> None:
        try:
            self._supervisor.run()
        except NexusError as error:
            self._failure = error
        finally:
            self._ready.set()


class Engine:
    """A model on one device, in this process, or on several, behind a router.

    settings: the fields of `nexusengine.config.EngineConfig`. One thread at a time may call it.

        with Engine("smollm2-135m") as engine:
            print(engine.generate("The capital of France is")[0].text)
    """

    def __init__(
        self, model: str = "smollm2-135m", devices: str | Sequence[str] | None = None, **settings: Any
    ) -> None:
        """Loads the model. Raises ModelLoadError or ConfigError."""
        config = engine_config(model, devices, settings)
        self._runner: _LocalRunner | _RemoteRunner = (
            _LocalRunner(config) if len(parse_devices(config.devices)) == 1 else _RemoteRunner(config)
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._runner.tokenizer

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens."""
        return self._runner.max_model_len

    def stats(self) -> dict[str, float]:
        """Counters of the engine core (see core.stats.CoreStats), summed over workers."""
        return self._runner.stats()

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        progress: bool | None = None,
        slo: SLO | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        progress: bool | None = None,
        slo: SLO | None = None,
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        progress: bool | None = None,
        slo: SLO | None = None,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue each prompt (text or token ids); a single prompt is a list of one.

        sampling: for all prompts, or one for each; default: greedy, at most 256 tokens.
        stream=False: the outputs, in the order of the prompts. stream=True: an iterator of news, each with its prompt's
        place in metadata["index"]; closing it aborts what is left.
        progress: show a bar; default: for more than 8 prompts on a terminal.
        Raises NexusError; nothing is started if any prompt or parameter is wrong.
        """
        many = _as_list(prompts)
        each = _sampling_list(sampling, len(many))
        arrival_s = time.monotonic()
        requests = [
            make_request(p, s, self.tokenizer, arrival_s=arrival_s, slo=slo) for p, s in zip(many, each, strict=True)
        ]
        for request in requests:
            check_length(request, self.max_model_len, self.vocab_size)
        news = self._runner.run(requests, many)
        if stream:
            return news
        shown = len(many) >= _PROGRESS_FROM and sys.stderr.isatty() if progress is None else progress
        return _collect(news, len(many), shown)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        **options: Any,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """`generate` for one conversation or several, rendered with the model's chat template."""
        conversations = [messages] if messages and not isinstance(messages[0], list | tuple) else messages
        prompts = [self.tokenizer.encode_chat(c) for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling, stream=stream, **options)  # type: ignore[call-overload,no-any-return]

    def close(self) -> None:
        """Free the device, end the workers. Safe to call twice."""
        self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _LocalRunner:
    """Runs the core's loop in the caller's thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.core, self.tokenizer, self.vocab_size = make_local(config)
        self.max_model_len = self.core.max_model_len
        self._closed = False

    def stats(self) -> dict[str, float]:
        return self.core.stats().totals()

    def run(self, requests: list[EngineRequest], prompts: Sequence[Prompt]) -> Iterator[RequestOutput]:
        if self._closed:
            raise Unavailable("the engine was closed")
        processors = {
            r.request_id: (i, make_processor(r, self.tokenizer, p))
            for i, (r, p) in enumerate(zip(requests, prompts, strict=True))
        }
        waiting = list(reversed(requests))
        try:
            while processors:
                while waiting and self.core.stats().waiting < self.core.max_waiting:
                    self.core.add(waiting.pop())
                for delta in self.core.step():
                    if delta.request_id not in processors:
                        continue
                    if delta.finish_reason == "error":
                        raise delta_error(delta)
                    index, processor = processors[delta.request_id]
                    output = processor.push(delta, time.monotonic())
                    if processor.stopped and delta.finish_reason is None:
                        self.core.abort(delta.request_id)
                    if processor.stopped or delta.finish_reason is not None:
                        del processors[delta.request_id]
                    if output is not None:
                        output.metadata["index"] = index
                        yield output
        finally:
            for request_id in processors:
                self.core.abort(request_id)

    def close(self) -> None:
        self._closed = True
        self.core.executor.close()


class _RemoteRunner:
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

    def run(self, requests: list[EngineRequest], prompts: Sequence[Prompt]) -> Iterator[RequestOutput]:
        if self._loop.is_closed():
            raise Unavailable("the engine was closed")
        news: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()
        running = asyncio.run_coroutine_threadsafe(self._run_all(requests, prompts, news), self._loop)
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
        news: queue.SimpleQueue[RequestOutput | BaseException],
    ) -> None:
        seats = asyncio.Semaphore(self._config.max_waiting)

        async def one(index: int, request: EngineRequest, prompt: Prompt) -> None:
            async with seats:
                async for output in self._engine.generate(
                    prompt,
                    request.sampling,
                    request_id=request.request_id,
                    slo=request.slo,
                    arrival_s=request.arrival_s,
                ):
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
        self._call(self._engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(p, int) for p in prompts)):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence) or not prompts:
        raise InvalidRequest(f"prompts must be texts or lists of token ids, got {prompts!r}", param="prompts")
    return list(prompts)  # type: ignore[arg-type]


def _sampling_list(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or DEFAULT_SAMPLING] * count
    if len(sampling) != count:
        raise InvalidRequest(f"{len(sampling)} sampling parameters for {count} prompts", param="sampling")
    return list(sampling)


def _collect(news: Iterator[RequestOutput], count: int, progress: bool) -> list[RequestOutput]:
    """The news of each prompt put together, in order."""
    pieces: list[list[RequestOutput]] = [[] for _ in range(count)]
    with _bar(count, progress) as advance:
        for piece in news:
            pieces[piece.metadata["index"]].append(piece)
            if piece.finished:
                advance()
    return [_joined(parts) for parts in pieces]


def _joined(parts: list[RequestOutput]) -> RequestOutput:
    logprobs: tuple[TokenLogprob, ...] = tuple(item for p in parts for item in p.logprobs or ())
    return dataclasses.replace(
        parts[-1],
        text="".join(p.text for p in parts),
        token_ids=tuple(i for p in parts for i in p.token_ids),
        logprobs=logprobs if any(p.logprobs is not None for p in parts) else None,
    )


class _bar:
    """A progress bar on stderr, or nothing."""

    def __init__(self, count: int, shown: bool) -> None:
        self._count, self._shown = count, shown

    def __enter__(self) -> Any:
        if not self._shown:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True))
        self._progress.start()
        task = self._progress.add_task("requests", total=self._count)
        return lambda: self._progress.advance(task)

    def __exit__(self, *exc: object) -> None:
        if self._shown:
            self._progress.stop()
