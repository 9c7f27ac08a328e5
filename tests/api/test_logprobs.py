"""Text, offsets and logprobs over HTTP from given tokens, streamed and whole, with real vocabularies."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
import tokenizers

from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.engine.client import Sink
from nexusengine.tokenize import Tokenizer
from nexusengine.tokenize.chat_template import ChatTemplate
from nexusengine.types import EngineRequest, FinishReason, Timings, TokenDelta, TokenLogprob
from tests.api.conftest import MODEL, Running
from tests.support.vocabularies import byte_level, sentencepiece

EMOJI = ("<0xF0>", "<0x9F>", "<0x98>", "<0x80>")
MESSAGES = [{"role": "user", "content": "a"}]


class Script:
    """A backend that answers everything with the same tokens, `at_once` of them in one delta. The token after each is
    nearly as likely, and the third; each token has -1 - its place in the answer."""

    def __init__(self, backend: Any, answer: list[int], at_once: int) -> None:
        self._backend, self._answer, self._at_once = backend, answer, at_once

    def status(self) -> Any:
        return self._backend.status()

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        wanted = request.sampling.logprobs
        timings = Timings(request.arrival_s, request.arrival_s, request.arrival_s, request.arrival_s, len(self._answer))
        for begin in range(0, len(self._answer), self._at_once):
            ids = tuple(self._answer[begin : begin + self._at_once])
            items = tuple(
                TokenLogprob(i, -1.0 - n, tuple((i + k, -1.0 - n - k) for k in range(wanted or 0)))
                for n, i in enumerate(ids, start=begin)
            )
            last = begin + self._at_once >= len(self._answer)
            reason: FinishReason | None = "length" if last else None
            sink(TokenDelta(request.request_id, ids, None if wanted is None else items, reason, timings=timings))

    def abort(self, request_id: str) -> None:
        pass


@pytest.fixture
def answering(server: Running) -> Any:
    """`answering(backend, "token", ...)`: a server whose model answers with these tokens."""

    def start(backend: tokenizers.Tokenizer, *tokens: str, at_once: int = 1) -> str:
        template = ChatTemplate("{{ messages[0].content }}", {}, "test")
        tokenizer = Tokenizer(backend, bos_token_id=None, eos_token_ids=(), chat_template=template)
        answer = [backend.token_to_id(token) for token in tokens]
        real = server.state.serving_engine().backend
        vocab_size = tokenizer.vocab_size
        server.state.engine = AsyncEngine.from_client(Script(real, answer, at_once), tokenizer, vocab_size)  # type: ignore[arg-type]
        return server.url

    return start


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    """The first choice; a stream put together: its texts, its logprobs, and the chunks they came in."""
    reply = httpx.post(f"{url}/v1/{path}", json=body | {"model": MODEL}, timeout=30)
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return dict(reply.json()["choices"][0])
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    chat = "chat" in path
    whole: dict[str, Any] = {"text": "", "logprobs": {}, "chunks": []}
    for choice in choices:
        text = choice["delta"].get("content", "") if chat else choice["text"]
        whole["text"] += text
        whole["chunks"].append((text, choice["logprobs"]))
        for name, values in (choice["logprobs"] or {}).items():
            whole["logprobs"].setdefault(name, []).extend(values or [])
    return whole


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_emoji_of_byte_tokens_have_their_text_offsets_and_names(answering: Any, stream: bool, at_once: int) -> None:
    url = answering(sentencepiece(), "▁the", *EMOJI, "w", at_once=at_once)
    found = post(url, "completions", prompt="a", logprobs=1, stream=stream)
    assert found["text"] == " the😀w"
    assert found["logprobs"] == {
        "tokens": [" the", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "w"],
        "token_logprobs": [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        "top_logprobs": [
            {" the": -1.0},
            {r"bytes:\xf0": -2.0},
            {r"bytes:\x9f": -3.0},
            {r"bytes:\x98": -4.0},
            {r"bytes:\x80": -5.0},
            {"w": -6.0},
        ],
        "text_offset": [0, 4, 4, 4, 4, 5],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_a_stop_string_holds_back_moves_no_offset(answering: Any, stream: bool) -> None:
    url = answering(byte_level(), "the", "w", "o", "the", "w", "o", "r", "the")
    found = post(url, "completions", prompt="a", logprobs=0, stream=stream, stop="wor")
    assert found["text"] == "thewothe"
    assert found["logprobs"]["tokens"] == ["the", "w", "o", "the", "w", "o", "r"]
    assert found["logprobs"]["text_offset"] == [0, 3, 4, 5, 8, 8, 8]
    for text, logprobs in found.get("chunks", ()):
        assert "".join(logprobs["tokens"]).startswith(text), "a token comes with its text"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stop", [None, "wx", "\n\n\n", "w"])
@pytest.mark.parametrize("backend", [sentencepiece, byte_level])
def test_streamed_and_whole_replies_are_the_same(answering: Any, path: str, stop: str | None, backend: Any) -> None:
    answers: dict[Any, tuple[str, ...]] = {
        sentencepiece: ("▁the", "<0x0A>", "<0x0A>", *EMOJI, "<0xFF>", "<s>", "w", "w", "<0xF0>", "<0x9F>"),
        byte_level: ("the", "ðŁĺ", "Ģ", "Ċ", "Ċ", "Ģ", "<s>", "w", "w", "ðŁĺ", "the", "ð"),
    }
    url = answering(backend(), *answers[backend])
    body = (
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
        if "chat" in path
        else {"prompt": "a", "logprobs": 2}
    )
    whole, streamed = (post(url, path, **body, stop=stop, stream=stream) for stream in (False, True))
    text = whole["message"]["content"] if "chat" in path else whole["text"]
    assert streamed["text"] == text
    columns = ["content"] if "chat" in path else ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    for column in columns:
        assert streamed["logprobs"][column] == whole["logprobs"][column], column
    if stop is None:
        of = backend()
        ids = [of.token_to_id(token) for token in answers[backend]]
        prompt = of.encode("a").ids
        assert text == of.decode(prompt + ids)[len(of.decode(prompt)) :], "what the library gives"
    if "chat" in path:
        assert all(len(entry["top_logprobs"]) == 2 for entry in whole["logprobs"]["content"])
        shown = b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]["content"])
        assert shown.decode(errors="replace").replace("<s>", "").replace("\ufffd", "").startswith(text[:4])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_of_byte_tokens_ends_a_reply_at_once(answering: Any, stream: bool) -> None:
    url = answering(sentencepiece(), "▁the", "<0x0A>", "w", "w")
    found = post(url, "completions", prompt="a", stop="\n", logprobs=0, stream=stream)
    assert (found["text"], found["logprobs"]["tokens"]) == (" the", [" the", "\n"])


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_and_its_continuation_as_one_text(answering: Any, stream: bool) -> None:
    backend = sentencepiece()
    url = answering(backend, "▁the", "w")
    assert post(url, "completions", prompt="a c", echo=True, stream=stream)["text"] == "a c thew"
    assert post(url, "completions", prompt="a c", stream=stream)["text"] == " thew"
    ids = [backend.token_to_id(token) for token in ("<s>", "▁a", "▁c", *EMOJI)]
    assert post(url, "completions", prompt=ids, echo=True, stream=stream)["text"] == "<s> a c😀 thew"
    assert post(url, "completions", prompt=ids[:1], stream=stream)["text"] == "thew", "the first word of a text"


def test_openais_client_reads_logprobs(answering: Any) -> None:
    client = openai.OpenAI(base_url=f"{answering(byte_level(), 'the', 'ðŁĺ', 'Ģ')}/v1", api_key="none", max_retries=0)
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].message.content == "the😀"
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert b"".join(bytes(entry.bytes or ()) for entry in content).decode() == "the😀"
    assert all(entry.token in [top.token for top in entry.top_logprobs] for entry in content)
    text = client.completions.create(model=MODEL, prompt="a", logprobs=0)
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.top_logprobs == [
        {"the": -1.0},
        {r"bytes:\xf0\x9f\x98": -2.0},
        {r"bytes:\x80": -3.0},
    ]
