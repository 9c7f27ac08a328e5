"""Stop strings and incremental detokenising: pieces add up to what the whole text gives."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexusengine.engine.stop import StopStrings
from nexusengine.tokenize.incremental import IncrementalDetokenizer

pieces = st.lists(st.text("ab ", max_size=4), max_size=12)
stops = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3)


@settings(max_examples=500)
@given(pieces=pieces, stops=stops)
@example(pieces=["a", "a", "b"], stops=["aab", "ab"])
@example(pieces=["aba"], stops=["b", "aba"])
@example(pieces=["aabaaab"], stops=["aabaab", "aaab"])
def test_text_is_cut_before_the_first_stop_string_to_be_complete(pieces: list[str], stops: list[str]) -> None:
    finder, out, matched, seen = StopStrings(stops), "", None, ""
    for piece in pieces:
        seen += piece
        text, matched = finder.push(piece)
        out += text
        if matched is not None:
            break
    else:
        out += finder.finish()
    whole = "".join(pieces)
    if matched is None:
        assert out == whole
        assert not any(s in whole for s in stops)
    else:
        end, start, first = min((whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole)
        assert (out, matched) == (whole[:start], first), "it depends on where the pieces were cut"
        assert len(seen) >= end
        assert len(seen) - len(piece) < end, "found as soon as it was complete"


class Bytes:
    """A tokenizer whose tokens are single bytes: the hardest case for whole characters."""

    def __call__(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@settings(max_examples=300)
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(1, 5), min_size=1))
@example(text="🎉 é 日本語" * 5, cuts=[1])
def test_pieces_of_text_add_up_and_hold_whole_characters(text: str, cuts: list[int]) -> None:
    ids, at, out = list(text.encode()), 0, []
    detokenizer = IncrementalDetokenizer(Bytes())
    for i in range(len(ids)):
        if at < len(ids):
            step = cuts[i % len(cuts)]
            out.append(detokenizer.push(ids[at : at + step]))
            at += step
    assert "\ufffd" in text or "\ufffd" not in "".join(out)
    assert "".join(out) + detokenizer.finish() == text


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 255), max_size=80))
def test_bytes_that_are_no_text_come_out_as_they_would_all_at_once(ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(Bytes())
    out = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
    assert out == Bytes()(ids)
