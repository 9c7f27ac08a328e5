"""Offline work: any number of prompts, no SLO, and nothing that loses an output; on a device with its own clock."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest

import nexusengine.engine.offline
from nexusengine import SLO, Engine, SamplingParams
from nexusengine.clock import VirtualClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.engine.client import Sink, UnboundedBackend
from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from nexusengine.scheduler.registry import make_policy
from nexusengine.types import EngineRequest, RequestOutput, TokenDelta
from tests.api.conftest import FakeTokenizer
from tests.support.fakes import VOCABULARY, FakeExecutor, continuation, make_core, request

TOKENIZER: Any = FakeTokenizer()


def slow_core(*, step_s: float, max_running: int, max_waiting: int = 1024, scheduler: str = "lens") -> EngineCore:
    """Steps take virtual seconds; requests arrive now, by the real clock that stamps them."""
    clock = VirtualClock(time.monotonic())
    device = FakeExecutor(clock=clock, step_s=step_s, num_blocks=8192, max_batch_tokens=2048)
    return make_core(
        device,
        clock=clock,
        policy=make_policy(scheduler),
        max_running=max_running,
        max_waiting=max_waiting,
        check_every_step=False,
    )


def engine_over(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(nexusengine.engine.offline, "make_local", lambda config: (core, TOKENIZER, VOCABULARY))
    return Engine("fake", devices="cpu")


def answers(prompts: list[list[int]], tokens: int) -> list[tuple[int, ...]]:
    return [tuple(continuation(p, tokens)) for p in prompts]


@pytest.mark.parametrize("scheduler", ["lens", "edf:relegate=1", "srpt", "paper-lens", "fcfs"])
def test_without_an_slo_nobody_is_refused_on_a_slow_device(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = slow_core(step_s=0.5, max_running=1, scheduler=scheduler)
    prompts = [[i, 1, 2, 3] for i in range(32)]
    with engine_over(core, monkeypatch) as engine:
        began_s = core.clock.now()
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16))
        assert core.clock.now() - began_s > 200.0
    assert [o.token_ids for o in outputs] == answers(prompts, 16)
    assert {(o.finish_reason, o.error) for o in outputs} == {("length", None)}


def test_without_an_slo_nobody_is_refused_from_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    core = slow_core(step_s=0.2, max_running=16, max_waiting=64)
    prompts = [[i % 90, i // 90, 2] for i in range(400)]
    with engine_over(core, monkeypatch) as engine:
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32))
    assert [o.token_ids for o in outputs] == answers(prompts, 32)


def test_requests_of_one_call_are_served_in_the_order_of_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    core = slow_core(step_s=0.5, max_running=1, max_waiting=3)
    prompts = [[i] * (1 + i * 7 % 11) for i in range(12)]
    with engine_over(core, monkeypatch) as engine:
        pieces = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=3), stream=True)
        ended = [p.metadata["index"] for p in pieces if p.finished]
    assert ended == list(range(12))


def test_ten_thousand_prompts_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    core = slow_core(step_s=0.1, max_running=256, scheduler="fcfs")
    prompts = [[i % 90, i // 90 % 90, i // 8100] for i in range(10_000)]
    with engine_over(core, monkeypatch) as engine:
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2))
    assert [o.token_ids for o in outputs] == answers(prompts, 2)


def test_a_promise_that_is_refused_is_an_output_with_its_error_and_those_kept_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = slow_core(step_s=0.5, max_running=1)
    prompts = [[i, 1, 2, 3] for i in range(32)]
    with engine_over(core, monkeypatch) as engine:
        outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16), slo=SLO(5.0, 1.0))
    refused = [o for o in outputs if o.error is not None]
    assert 0 < len(refused) < 32
    for o in refused:
        assert (o.finish_reason, o.verdict.missed) == ("error", "refused")  # type: ignore[union-attr]
        assert isinstance(o.error, Overloaded)
    for o, expected in zip(outputs, answers(prompts, 16), strict=True):
        assert o.error is not None or o.token_ids == expected


async def collected(engine: AsyncEngine, prompt: list[int], **options: Any) -> RequestOutput:
    sampling = SamplingParams(temperature=0.0, max_tokens=2)
    outputs = [o async for o in engine.generate(prompt, sampling, **options)]
    assert tuple(i for o in outputs for i in o.token_ids) == tuple(continuation(prompt, 2))
    return outputs[-1]


async def test_ten_thousand_prompts_at_once_through_an_async_engine() -> None:
    core = slow_core(step_s=0.1, max_running=256, scheduler="fcfs")
    backend = UnboundedBackend(LocalBackend(core, "fake"), 1024)
    await backend.start()
    engine = AsyncEngine.from_client(backend, TOKENIZER, VOCABULARY)
    prompts = [[i % 90, i // 90 % 90, i // 8100] for i in range(10_000)]
    outputs = await asyncio.gather(*(collected(engine, p) for p in prompts))
    assert {o.finish_reason for o in outputs} == {"length"}
    await engine.close()


class Places:
    """A backend that keeps what it is given until told to end it."""

    def __init__(self, refuses: bool = False) -> None:
        self.sinks: dict[str, Sink] = {}
        self.order: list[str] = []
        self.refuses = refuses

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        self.order.append(request.request_id)
        if self.refuses:
            raise Unavailable("no")
        self.sinks[request.request_id] = sink

    def abort(self, request_id: str) -> None:
        self.end(request_id, "abort")

    def end(self, request_id: str, reason: Any = "stop") -> None:
        self.sinks.pop(request_id)(TokenDelta(request_id, finish_reason=reason))


async def test_before_the_queue_deadlines_go_first_and_the_others_as_they_came() -> None:
    inner, ended = Places(), []
    backend = UnboundedBackend(inner, 1)  # type: ignore[arg-type]
    for name, slo in (("a", None), ("b", None), ("c", SLO(9.0, 1.0)), ("d", SLO(5.0, 1.0)), ("e", None)):
        backend.submit(request(name, [1], slo=slo), lambda d: ended.append((d.request_id, d.finish_reason)))
    assert inner.order == ["a"]
    backend.abort("b")
    for name in ("a", "d", "c", "e"):
        inner.end(name)
    assert inner.order == ["a", "d", "c", "e"]
    assert ended == [("b", "abort"), ("a", "stop"), ("d", "stop"), ("c", "stop"), ("e", "stop")]


async def test_before_the_queue_a_request_ends_at_its_deadline_and_at_the_close() -> None:
    inner = Places()
    backend = UnboundedBackend(inner, 1)  # type: ignore[arg-type]
    ended: dict[str, str | None] = {}
    soon_s = time.monotonic() + 0.02
    for name, deadline_s in (("a", None), ("late", soon_s), ("c", None)):
        backend.submit(request(name, [1], deadline_s=deadline_s), lambda d: ended.update({d.request_id: d.error_code}))
    await asyncio.sleep(0.1)
    assert ended == {"late": DeadlineExceeded.code}
    await backend.close()
    assert ended == {"late": DeadlineExceeded.code, "c": Unavailable.code}
    inner.end("a")
    assert inner.order == ["a"]


async def test_a_backend_that_takes_nothing_ends_everyone_without_recursion() -> None:
    backend = UnboundedBackend(Places(refuses=True), 4)  # type: ignore[arg-type]
    ended: list[str | None] = []
    for i in range(5000):
        backend.submit(request(str(i), [1]), lambda d: ended.append(d.error_code))
    assert ended == [Unavailable.code] * 5000


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("", "the prompt is empty"),
        ([], "prompts is []; give at least one prompt"),
        (5, "prompts must be texts or lists of token ids, got 5"),
    ],
)
def test_a_call_without_a_prompt_says_so(prompts: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        engine_over(slow_core(step_s=0.1, max_running=1), monkeypatch) as engine,
        pytest.raises(InvalidRequest, match=re.escape(sentence)),
    ):
        engine.generate(prompts)
