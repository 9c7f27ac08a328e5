"""Engine in the caller's process, over the fake device."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nexusengine.engine.offline
from nexusengine import SLO, Engine, SamplingParams
from nexusengine.clock import MonotonicClock
from nexusengine.config import EngineConfig
from nexusengine.core.engine_core import EngineCore
from nexusengine.errors import ConfigError, ContextTooLong, InternalError, InvalidRequest, Unavailable
from nexusengine.slo.classes import CLASSES
from nexusengine.types import RequestOutput, Verdict
from tests.api.conftest import FakeTokenizer
from tests.support.fakes import VOCABULARY, FakeExecutor, continuation, make_core

TOKENIZER = FakeTokenizer()
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def answer(prompt: str, tokens: int = 6) -> str:
    return TOKENIZER.decode(continuation(TOKENIZER.encode(prompt), tokens))


class Device(FakeExecutor):
    """The fake device, with something that can happen in the middle of a step."""

    happens: Any = None

    def collect(self) -> Any:
        if self.happens is not None:
            happens, self.happens = self.happens, None
            happens()
        return super().collect()


@pytest.fixture
def core() -> EngineCore:
    return make_core(Device(num_blocks=256), clock=MonotonicClock(), max_waiting=4)


def device_of(core: EngineCore) -> Device:
    assert isinstance(core.executor, Device)
    return core.executor


@pytest.fixture
def engine(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(nexusengine.engine.offline, "make_local", lambda config: (core, TOKENIZER, VOCABULARY))
    with Engine("fake", devices="cpu") as made:
        yield made


@pytest.mark.parametrize(("asked", "made"), [({}, "lens"), ({"scheduler": "fcfs:budget=80"}, "fcfs:budget=80")])
def test_an_engine_in_its_callers_thread_has_the_same_schedulers_as_a_server(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], made: str
) -> None:
    schedulers: list[str] = []

    def make(config: EngineConfig) -> tuple[EngineCore, object, int]:
        schedulers.append(config.scheduler)
        return core, TOKENIZER, VOCABULARY

    monkeypatch.setattr(nexusengine.engine.offline, "make_local", make)
    Engine("fake", devices="cpu", **asked).close()
    assert schedulers == [made]


def test_one_prompt_gives_a_list_of_one(engine: Engine) -> None:
    (output,) = engine.generate("ab", GREEDY)
    assert (output.text, output.finish_reason, output.prompt) == (answer("ab"), "length", "ab")
    assert output.token_ids == tuple(continuation(TOKENIZER.encode("ab"), 6))
    assert engine.generate(TOKENIZER.encode("ab"), GREEDY)[0].text == answer("ab")


def test_many_prompts_more_than_the_queue_holds_are_answered_in_their_order(engine: Engine) -> None:
    prompts: list[Any] = [f"prompt {i}" for i in range(20)]
    prompts[3] = TOKENIZER.encode(prompts[3])
    outputs = engine.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=1 + i % 5) for i in range(20)])
    assert [o.text for o in outputs] == [answer(f"prompt {i}", 1 + i % 5) for i in range(20)]
    assert [o.timings is not None and o.timings.output_tokens for o in outputs] == [1 + i % 5 for i in range(20)]


def test_without_sampling_parameters_decoding_is_greedy_and_bounded(engine: Engine) -> None:
    with pytest.raises(ContextTooLong, match="256 output tokens"):
        engine.generate("ab")  # the fake model's context is 128


def test_nothing_starts_if_one_of_the_prompts_is_wrong(engine: Engine, core: EngineCore) -> None:
    for prompts, wrong in (
        (["ab", ""], InvalidRequest),
        (["ab", "x" * 200], ContextTooLong),
        (["ab", [5000]], InvalidRequest),
        (["ab", ["c"]], InvalidRequest),
        (["ab", 7], InvalidRequest),
        (["ab", b"cd"], InvalidRequest),
        ([], InvalidRequest),
        (7, InvalidRequest),
    ):
        with pytest.raises(wrong):
            engine.generate(prompts, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        engine.generate(["a", "b"], [GREEDY])
    for sampling in ({"max_tokens": 3}, [{"max_tokens": 3}], 3):
        with pytest.raises(InvalidRequest, match="sampling must be SamplingParams"):
            engine.generate("a", sampling)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="each of them an object with role and content, got 'hi'"):
        engine.chat("hi")  # type: ignore[arg-type]
    assert core.stats().requests == 0


def test_a_stream_gives_news_with_the_place_of_the_prompt(engine: Engine) -> None:
    pieces = list(engine.generate(["ab", "cd"], GREEDY, stream=True))
    texts = ["".join(p.text for p in pieces if p.metadata["index"] == i) for i in range(2)]
    assert texts == [answer("ab"), answer("cd")]
    assert [p.metadata["index"] for p in pieces[:4]] == [0, 1, 0, 1]
    assert sum(p.finished for p in pieces) == 2


def test_two_streams_and_a_plain_call_can_be_open_at_a_time(engine: Engine, core: EngineCore) -> None:
    first, second = (engine.generate(p, GREEDY, stream=True) for p in ("ab", "cd"))
    seen: list[list[RequestOutput]] = [[next(first)], [next(second)]]
    assert engine.generate("ef", GREEDY)[0].text == answer("ef")
    seen[1] += second
    seen[0] += first
    assert ["".join(p.text for p in pieces) for pieces in seen] == [answer("ab"), answer("cd")]
    assert not core.has_work


def test_closing_a_stream_aborts_what_is_left_of_it(engine: Engine, core: EngineCore) -> None:
    news = engine.generate(["ab", "cd"], GREEDY, stream=True)
    next(news)
    assert core.has_work
    news.close()  # type: ignore[attr-defined]
    assert not core.has_work
    assert core.stats().finished_abort == 2
    assert engine.generate("ab", GREEDY)[0].text == answer("ab")


def test_a_stop_string_ends_the_request_in_the_core_too(engine: Engine, core: EngineCore) -> None:
    stop = answer("ab", 40)[10:12]
    (output,) = engine.generate("ab", SamplingParams(temperature=0.0, max_tokens=40, stop=(stop,)))
    text = answer("ab", 40)
    assert (output.text, output.finish_reason, output.stop_reason) == (text[: text.find(stop)], "stop", stop)
    assert not core.has_work
    assert core.stats().generated_tokens < 40


def test_ctrl_c_waits_for_the_step_and_leaves_a_usable_engine(engine: Engine, core: EngineCore) -> None:
    device_of(core).happens = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["ab", "cd"], GREEDY)
    assert not core.has_work
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine.generate("ab", GREEDY)[0].text == answer("ab")


def test_a_second_ctrl_c_does_not_wait(engine: Engine, core: EngineCore) -> None:
    reached = []

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(signal.SIGINT)
        reached.append("after the second")

    device_of(core).happens = twice
    with pytest.raises(KeyboardInterrupt):
        engine.generate("ab", GREEDY)
    assert reached == ["after the first"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_is_an_output_with_its_error_among_the_others(
    core: EngineCore, engine: Engine, stream: bool
) -> None:
    device_of(core).poison = frozenset({TOKENIZER.encode("z")[0]})
    outputs = list(engine.generate(["ab", "z", "cd"], GREEDY, stream=stream))  # type: ignore[call-overload]
    ends = {o.metadata["index"]: o for o in outputs if o.finished}
    assert [ends[i].finish_reason for i in range(3)] == ["length", "error", "length"]
    assert isinstance(ends[1].error, InternalError)
    assert "not finite" in ends[1].error.message
    assert (ends[0].error, ends[2].error) == (None, None)
    texts = ["".join(o.text for o in outputs if o.metadata["index"] == i) for i in range(3)]
    assert texts == [answer("ab"), "", answer("cd")]
    assert not core.has_work
    assert core.stats().finished_abort == 0


def test_a_step_that_fails_ends_the_engine_but_loses_no_output(core: EngineCore, engine: Engine) -> None:
    def fail() -> None:
        raise RuntimeError("the device fell off the bus")

    first, second = (SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 6))
    news = engine.generate(["ab", "cd"], [first, second], stream=True)
    outputs = [next(news)]
    device_of(core).happens = fail
    outputs += news
    ends = {o.metadata["index"]: o for o in outputs if o.finished}
    assert (ends[0].text, ends[0].finish_reason) == (answer("ab", 1), "length")
    assert isinstance(ends[1].error, InternalError)
    assert ends[1].error.message == "a step failed: the device fell off the bus"
    with pytest.raises(InternalError, match="fell off the bus"):
        engine.generate("ab", GREEDY)


def test_chat_takes_one_conversation_or_several(engine: Engine) -> None:
    talk = [{"role": "user", "content": "hi"}]
    assert engine.chat(talk, GREEDY)[0].text == answer("user: hi\n")  # type: ignore[index]
    both = engine.chat([talk, [{"role": "user", "content": "ho"}]], GREEDY)
    assert [o.text for o in both] == [answer("user: hi\n"), answer("user: ho\n")]
    assert "".join(p.text for p in engine.chat(talk, GREEDY, stream=True)) == answer("user: hi\n")


def test_a_progress_bar_goes_to_stderr_only_when_it_is_wanted(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.generate(["ab"] * 12, GREEDY)
    assert capsys.readouterr() == ("", "")
    engine.generate(["ab"] * 2, GREEDY, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "100%" in shown.err


def test_a_closed_engine_says_so_and_can_be_closed_again(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(Unavailable, match="closed"):
        engine.generate("ab", GREEDY)


@pytest.mark.parametrize(
    ("settings", "param"),
    [({"max_runing": 3}, "max_runing"), ({"max_running": 0}, "max_running"), ({"devices": "tpu"}, "devices")],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine("no-such-model", **settings)
    assert caught.value.param == param


def test_a_promise_by_class_or_in_numbers_is_judged_in_the_output(engine: Engine) -> None:
    (output,) = engine.generate("ab", GREEDY, slo="batch", priority=4)
    assert (output.slo_class, output.slo) == ("batch", CLASSES["batch"].slo(2))
    assert output.verdict == Verdict(True, True)
    assert output.service is not None
    assert output.service.worker == "w0"
    (output,) = engine.generate("ab", GREEDY, slo=SLO(0.001, 1e-4))
    assert output.slo_class == "custom"
    assert output.verdict is not None
    assert not output.verdict.met
    (output,) = engine.generate("ab", GREEDY)
    assert (output.slo, output.slo_class, output.verdict) == (None, None, None)


def test_an_unknown_class_or_an_absurd_priority_starts_nothing(engine: Engine, core: EngineCore) -> None:
    for wrong, param in (({"slo": "fast"}, "slo"), ({"priority": 101}, "priority"), ({"priority": True}, "priority")):
        with pytest.raises(InvalidRequest) as caught:
            engine.generate("ab", GREEDY, **wrong)
        assert caught.value.param == param
    assert core.stats().requests == 0


def test_classes_of_a_file_are_known_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: EngineCore
) -> None:
    (tmp_path / "slo.toml").write_text("[gold]\nttft_s = 5\ntpot_s = 1\n")
    monkeypatch.setattr(nexusengine.engine.offline, "make_local", lambda config: (core, TOKENIZER, VOCABULARY))
    with Engine("fake", devices="cpu", slo_classes=str(tmp_path / "slo.toml")) as engine:
        assert engine.generate("ab", GREEDY, slo="gold")[0].slo == SLO(5.0, 1.0)
    with pytest.raises(ConfigError, match="cannot read"):
        Engine("fake", devices="cpu", slo_classes="nowhere.toml")
