"""Promises over HTTP: how a request asks for one, and how it learns whether it was kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nexusengine.slo.classes import CLASSES
from tests.api.conftest import MODEL, Running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
VERDICT = {"x-nexus-verdict": "1"}
KEYS = {
    "request_id",
    "class",
    "slo",
    "predicted_ttft_ms",
    "ttft_ms",
    "tpot_ms",
    "queue_ms",
    "e2e_ms",
    "worker",
    "preemptions",
    "cached_tokens",
    "unattainable",
    "met",
    "met_strict",
    "missed",
}


def ask(server: Running, path: str = TEXT, *, headers: dict[str, str] = VERDICT, **body: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "x"}
    reply = httpx.post(server.url + path, json=asked | {"max_tokens": 3} | body, headers=headers, timeout=30)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def events(server: Running, path: str = TEXT, *, headers: dict[str, str] = VERDICT, **body: Any) -> list[Any]:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "x"}
    asked |= {"max_tokens": 3, "stream": True}
    text = httpx.post(server.url + path, json=asked | body, headers=headers, timeout=30).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_reply_carries_its_verdict_only_where_it_is_asked_for(server: Running, path: str) -> None:
    nexus = ask(server, path)["nexus"]
    assert set(nexus) == KEYS
    assert (nexus["class"], nexus["worker"], nexus["met"], nexus["missed"]) == ("standard", "w0", True, None)
    assert 0 < nexus["queue_ms"] <= nexus["ttft_ms"] <= nexus["e2e_ms"]
    assert nexus["predicted_ttft_ms"] is None or nexus["predicted_ttft_ms"] > 0
    for headers in ({}, {"x-nexus-verdict": "0"}):
        assert "nexus" not in ask(server, path, headers=headers)
        assert not any("nexus" in event for event in events(server, path, headers=headers))


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_stream_carries_it_in_the_chunk_that_ends_it(server: Running, path: str) -> None:
    news = events(server, path)
    assert ["nexus" in event for event in news] == [False] * (len(news) - 1) + [True]
    assert news[-1]["choices"][0]["finish_reason"] == "length"
    assert set(news[-1]["nexus"]) == KEYS
    with_usage = events(server, path, stream_options={"include_usage": True})
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["nexus"] == with_usage[-2]["nexus"]


def test_every_choice_of_several_has_its_own_verdict(server: Running) -> None:
    reply = ask(server, prompt=["a", "bb"], n=2)
    ids = [choice["nexus"]["request_id"] for choice in reply["choices"]]
    assert ids == [reply["id"], *(f"{reply['id']}.{i}" for i in (1, 2, 3))]
    assert reply["nexus"] == reply["choices"][0]["nexus"]
    ttft = [choice["nexus"]["slo"]["ttft_ms"] for choice in reply["choices"]]
    assert ttft == [2002.0, 2002.0, 2004.0, 2004.0], "the class allows 2 ms for each token of the prompt"
    streamed = [event["nexus"]["request_id"] for event in events(server, prompt="a", n=2) if "nexus" in event]
    assert len(set(streamed)) == 2


def test_a_setting_puts_it_into_every_reply_and_the_header_takes_it_out(start_server: Callable[..., Running]) -> None:
    server = start_server(nexus_verdict=True)
    assert "nexus" in ask(server, headers={})
    assert "nexus" not in ask(server, headers={"x-nexus-verdict": "false"})


def test_a_header_that_is_neither_yes_nor_no_is_named(server: Running) -> None:
    reply = httpx.post(server.url + TEXT, json={"prompt": "x"}, headers={"x-nexus-verdict": "perhaps"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "x-nexus-verdict")


def test_the_slo_comes_from_the_body_or_from_headers(server: Running) -> None:
    for body, headers, name, bounds in (
        ({"slo": "interactive"}, {}, "interactive", (501.0, 50.0, None)),
        ({"slo": {"class": "batch", "tpot_ms": 77}}, {}, "custom", (30004.0, 77.0, None)),
        ({}, {"x-slo-class": "batch"}, "batch", (30004.0, 500.0, None)),
        ({}, {"X-SLO-TTFT-MS": "1234.5", "x-slo-e2e-ms": "9000"}, "custom", (1234.5, 100.0, 9000.0)),
        ({"slo": "interactive"}, {"x-slo-class": "batch"}, "interactive", (501.0, 50.0, None)),
    ):
        nexus = ask(server, headers=VERDICT | headers, **body)["nexus"]
        slo = nexus["slo"]
        assert (nexus["class"], (slo["ttft_ms"], slo["tpot_ms"], slo["e2e_ms"])) == (name, bounds)
    nexus = ask(server, slo="none")["nexus"]
    assert (nexus["class"], nexus["slo"], nexus["met"]) == ("none", None, None)


@pytest.mark.parametrize("value", ["fast", "nan", "-1", "0", "1e99"])
def test_a_wrong_header_gets_a_400_that_names_it(server: Running, value: str) -> None:
    header = "x-slo-class" if value == "fast" else "x-slo-ttft-ms"
    reply = httpx.post(server.url + TEXT, json={"prompt": "x"}, headers={header: value})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (400, header, "invalid_request_error")
    assert header in error["message"]


def test_openais_client_asks_with_extra_body_and_reads_the_verdict(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        extra_body={"slo": {"class": "interactive", "ttft_ms": 750}, "priority": 3},
        extra_headers=VERDICT,
    )
    assert reply.model_extra is not None
    assert reply.model_extra["nexus"]["slo"]["ttft_ms"] == 750
    plain = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=2)
    assert not plain.model_extra


def test_what_was_promised_and_its_priority_reach_the_scheduler(server: Running) -> None:
    seen: list[tuple[str | None, float, int]] = []
    add = server.core.add

    def spy(request: Any) -> None:
        seen.append((request.slo_class, request.slo.ttft_s, request.priority))
        add(request)

    server.core.add = spy  # type: ignore[method-assign]
    ask(server, slo="interactive", priority=-7)
    assert seen == [("interactive", CLASSES["interactive"].slo(1).ttft_s, -7)]


def test_an_slo_the_device_cannot_meet_is_served_as_well_as_it_goes_and_the_reply_says_so(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(real_s=0.01)
    assert not ask(server, slo={"ttft_ms": 1, "tpot_ms": 50})["nexus"]["unattainable"], "nothing is known yet"
    for _ in range(8):
        ask(server)
    nexus = ask(server, slo={"ttft_ms": 1, "tpot_ms": 50})["nexus"]
    assert (nexus["unattainable"], nexus["met"], nexus["met_strict"], nexus["missed"]) == (True, False, False, "ttft")
    assert not ask(server, slo="batch")["nexus"]["unattainable"]


def test_classes_and_their_default_come_from_the_settings(start_server: Callable[..., Running], tmp_path: Path) -> None:
    file = tmp_path / "slo.toml"
    file.write_text("[gold]\nttft_s = 1.5\ntpot_s = 0.25\n[silver]\nttft_s = 9\ntpot_s = 1\n")
    server = start_server(slo_classes=str(file), default_slo_class="silver")
    assert ask(server)["nexus"]["slo"] == {"ttft_ms": 9000.0, "tpot_ms": 1000.0, "e2e_ms": None}
    assert ask(server, slo="gold")["nexus"]["class"] == "gold"
    reply = httpx.post(server.url + TEXT, json={"prompt": "x", "slo": "interactive"})
    assert reply.status_code == 400
    assert "gold, silver, none" in reply.json()["error"]["message"]


def test_what_becomes_of_promises_is_counted_also_where_no_reply_tells_it(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(real_s=0.02, request_timeout=0.5)
    ask(server, slo="batch")
    for _ in range(8):
        ask(server, slo="none")
    ask(server, slo={"ttft_ms": 1, "tpot_ms": 50})
    assert httpx.post(server.url + TEXT, json={"prompt": "x", "max_tokens": 300}).status_code == 504
    with httpx.stream("POST", server.url + TEXT, json={"prompt": "x", "max_tokens": 300, "stream": True}) as reply:
        next(reply.iter_bytes())
    assert httpx.post(server.url + TEXT, json={"prompt": "x" * 500}).status_code == 400
    assert server.idle()
    text = httpx.get(server.url + "/metrics").text
    for line in (
        'slo_requests_total{class="batch",verdict="met"} 1.0',
        'slo_requests_total{class="custom",verdict="ttft"} 1.0',
        'slo_requests_total{class="standard",verdict="unfinished"} 2.0',
        'slo_attainment{class="standard"} 0.0',
        'slo_unattainable_requests_total{class="custom"} 1.0',
    ):
        assert f"nexusengine_{line}" in text
    assert text.count("nexusengine_slo_requests_total{") == 4
