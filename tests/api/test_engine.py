"""The Python API on the real default model, in this process and over two workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from nexusengine import AsyncEngine, Engine, SamplingParams
from nexusengine.errors import ConfigError, ContextTooLong, InvalidRequest

pytestmark = pytest.mark.model
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("smollm2-135m", devices="cpu", kv_cache_memory="256MiB") as made:
        yield made


def test_a_question_gets_a_sensible_answer(engine: Engine) -> None:
    (output,) = engine.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert "Paris" in output.text


def test_outputs_come_in_order_with_reason_and_timings(engine: Engine) -> None:
    prompts: list[str | list[int]] = [FRANCE, "2 + 2 =", engine.tokenizer.encode(FRANCE)]
    outputs = engine.generate(prompts, GREEDY)
    assert outputs[0].text == outputs[2].text
    assert [o.prompt for o in outputs] == [FRANCE, "2 + 2 =", None]
    for output in outputs:
        assert output.finish_reason == "length"
        assert len(output.token_ids) == 6
        assert output.timings is not None
        assert 0 < (output.timings.ttft_s or 0) < (output.timings.e2e_s or 0)


def test_a_stream_adds_up_to_the_whole(engine: Engine) -> None:
    whole = engine.generate([FRANCE, "Once upon a time"], GREEDY)
    pieces = list(engine.generate([FRANCE, "Once upon a time"], GREEDY, stream=True))
    assert len(pieces) > 4
    for i in (0, 1):
        assert "".join(p.text for p in pieces if p.metadata["index"] == i) == whole[i].text


def test_a_stream_that_is_closed_leaves_nothing_running(engine: Engine) -> None:
    stream = engine.generate(["x"] * 3, SamplingParams(max_tokens=100), stream=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["kv_used_blocks"]) == (0, 0, 0)


def test_a_seed_gives_the_same_text_alone_and_in_company(engine: Engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=12)
    (alone,) = engine.generate(FRANCE, sampling)
    company = engine.generate(["a b c", FRANCE, "tell me"], [SamplingParams(max_tokens=12), sampling, sampling])
    assert company[1].text == alone.text
    others = {engine.generate(FRANCE, SamplingParams(seed=i, max_tokens=12))[0].text for i in range(4)}
    assert len(others) > 1


def test_a_wrong_prompt_stops_the_whole_list_before_it_starts(engine: Engine) -> None:
    before = engine.stats()["requests"]
    with pytest.raises(ContextTooLong):
        engine.generate([FRANCE, "x " * 20_000], GREEDY)
    with pytest.raises(InvalidRequest, match="empty"):
        engine.generate([FRANCE, ""], GREEDY)
    with pytest.raises(InvalidRequest, match="2 sampling parameters for 1 prompts"):
        engine.generate([FRANCE], [GREEDY, GREEDY])
    with pytest.raises(ConfigError, match="max_speed"):
        Engine("smollm2-135m", max_speed=3)
    assert engine.stats()["requests"] == before


def test_a_long_list_shows_its_progress(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate(["x"] * 3, SamplingParams(max_tokens=1), progress=True)
    assert "requests" in capsys.readouterr().err


async def test_the_async_engine_streams_aborts_and_survives_a_cancelled_task() -> None:
    async with AsyncEngine("smollm2-135m", devices="cpu", kv_cache_memory="256MiB") as engine:
        text = "".join([o.text async for o in engine.generate(FRANCE, GREEDY)])
        assert "Paris" in text

        async def read() -> str:
            reasons = [
                o.finish_reason
                async for o in engine.generate("x", SamplingParams(max_tokens=500, ignore_eos=True), request_id="r")
            ]
            return str(reasons[-1])

        aborted = asyncio.create_task(read())
        await asyncio.sleep(0.5)
        engine.abort("r")
        assert await asyncio.wait_for(aborted, 10) == "abort"
        cancelled = asyncio.create_task(read())
        await asyncio.sleep(0.5)
        cancelled.cancel()
        for _ in range(100):
            await asyncio.sleep(0.05)
            status = engine.backend.status()
            if status is not None and status.ledger == 0:
                break
        assert status is not None
        assert status.ledger == 0
        assert "Paris" in "".join([o.text async for o in engine.generate(FRANCE, GREEDY)])


def test_several_devices_give_the_same_text_through_router_and_workers(engine: Engine) -> None:
    prompts = [FRANCE, "2 + 2 =", "Once upon a time", "The sky is"]
    expected = [o.text for o in engine.generate(prompts, GREEDY)]
    with Engine("smollm2-135m", devices=["cpu:1", "cpu:1"], kv_cache_memory="128MiB") as several:
        assert [o.text for o in several.generate(prompts, GREEDY)] == expected
        pieces = list(several.generate(prompts, GREEDY, stream=True))
        assert {p.metadata["index"] for p in pieces if p.finished} == {0, 1, 2, 3}
        with_slo = several.generate(prompts, GREEDY, slo="batch")
        assert {o.slo_class for o in with_slo} == {"batch"}
        assert {o.service.worker for o in with_slo if o.service} == {"w0", "w1"}
        assert all(o.verdict is not None and o.verdict.met for o in with_slo)
        with pytest.raises(ContextTooLong):
            several.generate("x " * 20_000, GREEDY)
