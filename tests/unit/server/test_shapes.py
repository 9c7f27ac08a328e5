"""Logprobs as OpenAI's clients read them."""

from __future__ import annotations

import json
from typing import Any

from openai.types import CompletionChoice
from openai.types.chat.chat_completion import ChoiceLogprobs

from nexusengine.server.shapes import ChatShape, TextShape
from nexusengine.tokenize import Tokenizer
from nexusengine.types import TokenLogprob
from tests.support.vocabularies import byte_level, sentencepiece, unigram


def tokenizer_of(backend: Any) -> Tokenizer:
    return Tokenizer(backend, bos_token_id=None, eos_token_ids=())


SPM = tokenizer_of(sentencepiece())
IDS = sentencepiece().get_vocab()


def in_chat(*items: TokenLogprob, tokenizer: Tokenizer = SPM) -> list[dict[str, Any]]:
    """Checked by OpenAI's own model of a reply."""
    shape = ChatShape()
    whole = shape.logprobs([shape.entry(tokenizer, item, 0) for item in items])
    read = {"content": [json.loads(bytes(entry)) for entry in whole["content"]], "refusal": whole["refusal"]}
    content: list[dict[str, Any]] = ChoiceLogprobs.model_validate(read, strict=True).model_dump()["content"]
    return content


def in_text(*items: TokenLogprob, tokenizer: Tokenizer = SPM) -> dict[str, Any]:
    shape = TextShape()
    found = shape.logprobs([shape.entry(tokenizer, item, 3 * n) for n, item in enumerate(items)])
    found["top_logprobs"] = [json.loads(bytes(top)) for top in found["top_logprobs"]]
    choice = {"finish_reason": "stop", "index": 0, "text": "", "logprobs": found}
    checked = CompletionChoice.model_validate(choice, strict=True).model_dump()["logprobs"]
    assert checked == found
    return found


def test_the_output_token_is_always_among_the_alternatives() -> None:
    the, a, w = IDS["▁the"], IDS["a"], IDS["w"]
    likely = TokenLogprob(the, -0.5, ((the, -0.5), (a, -1.0)))
    unlikely = TokenLogprob(w, -9.0, ((the, -0.5), (a, -1.0)))
    alone = TokenLogprob(w, -9.0, ())
    assert in_text(likely, unlikely, alone) == {
        "tokens": [" the", "w", "w"],
        "token_logprobs": [-0.5, -9.0, -9.0],
        "top_logprobs": [{" the": -0.5, "a": -1.0}, {" the": -0.5, "a": -1.0, "w": -9.0}, {"w": -9.0}],
        "text_offset": [0, 3, 6],
    }
    chat = in_chat(likely, unlikely, alone)
    assert [[t["token"] for t in entry["top_logprobs"]] for entry in chat] == [[" the", "a"], [" the", "w"], []]
    assert [(entry["token"], entry["logprob"]) for entry in chat] == [(" the", -0.5), ("w", -9.0), ("w", -9.0)]


def test_bytes_of_the_tokens_of_a_character_make_it() -> None:
    for tokenizer, ids in (
        (SPM, [IDS[f"<0x{byte:02X}>"] for byte in "😀".encode()]),
        (tokenizer_of(byte_level()), [byte_level().get_vocab()[t] for t in ("ðŁĺ", "Ģ")]),
    ):
        entries = in_chat(*(TokenLogprob(i, -1.0, ((i, -1.0),)) for i in ids), tokenizer=tokenizer)
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "😀"
        assert [entry["top_logprobs"][0]["bytes"] for entry in entries] == [entry["bytes"] for entry in entries]
        assert entries[-1]["token"] == r"\x80"
    (space,) = in_chat(TokenLogprob(IDS["▁the"], -1.0))
    assert (space["token"], bytes(space["bytes"])) == (" the", b" the")


def test_an_id_without_a_token_has_no_bytes() -> None:
    (entry,) = in_chat(TokenLogprob(10**6, -1.0))
    assert (entry["token"], entry["bytes"]) == ("", None)


def test_tokens_of_one_text_keep_their_own_entries() -> None:
    """Text "A" is a token and a byte token; both are likely."""
    text, byte = IDS["A"], IDS["<0x41>"]
    by_text = TokenLogprob(text, -0.5, ((text, -0.5), (byte, -1.0)))
    by_byte = TokenLogprob(byte, -1.0, ((text, -0.5), (byte, -1.0)))
    assert in_text(by_text, by_byte)["top_logprobs"] == [
        {"A": -0.5, r"bytes:\x41": -1.0},
        {r"bytes:\x41": -0.5, "A": -1.0},
    ]
    parts = [IDS["<0xF0>"], IDS["<0xE2>"], IDS["<0xC3>"]]
    emoji = in_text(TokenLogprob(parts[0], -0.9, tuple((p, -0.9 - n) for n, p in enumerate(parts))))
    assert emoji["top_logprobs"] == [{r"bytes:\xf0": -0.9, r"bytes:\xe2": -1.9, r"bytes:\xc3": -2.9}]
    assert emoji["tokens"] == [r"bytes:\xf0"]


def test_three_tokens_of_one_text_have_three_names() -> None:
    backend = sentencepiece()
    backend.add_tokens([" "])
    tokenizer, ids = tokenizer_of(backend), [backend.get_vocab()[t] for t in ("▁", "<0x20>", " ")]
    found = in_text(TokenLogprob(ids[1], -2.0, tuple((i, -1.0 - n) for n, i in enumerate(ids))), tokenizer=tokenizer)
    assert found["tokens"] == [" "]
    assert found["top_logprobs"] == [{r"bytes:\x20": -1.0, " ": -2.0, f"token_id:{ids[2]}": -3.0}]


def test_a_token_without_probability_is_written_as_openai_does() -> None:
    item = TokenLogprob(IDS["a"], float("-inf"), ((IDS["w"], -0.1), (IDS["a"], float("-inf"))))
    assert in_text(item)["top_logprobs"] == [{"w": -0.1, "a": -9999.0}]
    assert in_chat(item)[0]["logprob"] == -9999.0


def test_a_metaspace_vocabulary_keeps_spaces_too() -> None:
    from tokenizers import decoders

    backend = unigram(decoders.Metaspace())
    found = in_text(TokenLogprob(backend.get_vocab()["▁the"], -1.0), tokenizer=tokenizer_of(backend))
    assert found["tokens"] == [" the"]
