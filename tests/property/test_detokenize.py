"""Text of token ids: streamed, whole and the libraries' own are the same, for any ids and every kind of vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexusengine.tokenize import Tokenizer
from tests.support import vocabularies
from tests.support.vocabularies import KINDS, random_ids


@cache
def backend(kind: str) -> tokenizers.Tokenizer:
    return KINDS[kind]()


def ours(of: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(of, bos_token_id=None, eos_token_ids=())


def ids_of(kind: str, *tokens: str) -> list[int]:
    ids = [backend(kind).token_to_id(token) for token in tokens]
    assert None not in ids
    return [i for i in ids if i is not None]


def streamed(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    steps: Sequence[int] = (1,),
    skip: bool = True,
    context: Sequence[int] = (),
) -> tuple[str, list[int]]:
    """(text, where tokens begin in it) of ids pushed by so many at a time."""
    stream, text, at, n = tokenizer.stream(skip, context), "", 0, 0
    while at < len(ids):
        text += stream.push(ids[at : at + steps[n % len(steps)]])
        at, n = at + steps[n % len(steps)], n + 1
    text += stream.finish()
    return text, stream.take_starts()


BYTE_FALLBACK = "byte fallback"
EMOJI = ("<0xF0>", "<0x9F>", "<0x98>", "<0x80>")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (("▁the", *EMOJI, "w", "or", "ld"), "the😀world"),
        ((*EMOJI, *EMOJI), "😀😀"),
        (("<0x41>", "<0xFF>", "w"), "\ufffd\ufffdw"),
        ((*EMOJI, "<0x80>"), "\ufffd" * 5),
        (("a", "<0xF0>", "<0x9F>"), "a\ufffd\ufffd"),
        (("<0xF0>", "<s>", "<0x9F>", "<0x98>", "<0x80>"), "😀"),
        (("a", "\ufffd", "w", "\ufffd"), "a\ufffdw\ufffd"),
        (("<0x0A>", "<0x0A>", "▁the"), "\n\n the"),
        (("▁", "▁the"), " the"),
    ],
)
def test_byte_tokens_make_the_characters_they_stand_for(tokens: tuple[str, ...], text: str) -> None:
    ids = ids_of(BYTE_FALLBACK, *tokens)
    assert backend(BYTE_FALLBACK).decode(ids) == text, "what the library says"
    tokenizer = ours(backend(BYTE_FALLBACK))
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids)[0] == text


def test_a_character_of_byte_tokens_comes_out_as_soon_as_it_is_final() -> None:
    stream = ours(backend(BYTE_FALLBACK)).stream()
    assert [stream.push([i]) for i in ids_of(BYTE_FALLBACK, "a", *EMOJI, "w")] == ["a", "", "", "", "", "😀w"]
    stream = ours(backend("byte-level")).stream()
    assert [stream.push([i]) for i in ids_of("byte-level", "ðŁĺ", "ĢĠa", "ðŁĺ", "the")] == ["", "😀 a", "", "\ufffdthe"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_give_the_librarys_text_whole_and_streamed(kind: str) -> None:
    """2,000 sequences a vocabulary."""
    of, seed = backend(kind), 7
    tokenizer, rng = ours(of), random.Random(seed)
    for _ in range(2000):
        ids, skip = random_ids(rng, of, rng.randrange(16)), rng.random() < 0.5
        text = of.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip) == text
        out, starts = streamed(tokenizer, ids, [rng.randint(1, 3)], skip)
        assert out == text, (seed, ids, skip)
        assert len(starts) == len(ids)
        assert starts == sorted(starts)
        assert all(0 <= start <= len(text) for start in starts)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_prompt_the_text_is_what_the_library_gives_for_both_less_the_prompts(kind: str) -> None:
    of, seed, compared = backend(kind), 8, 0
    tokenizer, rng = ours(of), random.Random(seed)
    for _ in range(2000):
        prompt, ids = (random_ids(rng, of, rng.randrange(1, n)) for n in (6, 12))
        skip = rng.random() < 0.5
        before, both = of.decode(prompt, skip_special_tokens=skip), of.decode(prompt + ids, skip_special_tokens=skip)
        if both.startswith(before):  # else the ids complete a character that the prompt begins
            compared += 1
            assert streamed(tokenizer, ids, [2], skip, prompt)[0] == both[len(before) :], (seed, prompt, ids, skip)
    assert compared > 1000


@pytest.mark.parametrize("kind", ["byte-level", BYTE_FALLBACK])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hypothesis_finds_no_ids_that_differ(kind: str, data: st.DataObject) -> None:
    of = backend(kind)
    ids = data.draw(st.lists(st.integers(0, of.get_vocab_size() + 2), max_size=40))
    steps, skip = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8)), data.draw(st.booleans())
    assert streamed(ours(of), ids, steps, skip)[0] == of.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
@example("é", "日本\n 🦙")
def test_a_text_in_two_halves_is_the_text(kind_prompt: str, rest: str) -> None:
    for kind in ("byte-level", "byte fallback without strip"):
        of = backend(kind)
        prompt, ids = (vocabularies.in_bytes(of, text) if text else [] for text in (kind_prompt, rest))
        assert streamed(ours(of), ids, context=prompt)[0] == rest


def test_a_character_that_a_prompt_begins_comes_out_whole() -> None:
    for kind, tokens in ((BYTE_FALLBACK, EMOJI), ("byte-level", ("ð", "Ł", "ĺ", "Ģ"))):
        ids = ids_of(kind, *tokens)
        for cut in (1, 2, 3):
            assert streamed(ours(backend(kind)), ids[cut:], context=ids[:cut])[0] == "😀"


def test_a_continuation_keeps_the_space_of_its_first_word() -> None:
    tokenizer = ours(backend(BYTE_FALLBACK))
    the, bos = ids_of(BYTE_FALLBACK, "▁the", "<s>")
    assert streamed(tokenizer, [the], context=ids_of(BYTE_FALLBACK, "<s>", "▁a", "▁c"))[0] == " the"
    assert streamed(tokenizer, [the], context=ids_of(BYTE_FALLBACK, "▁a", "▁c", "<s>"))[0] == " the"
    assert streamed(tokenizer, [the], context=[bos])[0] == "the", "the first word of a text"
    assert streamed(tokenizer, [the], context=[bos], skip=False)[0] == " the"


def test_where_tokens_begin_counts_characters_of_the_text() -> None:
    for kind, tokens, starts in (
        (BYTE_FALLBACK, ("▁the", *EMOJI, "w", "<s>", "or"), [0, 3, 3, 3, 3, 4, 5, 5]),
        (BYTE_FALLBACK, ("a", "<0xC3>", "<0xA9>", *EMOJI), [0, 1, 1, 2, 2, 2, 2]),
        (BYTE_FALLBACK, ("a", "<0xF0>", "<0x9F>", "w"), [0, 1, 2, 3]),
        ("byte-level", ("the", "ðŁĺ", "ĢĠa", "Ġthe"), [0, 3, 3, 6]),
        ("byte-level", ("the", "ĠðŁ", "ĺ", "Ģ", "Ġthe"), [0, 3, 4, 4, 5]),
        ("byte-level", ("ðŁĺ", "the", "ðŁĺ", "ĢĠa"), [0, 1, 4, 4]),
        ("byte-level", ("Ģ", "Ģ", "the"), [0, 1, 2]),
    ):
        assert streamed(ours(backend(kind)), ids_of(kind, *tokens))[1] == starts, tokens


@pytest.mark.parametrize("kind", ["byte-level", BYTE_FALLBACK])
def test_bytes_without_end_that_are_no_text_cost_what_other_tokens_do(kind: str) -> None:
    """8,000 of them; each may be decoded once or twice, not as often as there are tokens after it."""
    of = backend(kind)
    (bad,) = ids_of(kind, "<0xF0>") if kind == BYTE_FALLBACK else ids_of(kind, "ð")
    tokenizer, decoded = ours(of), 0
    decode = tokenizer.decode

    def counted(token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids, skip_special_tokens)

    tokenizer.decode = counted  # type: ignore[method-assign]
    assert streamed(tokenizer, [bad] * 8000)[0] == "\ufffd" * 8000
    assert decoded <= 16_100


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("no decoder", "end of word", "word piece")])
def test_bytes_of_tokens_joined_are_the_text(kind: str) -> None:
    """What a client does with `bytes`; the first word's space aside, which some decoders leave out of a whole text.
    Other decoders put spaces between tokens that are in none of them."""
    of, rng = backend(kind), random.Random(9)
    tokenizer = ours(of)
    for _ in range(300):
        ids = [i for i in random_ids(rng, of, 12) if i < of.get_vocab_size()]
        text = of.decode(ids, skip_special_tokens=False)
        if "\ufffd" not in text:
            joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
            assert joined in (text, f" {text}", f"  {text}"), ids


def test_token_strings_keep_their_space_and_show_bytes() -> None:
    tokenizer = ours(backend(BYTE_FALLBACK))
    shown = [tokenizer.token_str(i) for i in ids_of(BYTE_FALLBACK, "▁the", "<0xF0>", "<0x41>", "<0x0A>", "<s>", "🦙")]
    assert shown == [" the", r"\xf0", "A", "\n", "<s>", "🦙"]
    assert tokenizer.token_bytes(ids_of(BYTE_FALLBACK, "<0xF0>")[0]) == b"\xf0"
    tokenizer = ours(backend("byte-level"))
    shown = [tokenizer.token_str(i) for i in ids_of("byte-level", "Ġthe", "ĠðŁ", "ĢĠa", "  日 ", "Ã©")]
    assert shown == [" the", r" \xf0\x9f", r"\x80 a", "  日 ", "é"]
    assert tokenizer.token_str(10**6) == "", "an id without a token"


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2"])
def test_published_vocabularies_give_transformers_text(name: str, tmp_path: Path) -> None:
    theirs: Any = vocabularies.published(name, tmp_path)
    of, seed = theirs.backend_tokenizer, 10
    tokenizer, rng = ours(of), random.Random(seed)
    if name == "llama-spm":
        assert streamed(tokenizer, [29871, 243, 162, 169, 156])[0] == "🦙"
        assert tokenizer.decode([29871, 243, 162, 169, 156]) == "🦙"
    for _ in range(600):
        ids, skip = random_ids(rng, of, rng.randrange(24)), rng.random() < 0.5
        text = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert streamed(tokenizer, ids, [rng.randint(1, 3)], skip)[0] == text, (seed, ids, skip)
        assert tokenizer.decode(ids, skip) == text
