"""Fields of request bodies: nulls, limits of OpenAI's, and fields that would have to be honoured."""

from __future__ import annotations

import json
import typing
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

from nexusengine.engine.client import Sink
from nexusengine.errors import InvalidRequest
from nexusengine.server import fields
from nexusengine.server.body import parse
from nexusengine.server.schemas import ChatRequest, CompletionRequest, Sampling, TokenizeRequest
from nexusengine.types import EngineRequest, SamplingParams
from tests.api.conftest import MODEL, FakeTokenizer, Running
from tests.support.fakes import continuation

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
SMALLEST: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "ab", "temperature": 0},
    CHAT: {"messages": MESSAGES, "temperature": 0, "max_tokens": 4},
}
NEEDED = {"messages", "prompt", "temperature", "max_tokens"}
SERVERS_OWN = {
    TEXT: {*CompletionRequest.model_fields, *fields.TEXT},
    CHAT: {*ChatRequest.model_fields, *fields.CHAT},
}
OPENAIS = {TEXT: set(typing.get_type_hints(TextParams)), CHAT: set(typing.get_type_hints(ChatParams))}


def choice(reply: httpx.Response) -> Any:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


# ---- null ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_every_field_as_null_is_the_same_as_no_field(server: Running, path: str) -> None:
    plain = choice(httpx.post(server.url + path, json=SMALLEST[path]))
    names = (OPENAIS[path] | SERVERS_OWN[path]) - NEEDED
    assert len(names) > 100
    all_at_once = httpx.post(server.url + path, json=dict.fromkeys(names) | SMALLEST[path])
    assert choice(all_at_once) == plain
    assert "x-nexus-ignored" not in all_at_once.headers
    for name in names:
        assert choice(httpx.post(server.url + path, json=SMALLEST[path] | {name: None})) == plain, name


def test_null_inside_stream_options_is_the_default(server: Running) -> None:
    for options in (None, {}, {"include_usage": None}, {"include_usage": None, "include_obfuscation": None}):
        reply = httpx.post(server.url + TEXT, json=SMALLEST[TEXT] | {"stream": True, "stream_options": options})
        assert reply.status_code == 200
        assert '"usage"' not in reply.text


def test_null_where_openai_has_none_is_a_field_left_out(server: Running) -> None:
    reply = httpx.post(server.url + CHAT, json={"messages": None})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_nulls_are_defaults_for_tokens_too(server: Running, path: str) -> None:
    nulls = {"model": None, "return_token_strs": None, "add_special_tokens": None, "messages": None}
    body = {"prompt": "ab"} if path == "/tokenize" else {"tokens": [1]}
    assert httpx.post(server.url + path, json=nulls | body).status_code == 200


def test_a_null_prompt_begins_a_document(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": None, "max_tokens": 3, "temperature": 0}
    refused = httpx.post(server.url + TEXT, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert httpx.post(server.url + TEXT, json={"max_tokens": 3}).status_code == 400
    monkeypatch.setattr(FakeTokenizer, "bos_token_id", 7)
    (only,) = choice(httpx.post(server.url + TEXT, json=body))
    assert only["text"] == FakeTokenizer().decode(continuation([7], 3))


# ---- values as OpenAI has them ------------------------------------------------------------------------------------


def test_max_tokens_null_is_openais_sixteen_in_completions(server: Running) -> None:
    for body in ({"prompt": "ab"}, {"prompt": "ab", "max_tokens": None}):
        assert httpx.post(server.url + TEXT, json=body).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("max_tokens", [{}, {"max_tokens": None}, {"max_completion_tokens": None}])
def test_a_chat_without_a_limit_goes_on_to_the_end_of_the_context(server: Running, max_tokens: dict[str, None]) -> None:
    usage = httpx.post(server.url + CHAT, json={"messages": MESSAGES} | max_tokens, timeout=30).json()["usage"]
    assert usage["total_tokens"] == 400


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_generates_nothing(server: Running, echo: bool, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": MODEL, "prompt": ["ab", "cd"], "n": 2, "max_tokens": 0, "echo": echo}
    texts, reasons = [""] * 4, [""] * 4
    if stream:
        usage = None
        for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage
            for c in chunk.choices:
                texts[c.index] += c.text
                reasons[c.index] = c.finish_reason or ""
    else:
        reply = client.completions.create(**asked)
        usage, texts = reply.usage, [c.text for c in reply.choices]
        reasons = [c.finish_reason for c in reply.choices]
    assert texts == (["ab", "ab", "cd", "cd"] if echo else [""] * 4)
    assert reasons == ["length"] * 4
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 0)
    assert server.core.stats().requests == 0


def test_max_tokens_0_is_refused_where_openai_refuses_it(server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        reply = httpx.post(server.url + CHAT, json={"messages": MESSAGES, name: 0})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
    too_long = httpx.post(server.url + TEXT, json={"prompt": "x" * 500, "max_tokens": 0})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("temperature", [0, 1, 2, None])
def test_top_p_0_is_greedy(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str, temperature: float | None
) -> None:
    assert server.state.engine is not None
    backend = server.state.engine.backend
    sent: list[SamplingParams] = []
    submit = backend.submit

    def kept(request: EngineRequest, sink: Sink) -> None:
        sent.append(request.sampling)
        submit(request, sink)

    monkeypatch.setattr(backend, "submit", kept)
    body = SMALLEST[path] | {"temperature": temperature, "top_p": 0}
    choice(httpx.post(server.url + path, json=body))
    assert [sampling.greedy for sampling in sent] == [True]
    assert httpx.post(server.url + path, json=body | {"temperature": -1}).status_code == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 3.0), ("n", 2.0), ("seed", 1.0), ("top_k", 5.0), ("logprobs", 2.0), ("best_of", 1.0)],
)
def test_a_whole_number_may_be_written_with_a_point(server: Running, name: str, value: float) -> None:
    """As JSON Schema has it, and vLLM."""
    reply = httpx.post(server.url + TEXT, json={"prompt": "ab", "max_tokens": 2, name: value})
    assert reply.status_code == 200, reply.text
    assert httpx.post(server.url + TEXT, json={"prompt": "ab", name: value + 0.5}).status_code == 400


