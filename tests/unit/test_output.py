"""From token deltas to a caller's text."""

from nexusengine.core.output import OutputProcessor
from nexusengine.core.stop import StopStrings
from nexusengine.types import Timings, TokenDelta, TokenLogprob


class Letters:
    """Token i is the i-th letter."""

    def push(self, token_ids: tuple[int, ...]) -> str:
        return "".join(chr(ord("a") + i) for i in token_ids)

    def finish(self) -> str:
        return ""


def processor(*stops: str) -> OutputProcessor:
    return OutputProcessor("r", (1, 2), Letters(), StopStrings(stops))


def test_a_stop_string_across_tokens_ends_the_request_and_is_cut_off() -> None:
    p = processor("bcd")
    first = p.push(TokenDelta("r", (0, 1), timings=Timings(0.0, 0.5, 1.0), cached_tokens=16), 1.0)
    assert first is not None
    assert (first.text, first.finish_reason) == ("a", None)
    last = p.push(TokenDelta("r", (2, 3, 4)), 3.0)
    assert last is not None
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "bcd")
    assert p.stopped
    assert last.token_ids == (2, 3), "tokens after the one that completed it do not count"
    assert last.timings == Timings(0.0, 0.5, 1.0, 3.0, 4)
    assert last.cached_tokens == 16
    assert p.push(TokenDelta("r", (5,)), 4.0) is None


def test_what_was_held_back_comes_out_at_the_end() -> None:
    p = processor("bcd")
    outputs = [p.push(TokenDelta("r", (0, 1, 2), finish_reason=r), 1.0) for r in (None,)]
    outputs.append(p.push(TokenDelta("r", (), finish_reason="length"), 2.0))
    assert "".join(o.text for o in outputs if o) == "abc"
    assert outputs[-1] is not None
    assert outputs[-1].finish_reason == "length"


def test_logprobs_go_with_their_tokens() -> None:
    logprobs = tuple(TokenLogprob(i, -1.0) for i in (0, 1, 2, 3))
    whole = processor().push(TokenDelta("r", (0, 1, 2, 3), logprobs), 1.0)
    assert whole is not None
    assert whole.logprobs == logprobs
    cut = processor("bc").push(TokenDelta("r", (0, 1, 2, 3), logprobs), 1.0)
    assert cut is not None
    assert (cut.text, cut.token_ids, cut.logprobs) == ("a", (0, 1, 2), logprobs[:3])


def test_a_stop_string_wins_over_the_end_that_came_with_the_same_news() -> None:
    p = processor("b")
    last = p.push(TokenDelta("r", (0, 1, 2), finish_reason="length", timings=Timings(0.0, 0.1, 1.0, 2.0, 3)), 2.5)
    assert last is not None
    assert (last.text, last.finish_reason, last.stop_reason) == ("a", "stop", "b")
    assert last.timings == Timings(0.0, 0.1, 1.0, 2.5, 2)


def test_an_error_ends_the_output_and_keeps_what_there_was() -> None:
    p = processor("bcd")
    p.push(TokenDelta("r", (0, 1)), 1.0)
    last = p.push(TokenDelta("r", finish_reason="error", error_code="deadline_exceeded"), 2.0)
    assert last is not None
    assert (last.text, last.finish_reason) == ("b", "error")


def test_tokens_without_text_yet_are_still_told() -> None:
    p = processor("abc")
    first = p.push(TokenDelta("r", (0,)), 1.0)
    assert first is not None
    assert (first.text, first.token_ids) == ("", (0,))
    assert p.push(TokenDelta("r", ()), 1.0) is None
