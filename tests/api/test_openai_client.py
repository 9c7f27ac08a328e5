"""OpenAI's own Python client against the server, unchanged."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest

from tests.api.conftest import MODEL, FakeTokenizer, Running
from tests.support.fakes import continuation

TOKENIZER = FakeTokenizer()


def answer(prompt: str, tokens: int) -> str:
    return TOKENIZER.decode(continuation(TOKENIZER.encode(prompt), tokens))


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=7
    )
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == answer("user: hi\n", 7)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (9, 7, 16)


def test_a_chat_is_streamed_with_role_text_reason_and_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        temperature=0,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer("user: hi\n", 7)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


def test_completions_take_texts_token_ids_and_lists_of_them(client: openai.OpenAI) -> None:
    for prompt in ("ab", TOKENIZER.encode("ab"), ["ab", "cd"], [TOKENIZER.encode("ab"), TOKENIZER.encode("cd")]):
        reply = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5)
        texts = [c.text for c in sorted(reply.choices, key=lambda c: c.index)]
        assert texts == [answer("ab", 5), answer("cd", 5)][: len(texts)]
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 5 * len(texts)


def test_several_choices_are_numbered_and_streams_interleave(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=["ab", "cd"], n=2, temperature=0, max_tokens=6, stream=True, echo=True
    )
    texts = dict.fromkeys(range(4), "")
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {i: p + answer(p, 6) for i, p in enumerate(["ab", "ab", "cd", "cd"])}


def test_the_prompt_counts_once_for_several_choices(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="abc", n=3, temperature=0, max_tokens=2)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 6)


def test_a_stop_string_is_cut_off_in_both_forms(client: openai.OpenAI, server: Running) -> None:
    whole = answer("ab", 40)
    stop = whole[9:12]
    reply = client.completions.create(model=MODEL, prompt="ab", temperature=0, max_tokens=40, stop=[stop])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (whole[: whole.find(stop)], "stop")
    stream = client.completions.create(model=MODEL, prompt="ab", temperature=0, max_tokens=40, stop=stop, stream=True)
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.find(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.idle()


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="ab", temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="ab")


def test_comments_in_a_stream_that_waits_are_no_chunks(start_server: Callable[..., Running]) -> None:
    server = start_server(real_s=0.15, sse_keepalive=0.03)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model=MODEL, prompt="ab", temperature=0, max_tokens=4, stream=True)
    assert "".join(c.choices[0].text for c in stream) == answer("ab", 4)
