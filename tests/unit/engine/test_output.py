"""From token deltas to a caller's text."""

from collections.abc import Sequence

from nexusengine.engine.output import OutputProcessor
from nexusengine.engine.stop import StopStrings
from nexusengine.tokenize import Tokenizer
from nexusengine.types import (
    SLO,
    FinishReason,
    RequestOutput,
    Service,
    Timings,
    TokenDelta,
    TokenLogprob,
    Verdict,
)
from tests.support.vocabularies import sentencepiece


class Letters:
    """Token i is the i-th letter."""

    held = ""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._length = 0

    def push(self, token_ids: Sequence[int]) -> str:
        for _ in token_ids:
            self._starts.append(self._length)
            self._length += 1
        return "".join(chr(ord("a") + i) for i in token_ids)

    def finish(self) -> str:
        return ""

    def take_starts(self) -> list[int]:
        starts, self._starts = self._starts, []
        return starts


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


def over_bytes(*stops: str) -> tuple[OutputProcessor, dict[str, int]]:
    """A processor over a byte-fallback vocabulary, and the ids of its tokens."""
    backend = sentencepiece()
    tokenizer = Tokenizer(backend, bos_token_id=None, eos_token_ids=())
    return OutputProcessor("r", (1,), tokenizer.stream(), StopStrings(stops)), backend.get_vocab()


def test_a_stop_string_of_byte_tokens_ends_the_output_with_its_last_byte() -> None:
    """ "\\n" is <0x0A> in Llama 2's vocabulary, which waits for its neighbours: the token after it is not needed."""
    for stop, tokens in (("\n", ("<0x0A>",)), ("a\n😀", ("a", "<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"))):
        p, ids = over_bytes(stop)
        outputs = [p.push(TokenDelta("r", (ids[token],)), 1.0) for token in ("▁the", "w", *tokens)]
        assert [o is not None and o.finish_reason for o in outputs] == [None] * (len(outputs) - 1) + ["stop"]
        assert "".join(o.text for o in outputs if o) == "thew"
        assert outputs[-1] is not None
        assert outputs[-1].stop_reason == stop


def test_bytes_that_turn_out_to_be_no_text_are_no_stop_string() -> None:
    p, ids = over_bytes("\n\n")
    outputs = [p.push(TokenDelta("r", (ids[t],)), 1.0) for t in ("<0x0A>", "<0xFF>", "<0x0A>", "w", "<0x0A>", "w")]
    outputs.append(p.push(TokenDelta("r", (ids["<0x0A>"],), finish_reason="length"), 1.0))
    assert "".join(o.text for o in outputs if o) == "\ufffd\ufffd\ufffdw\nw\n"
    assert outputs[-1] is not None
    assert outputs[-1].finish_reason == "length"


def test_the_offset_of_a_token_comes_with_the_text_it_begins() -> None:
    p, ids = over_bytes("world")
    tokens = ("▁the", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "w", "<s>", "or", "w", "or", "ld")
    outputs = [p.push(TokenDelta("r", (ids[token],)), 1.0) for token in tokens]
    assert [(o.text, o.text_offsets) for o in outputs if o is not None] == [
        ("the", (0,)),
        ("", ()),
        ("", ()),
        ("", ()),
        ("", ()),
        ("😀", (3, 3, 3, 3)),  # "w" may begin the stop string
        ("", ()),
        ("", ()),
        ("wor", (4, 5, 5)),
        ("", ()),
        ("", (7, 7, 7)),
    ]


def judged(*pushes: tuple[TokenDelta, float], slo: SLO | None, stops: tuple[str, ...] = ()) -> RequestOutput:
    """The last output of a request that arrived at 10.0."""
    p = OutputProcessor("r", (1,), Letters(), StopStrings(stops), slo=slo, slo_class="gold", arrival_s=10.0)
    outputs = [output for delta, now in pushes if (output := p.push(delta, now)) is not None]
    assert [o.verdict for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    return outputs[-1]


def ended(strict: bool = True, reason: FinishReason = "length") -> tuple[TokenDelta, float]:
    """First token after 1 s, the fifth and last after 2 s more."""
    timings = Timings(10.0, 10.5, 11.0, 13.0, 5)
    service = Service("w3", 0.7, strict=strict)
    return TokenDelta("r", (0,), finish_reason=reason, timings=timings, preemptions=2, service=service), 13.0


def test_the_last_output_says_whether_the_promise_was_kept_and_what_broke_it() -> None:
    for slo, verdict in (
        (SLO(1.0, 0.5), Verdict(True, True)),
        (SLO(0.9, 0.5), Verdict(False, False, "ttft")),
        (SLO(1.0, 0.4), Verdict(False, False, "tpot")),
        (SLO(1.0, 0.5, 2.9), Verdict(False, False, "e2e")),
        (None, None),
    ):
        last = judged(ended(), slo=slo)
        assert last.verdict == verdict
        assert (last.slo, last.slo_class, last.preemptions) == (slo, "gold", 2)
        assert last.service == Service("w3", 0.7)
    assert judged(ended(strict=False), slo=SLO(1.0, 0.5)).verdict == Verdict(True, False)
    assert judged(ended(reason="abort"), slo=SLO(1.0, 0.5)).verdict == Verdict(False, False, "unfinished")


def test_where_a_stop_string_ends_a_request_the_strict_contract_is_judged_by_what_was_seen() -> None:
    first = TokenDelta("r", (0,), timings=Timings(10.0, 10.1, 10.9), service=Service("w0", 0.5))
    for second_s, strict in ((11.5, True), (11.6, False)):
        pushes = ((first, 10.9), (TokenDelta("r", (1,)), second_s), (TokenDelta("r", (2,)), 11.9))
        last = judged(*pushes, slo=SLO(1.0, 0.5), stops=("c",))
        assert (last.finish_reason, last.verdict) == ("stop", Verdict(True, strict))
