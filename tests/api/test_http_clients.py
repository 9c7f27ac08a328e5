"""Clients that are not browsers nor SDKs: HTTP/1.0, half-closed connections, pipelining, upgrades, streams cut off."""

from __future__ import annotations

import contextlib
import json
import time

import httpx
import pytest

from tests.api.conftest import Running
from tests.api.raw_http import (
    BODY,
    TEXT,
    Start,
    connected,
    exchange,
    request,
)

# ---- other clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[], ["Connection: keep-alive"]])
def test_a_stream_to_an_http_1_0_client_has_no_chunks(server: Running, headers: list[str]) -> None:
    head, body = exchange(server, request(BODY | {"stream": True}, *headers, version="1.0"))
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    events = body.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(e.removeprefix("data: "))["object"] == "text_completion" for e in events[:-1])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_side_gets_its_answer(start_server: Start, version: str, stream: bool) -> None:
    server = start_server(real_s=0.01)
    sent = request(BODY | {"max_tokens": 20, "stream": stream}, version=version)
    head, body = exchange(server, sent, half_close=True)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert (b"[DONE]" if stream else b'"completion_tokens":20') in body
    assert server.idle()


def test_one_that_waits_long_gets_an_interim_reply_and_then_its_answer(start_server: Start) -> None:
    server = start_server(real_s=0.05)
    head, rest = exchange(server, request(BODY | {"max_tokens": 60}), half_close=True)
    assert head == b"HTTP/1.1 100 Continue"
    assert b'"completion_tokens":60' in rest


def test_one_that_closed_both_sides_takes_its_request_with_it(start_server: Start) -> None:
    server = start_server(real_s=0.05)
    with connected(server) as connection:
        connection.sendall(request(BODY | {"max_tokens": 300}))
        time.sleep(0.1)
    assert server.idle()
    assert server.core.stats().finished_abort == 1


def test_one_that_leaves_in_the_middle_of_its_request_gets_nothing(server: Running) -> None:
    head, _ = exchange(server, request()[:-5], half_close=True)
    assert head == b""
    assert server.idle()


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
def test_a_request_to_upgrade_is_served_as_it_stands_with_its_body(server: Running, upgrade: str) -> None:
    sent = request(BODY, "Connection: Upgrade", f"Upgrade: {upgrade}")
    middle = sent.index(b"\r\n\r\n") + 4
    chunked = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: Upgrade\r\n"
        b"Upgrade: " + upgrade.encode() + b"\r\n\r\n%x\r\n" % (len(sent) - middle) + sent[middle:] + b"\r\n0\r\n\r\n"
    )
    for pieces in ([sent], [sent[:middle], sent[middle:]], [sent[: middle + 3], sent[middle + 3 :]], [chunked]):
        # A second, ordinary request shows that the connection is still in step.
        head, rest = exchange(server, *pieces, request(BODY, "Connection: close"))
        assert head.startswith(b"HTTP/1.1 200 ")
        assert rest.count(b'"completion_tokens":3') == 2


def test_garbage_behind_a_request_does_not_cost_its_answer(start_server: Start) -> None:
    server = start_server(real_s=0.01)
    head, body = exchange(server, request(), b"\x00garbage\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b'"completion_tokens":3' in body


def test_pipelined_requests_are_answered_in_turn(server: Running) -> None:
    _, rest = exchange(server, request() * 3 + request(BODY, "Connection: close"))
    assert rest.count(b'"completion_tokens":3') == 4


# ---- streams ------------------------------------------------------------------------------------------------------


def test_a_stream_that_waits_gets_its_status_and_comments(start_server: Start) -> None:
    server = start_server(real_s=0.7, sse_keepalive=0.2)
    reply = httpx.post(server.url + TEXT, json=BODY | {"stream": True}, timeout=30)
    assert reply.status_code == 200
    events = reply.text.strip().split("\n\n")
    assert events[0] == ": keepalive"
    assert [e for e in events if e != ": keepalive"][-1] == "data: [DONE]"
    assert sum(e.startswith("data: {") for e in events) == 3


def test_an_error_after_a_comment_is_an_event(start_server: Start) -> None:
    server = start_server(real_s=0.6, sse_keepalive=0.1)
    server.executor.broken = True
    events = httpx.post(server.url + TEXT, json=BODY | {"stream": True}, timeout=30).text.strip().split("\n\n")
    assert events[0] == ": keepalive"
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"


def test_tokens_of_requests_that_were_cut_off_are_counted(start_server: Start) -> None:
    server = start_server(real_s=0.02)
    patience = httpx.Timeout(5, read=0.4)
    for stream in (True, False):
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST", server.url + TEXT, json=BODY | {"max_tokens": 300, "stream": stream}, timeout=patience
            ) as r,
        ):
            for n, _ in enumerate(r.iter_lines()):
                if n == 8:
                    break
        assert server.idle()
    counted = {
        line.split()[0]: float(line.split()[1])
        for line in httpx.get(server.url + "/metrics").text.splitlines()
        if line.startswith(("nexusengine_prompt_tokens_total", "nexusengine_output_tokens_total"))
    }
    assert counted["nexusengine_prompt_tokens_total"] == 4
    assert 4 <= counted["nexusengine_output_tokens_total"] <= server.core.stats().generated_tokens
