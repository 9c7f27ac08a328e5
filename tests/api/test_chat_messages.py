"""What a chat request may say to the model's chat template, and what it is told when it says too much."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from nexusengine.loading.sampling_defaults import SamplingDefaults
from nexusengine.server.body import parse
from nexusengine.server.schemas import ChatRequest, CompletionRequest
from nexusengine.tokenize.chat_template import ChatTemplate
from tests.api.conftest import FakeTokenizer, Running

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.name }}|{{ m.tool_calls is defined }}]{% endfor %}"
    "{{ style }}{{ documents[0].text if documents else '' }}{% if add_generation_prompt %}[assistant|{% endif %}"
)


@pytest.fixture
def with_template(server: Running) -> Running:
    use(server, TEMPLATE)
    return server


def use(server: Running, source: str) -> FakeTokenizer:
    assert server.state.engine is not None
    tokenizer = server.state.engine.tokenizer
    assert isinstance(tokenizer, FakeTokenizer)
    tokenizer.template = ChatTemplate(source, {}, "m")
    return tokenizer


def prompt_of(server: Running, *messages: Any, **more: Any) -> str:
    reply = httpx.post(f"{server.url}/tokenize", json={"messages": messages, **more})
    assert reply.status_code == 200, reply.text
    return FakeTokenizer().decode(reply.json()["tokens"])


def refused(server: Running, body: dict[str, Any], path: str = CHAT) -> tuple[str, str]:
    """The sentence and the field of a 400."""
    reply = httpx.post(server.url + path, json={"max_tokens": 1, **body}, timeout=60)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"], error["param"]


def test_what_the_template_reads_is_read_from_the_body(with_template: Running) -> None:
    begun = "[assistant|"
    assert prompt_of(with_template, USER) == "[user|hi||False]" + begun
    assert prompt_of(with_template, USER, add_generation_prompt=False) == "[user|hi||False]"
    assert prompt_of(with_template, USER, add_generation_prompt=None) == "[user|hi||False]" + begun
    assert prompt_of(with_template, USER, chat_template_kwargs={"style": "S"}) == "[user|hi||False]S" + begun
    named = {"style": "S", "self": 1, "options": 2}
    assert prompt_of(with_template, USER, chat_template_kwargs=named) == "[user|hi||False]S" + begun
    assert prompt_of(with_template, USER, documents=[{"text": "D"}]) == "[user|hi||False]D" + begun
    said = {"role": "assistant", "content": "well, "}
    assert prompt_of(with_template, USER, said, continue_final_message=True) == "[user|hi||False][assistant|well, "


def test_the_prompt_of_a_chat_is_the_one_that_tokenize_shows(with_template: Running) -> None:
    more: dict[str, Any] = {"continue_final_message": True, "chat_template_kwargs": {"style": "S"}}
    messages = [USER, {"role": "assistant", "content": "well"}]
    reply = httpx.post(with_template.url + CHAT, json={"messages": messages, "max_tokens": 1, **more}).json()
    assert reply["usage"]["prompt_tokens"] == len(prompt_of(with_template, *messages, **more))


def test_messages_reach_the_template_in_every_role_and_form(with_template: Running) -> None:
    text = {"type": "text", "text": "x"}
    for message, shown in (
        ({"role": "developer", "content": "x"}, "[system|x||False]"),
        ({"role": "user", "content": [text, text], "name": "Ada"}, "[user|xx|Ada|False]"),
        ({"role": "user", "content": []}, "[user|||False]"),
        ({"role": "user", "content": ""}, "[user|||False]"),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "[assistant|||True]"),
        ({"role": "assistant", "content": "x", "tool_calls": []}, "[assistant|x||False]"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "[assistant|no||False]"),
        ({"role": "tool", "content": "x", "tool_call_id": "c1"}, "[tool|x||False]"),
        ({"role": "function", "content": "x", "name": "f"}, "[function|x|f|False]"),
    ):
        assert prompt_of(with_template, message, add_generation_prompt=False) == shown


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"chat_template": "x"}, "chat_template is not supported", "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "cannot hold 'messages'", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "cannot hold 'chat_template'", "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "dictionary", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": 5}}, "tools must be a list of objects", "tools"),
        ({"documents": ["x"]}, "dictionary", "documents.0"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "exclude", "continue_final_message"),
        ({"add_generation_prompt": "yes"}, "bool", "add_generation_prompt"),
        ({"messages": []}, "at least", "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "needs content", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0 is of type 'image_url'; only text parts are supported",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "'input_audio'",
            "messages",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "dictionary", None),
        ({"messages": [{**USER, "x": [0] * 100_001}]}, "more than 100000 values", "messages"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(
    with_template: Running, body: dict[str, Any], words: str, param: str | None
) -> None:
    for path in (CHAT, "/tokenize"):
        message, named = refused(with_template, {"messages": [USER], **body}, path)
        assert words in message
        assert param is None or named == param


def test_the_sentence_of_a_template_is_passed_on(server: Running) -> None:
    use(server, "{% if messages|length > 1 %}{{ raise_exception('Roles take turns, please') }}{% endif %}x")
    message, param = refused(server, {"messages": [USER, USER]})
    assert message == "the chat template refuses these messages: Roles take turns, please"
    assert param == "messages"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[0].content.x.y }}", "has no attribute"),
        ("{{ 'x' | indent(10**9) }}", "512 MiB"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "took more than 2 s"),
    ],
)
def test_a_template_that_goes_wrong_refuses_the_request_while_the_server_lives(
    server: Running, source: str, words: str, record_property: Any
) -> None:
    use(server, source)
    slowest_s, over = 0.0, threading.Event()

    def look() -> None:
        nonlocal slowest_s
        with httpx.Client() as client:
            while not over.wait(0.02):
                start_s = time.monotonic()
                assert client.get(f"{server.url}/livez").status_code == 200
                slowest_s = max(slowest_s, time.monotonic() - start_s)

    watch = threading.Thread(target=look)
    watch.start()
    message, param = refused(server, {"messages": [USER]})
    over.set()
    watch.join()
    record_property("slowest_livez_s", slowest_s)
    assert words in message
    assert param == "messages"
    assert httpx.get(f"{server.url}/livez").status_code == 200


def test_the_models_own_sampling_defaults_fill_what_a_request_does_not_name(server: Running) -> None:
    assert server.state.engine is not None
    tokenizer = server.state.engine.tokenizer
    assert isinstance(tokenizer, FakeTokenizer)
    tokenizer.sampling_defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)

    def asked(schema: Any = ChatRequest, **fields: Any) -> tuple[float, float, int, float]:
        given = {"messages": [USER]} if schema is ChatRequest else {"prompt": "x"}
        body = parse(httpx.Request("POST", "http://x", json={**given, **fields}).content, schema)
        params = server.state.with_model_defaults(body)
        return params.temperature, params.top_p, params.top_k, params.min_p

    for schema in (ChatRequest, CompletionRequest):
        assert asked(schema) == (0.6, 0.9, 20, 0.0)
        assert asked(schema, temperature=None, top_k=None) == (0.6, 0.9, 20, 0.0)
        assert asked(schema, temperature=1.0, top_k=-1, min_p=0.1) == (1.0, 0.9, 0, 0.1)
        assert asked(schema, temperature=0) == (0.0, 1.0, 0, 0.0)


def test_the_models_own_sampling_defaults_can_be_turned_off(start_server: Any) -> None:
    server = start_server(generation_config="none")
    server.state.engine.tokenizer.sampling_defaults = SamplingDefaults(temperature=0.6)
    body = parse(b'{"messages": [{"role": "user", "content": "x"}]}', ChatRequest)
    assert server.state.with_model_defaults(body).temperature == 1.0
