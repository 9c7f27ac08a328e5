"""Whatever comes in, the reply says what and where, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from nexusengine.server.schemas import CompletionRequest
from tests.api.conftest import MODEL, Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]

CASES: dict[str, tuple[str, Any, int, str, str | None]] = {  # path, body, status, words in the message, param
    "broken JSON": (TEXT, b'{"prompt": "x"', 400, "character 14", None),
    "no JSON at all": (TEXT, b"", 400, "JSON", None),
    "not UTF-8": (TEXT, b'{"prompt": "\xff"}', 400, "UTF-8 at byte 12", None),
    "not an object": (TEXT, [1], 400, "object", None),
    "deeply nested": (TEXT, b"[" * 100_000, 400, "nested", None),
    "NaN": (TEXT, b'{"prompt": "x", "temperature": NaN}', 400, "temperature is NaN", "temperature"),
    "Infinity": (TEXT, b'{"prompt": "x", "top_p": -Infinity}', 400, "top_p is -Infinity", "top_p"),
    "NaN deep inside": (CHAT, b'{"messages": [1, {"a": "NaN", "b": NaN}]}', 400, "NaN", "messages.1.b"),
    "nothing but NaN": (TEXT, b"NaN", 400, "the body is NaN", None),
    "no prompt": (TEXT, {}, 400, "prompt", "prompt"),
    "an empty prompt": (TEXT, {"prompt": ""}, 400, "empty", "prompt"),
    "no prompts": (TEXT, {"prompt": []}, 400, "empty", "prompt"),
    "a prompt of another type": (TEXT, {"prompt": {"a": 1}}, 400, "prompt", "prompt"),
    "mixed prompts": (TEXT, {"prompt": ["a", 1]}, 400, "prompt", None),
    "a token that does not exist": (TEXT, {"prompt": [1, 97]}, 400, "97", "prompt"),
    "a negative token": (TEXT, {"prompt": [-1]}, 400, "-1", "prompt"),
    "too long a chat": (CHAT, {"messages": [{"role": "user", "content": "x" * 400}]}, 400, "407 tokens", "messages"),
    "too long a prompt": (TEXT, {"prompt": "x" * 400}, 400, "400 tokens", "prompt"),
    "too many tokens asked for": (TEXT, {"prompt": "x", "max_tokens": 400}, 400, "400 output tokens", "max_tokens"),
    "negative max_tokens": (TEXT, {"prompt": "x", "max_tokens": -1}, 400, "-1", "max_tokens"),
    "fractional max_tokens": (TEXT, {"prompt": "x", "max_tokens": 1.5}, 400, "1.5", "max_tokens"),
    "max_tokens as text": (TEXT, {"prompt": "x", "max_tokens": "5"}, 400, "'5'", "max_tokens"),
    "temperature as text": (TEXT, {"prompt": "x", "temperature": "hot"}, 400, "hot", "temperature"),
    "temperature out of range": (TEXT, {"prompt": "x", "temperature": -0.5}, 400, "-0.5", "temperature"),
    "top_p below zero": (TEXT, {"prompt": "x", "top_p": -0.1}, 400, "top_p", "top_p"),
    "too many choices": (TEXT, {"prompt": "x", "n": 17}, 400, "16", "n"),
    "no choices": (TEXT, {"prompt": "x", "n": 0}, 400, "1", "n"),
    "an empty stop string": (TEXT, {"prompt": "x", "stop": [""]}, 400, "non-empty", "stop"),
    "too many logprobs": (TEXT, {"prompt": "x", "logprobs": 21}, 400, "20", "logprobs"),
    "a huge seed": (TEXT, {"prompt": "x", "seed": 2**70}, 400, "seed", "seed"),
    "penalties": (TEXT, {"prompt": "x", "presence_penalty": 0.5}, 400, "not supported", "presence_penalty"),
    "logit_bias": (TEXT, {"prompt": "x", "logit_bias": {"1": 5}}, 400, "not supported", "logit_bias"),
    "a suffix": (TEXT, {"prompt": "x", "suffix": "y"}, 400, "not supported", "suffix"),
    "best_of": (TEXT, {"prompt": "x", "best_of": 3}, 400, "best_of", "best_of"),
    "echo with logprobs": (TEXT, {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo", "echo"),
    "stream options without a stream": (TEXT, {"prompt": "x", "stream_options": {}}, 400, "stream", "stream_options"),
    "an unknown class": (TEXT, {"prompt": "x", "slo": "fast"}, 400, "'fast'; known: interactive", "slo"),
    "an unknown class in an object": (TEXT, {"prompt": "x", "slo": {"class": "fast"}}, 400, "'fast'", "slo.class"),
    "a class that is no text": (TEXT, {"prompt": "x", "slo": {"class": 1}}, 400, "name of a class", "slo.class"),
    "an SLO of another type": (TEXT, {"prompt": "x", "slo": [1]}, 400, "got [1]", "slo"),
    "an SLO that says nothing": (TEXT, {"prompt": "x", "slo": {}}, 400, "empty", "slo"),
    "an unknown bound": (TEXT, {"prompt": "x", "slo": {"ttft_s": 1}}, 400, "ttft_ms", "slo.ttft_s"),
    "a negative bound": (CHAT, {"messages": MESSAGES, "slo": {"ttft_ms": -5}}, 400, "got -5", "slo.ttft_ms"),
    "a bound of zero": (TEXT, {"prompt": "x", "slo": {"tpot_ms": 0}}, 400, "got 0", "slo.tpot_ms"),
    "an absurd bound": (TEXT, {"prompt": "x", "slo": {"e2e_ms": 1e12}}, 400, "1000000000000", "slo.e2e_ms"),
    "a bound of a thousand digits": (TEXT, {"prompt": "x", "slo": {"ttft_ms": 10**1000}}, 400, "got 1", "slo.ttft_ms"),
    "a bound that is NaN": (TEXT, b'{"prompt": "x", "slo": {"ttft_ms": NaN}}', 400, "NaN", None),
    "a bound that overflows": (TEXT, b'{"prompt": "x", "slo": {"ttft_ms": 1e999}}', 400, "inf", "slo.ttft_ms"),
    "a bound as text": (TEXT, {"prompt": "x", "slo": {"ttft_ms": "500"}}, 400, "number of milli", "slo.ttft_ms"),
    "a bound that is true": (TEXT, {"prompt": "x", "slo": {"ttft_ms": True}}, 400, "number of milli", "slo.ttft_ms"),
    "no class to take a bound from": (
        TEXT,
        {"prompt": "x", "slo": {"class": "none", "ttft_ms": 5}},
        400,
        "missing",
        "slo.tpot_ms",
    ),
    "too high a priority": (TEXT, {"prompt": "x", "priority": 101}, 400, "100", "priority"),
    "a fractional priority": (TEXT, {"prompt": "x", "priority": 0.5}, 400, "0.5", "priority"),
    "another model": (TEXT, {"prompt": "x", "model": "gpt"}, 404, "'gpt'", "model"),
    "no messages": (CHAT, {"messages": []}, 400, "messages", "messages"),
    "a message without a role": (CHAT, {"messages": [{"content": "x"}]}, 400, "role", "messages.0.role"),
    "an unknown role": (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "king", "messages.0.role"),
    "an image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "text",
        None,
    ),
    "tools": (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "not supported", "tools"),
    "a JSON schema": (
        CHAT,
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        400,
        "not supported",
        "response_format",
    ),
    "top_logprobs alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "logprobs", "top_logprobs"),
    "a number without end": (TEXT, b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "digits", None),
    "a number that overflows": (TEXT, b'{"prompt": "x", "temperature": 1e999}', 400, "inf", "temperature"),
    "half a character as a value": (TEXT, b'{"prompt": "x", "slo": "\\ud800"}', 400, "unknown class", "slo"),
    "half a character as a stop": (TEXT, b'{"prompt": "x", "stop": ["\\udc00"]}', 400, "not valid Unicode", "stop"),
    "half a character as a model": (TEXT, b'{"prompt": "x", "model": "\\ud800"}', 404, "ud800", "model"),
    "half a character as a name": (TEXT, b'{"prompt": "x", "\\ud800": 1}', 400, "the body: ", None),
    "fractions as tokens": (TEXT, {"prompt": [1.5] * 100_000}, 400, "1.5", None),
    "true as a token": (TEXT, {"prompt": [True]}, 400, "True", None),
    "too many prompts": (TEXT, {"prompt": ["x"] * 300, "n": 4}, 400, "1024", "prompt"),
    "no tokens asked for": (
        CHAT,
        {"messages": MESSAGES, "max_completion_tokens": 0},
        400,
        "0",
        "max_completion_tokens",
    ),
    "a user who says nothing": (CHAT, {"messages": [{"role": "user"}]}, 400, "content", "messages"),
    "both prompt and messages": ("/tokenize", {"prompt": "x", "messages": MESSAGES}, 400, "either", "prompt"),
    "an unknown token": ("/detokenize", {"tokens": [1, 5000]}, 400, "5000", "tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_answered_with_what_and_where(server: Running, case: str) -> None:
    path, body, status, words, param = CASES[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(server.url + path, content=content)
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    sound = httpx.post(server.url + TEXT, json={"prompt": "x", "max_tokens": 2})
    assert sound.status_code == 200
    assert server.idle()


def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not(server: Running) -> None:
    big = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    for content in (big, iter([big[i : i + 100_000] for i in range(0, len(big), 100_000)])):
        try:
            reply = httpx.post(server.url + TEXT, content=content)
        except httpx.WriteError:
            continue  # the server answered and closed while we were still sending
        assert reply.status_code == 413
        assert "8388608" in reply.json()["error"]["message"]
    assert httpx.post(server.url + TEXT, json={"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", TEXT, 405, "method_not_allowed"),
        ("PUT", "/livez", 405, "method_not_allowed"),
    ],
)
def test_unknown_paths_and_methods_are_errors_of_the_same_form(
    server: Running, method: str, path: str, status: int, code: str
) -> None:
    reply = httpx.request(method, server.url + path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


def test_fields_without_effect_are_named_in_a_header(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 1, "user": "me", "flavour": "sweet", "presence_penalty": 0}
    reply = httpx.post(server.url + TEXT, json=body)
    assert reply.status_code == 200
    assert reply.headers["x-nexus-ignored"] == "flavour"
    body = {"prompt": "x", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True, "frosting": 1}}
    assert httpx.post(server.url + TEXT, json=body).headers["x-nexus-ignored"] == "stream_options.frosting"


def test_a_field_whose_name_no_header_can_hold_is_still_only_ignored(server: Running) -> None:
    body = b'{"prompt": "x", "max_tokens": 1, "a\\r\\nb": 1, "\xc3\xa9": 3, "sound": 4}'
    reply = httpx.post(server.url + TEXT, content=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-nexus-ignored"] == "?, sound"


def test_a_list_is_checked_up_to_its_first_fault_only() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": [0.5] * 10_000})
    assert caught.value.error_count() < 10


def test_our_own_faults_are_errors_of_the_same_form(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.state.engine, "encode", broken)
    for stream in (False, True):
        reply = httpx.post(server.url + CHAT, json={"messages": MESSAGES, "stream": stream})
        assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"]
    assert server.idle()


def test_with_a_key_configured_only_its_bearer_is_served(start_server: Callable[..., Running]) -> None:
    server = start_server(api_key="secret")
    body = {"prompt": "x", "max_tokens": 1}
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secretly"}):
        reply = httpx.post(server.url + TEXT, json=body, headers=header)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.post(server.url + TEXT, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert httpx.post(server.url + "/tokenize", json={"prompt": "x"}).status_code == 401
    assert httpx.get(server.url + "/v1/models").status_code == 401
    for open_to_all in ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics"):
        assert httpx.get(server.url + open_to_all).status_code == 200


def test_a_request_id_comes_back_and_is_made_up_if_there_is_none(server: Running) -> None:
    assert httpx.get(server.url + "/livez", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert len(httpx.get(server.url + "/livez").headers["x-request-id"]) == 32
    assert MODEL in httpx.get(server.url + "/v1/models").text