def test_top_logprobs_0_needs_no_logprobs(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "top_logprobs": 0}
    assert choice(httpx.post(server.url + CHAT, json=body))[0]["logprobs"] is None


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("ids", [[96], [97], [-1], [2**31], [3, 50_000]])
def test_stop_token_ids_are_looked_up_in_the_vocabulary(server: Running, path: str, ids: list[int]) -> None:
    reply = httpx.post(server.url + path, json=SMALLEST[path] | {"stop_token_ids": ids})
    if ids == [96]:
        assert reply.status_code == 200
        return
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "stop_token_ids")
    assert str(ids[-1]) in error["message"]


def test_a_stop_list_without_end_is_refused(server: Running) -> None:
    reply = httpx.post(server.url + TEXT, json={"prompt": "x", "stop_token_ids": [1] * 2000})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "stop_token_ids")


# ---- fields that are not implemented ------------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["a", "b"]},
    "guided_json": {"type": "object"},
    "guided_choice": ["a"],
    "guided_regex": "a+",
    "guided_grammar": "root ::= 'a'",
    "grammar": "root ::= 'a'",
    "json_schema": {},
    "min_tokens": 3,
    "truncate_prompt_tokens": 10,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "prompt_logprobs": 0,
    "repetition_penalty": 1.1,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "some_new_penalty": 0.1,
    "logit_bias": {"5": 1},
    "typical_p": 0.9,
    "tfs_z": 0.9,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "dynatemp_range": 0.5,
    "top_a": 0.1,
    "use_beam_search": True,
    "length_penalty": 2,
    "early_stopping": True,
    "n_predict": 5,
    "max_new_tokens": 5,
    "samplers": ["top_k"],
    "lora": [{"id": 0, "scale": 1}],
    "chat_template": "{{ messages }}",
    "return_token_ids": True,
    "request_id": "mine",
    "verbosity": "high",
    "reasoning_effort": "low",
    "cache_salt": "salt",
    "extra_body": {"top_k": 1},
    "options": {"temperature": 0},
}


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_changes_the_reply_is_refused_by_name(server: Running, path: str, name: str) -> None:
    reply = httpx.post(server.url + path, json=SMALLEST[path] | {name: CHANGES[name]})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == name
    assert name in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_field_with_a_value_that_changes_nothing_passes(server: Running, path: str) -> None:
    plain = choice(httpx.post(server.url + path, json=SMALLEST[path]))
    table = fields.TEXT if path == TEXT else fields.CHAT
    for name, values in table.items():
        for value in values:
            reply = httpx.post(server.url + path, json=SMALLEST[path] | {name: value})
            assert choice(reply) == plain, name
            assert "x-nexus-ignored" not in reply.headers


HARMLESS: dict[str, Any] = {
    "prediction": {"type": "content", "content": "x"},  # makes a reply quicker, not another
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "parallel_tool_calls": False,
    "cache_prompt": False,
    "id_slot": 3,
    "repeat_last_n": 64,
    "mirostat_tau": 5.0,
    "dry_base": 1.75,
    "xtc_threshold": 0.1,
    "keep_alive": "5m",
    "spaces_between_special_tokens": False,
    "litellm_call_id": "x",
}


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_field_without_effect_is_named_in_a_header(server: Running, path: str) -> None:
    reply = httpx.post(server.url + path, json=SMALLEST[path] | HARMLESS)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-nexus-ignored"].split(", ") == sorted(HARMLESS)


def test_every_field_of_openais_is_implemented_refused_or_known_to_be_harmless() -> None:
    harmless = {*HARMLESS, "prompt_cache_options"}
    for path in (TEXT, CHAT):
        assert OPENAIS[path] <= SERVERS_OWN[path] | harmless, OPENAIS[path] - SERVERS_OWN[path] - harmless


def test_options_of_a_stream_are_treated_likewise(server: Running) -> None:
    body = SMALLEST[TEXT] | {"stream": True}
    name = "continuous_usage_stats"
    assert httpx.post(server.url + TEXT, json=body | {"stream_options": {name: False}}).status_code == 200
    reply = httpx.post(server.url + TEXT, json=body | {"stream_options": {name: True}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, f"stream_options.{name}")
    padded = httpx.post(server.url + TEXT, json=body | {"stream_options": {"include_obfuscation": True}})
    assert padded.headers["x-nexus-ignored"] == "stream_options.include_obfuscation"


def test_fields_of_other_servers_tokenizers_are_refused_with_ours() -> None:
    for name, ours in (("content", "prompt"), ("with_pieces", "return_token_strs")):
        with pytest.raises(InvalidRequest, match=ours) as caught:
            parse(json.dumps({"prompt": "x", name: True}).encode(), TokenizeRequest)
        assert caught.value.param == name


def test_no_field_is_both_implemented_and_refused() -> None:
    """One that becomes implemented leaves the table."""
    assert not set(Sampling.model_fields) & (set(fields.TEXT) | set(fields.CHAT))
