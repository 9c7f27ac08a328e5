"""Health, limits, metrics, and clients that leave."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from nexusengine.server.metrics import markdown
from tests.api.conftest import MODEL, Running
from tests.conftest import ROOT

TEXT = "/v1/completions"


@contextlib.contextmanager
def half_a_request(server: Running) -> Iterator[socket.socket]:
    """A connection on which a request has begun, 20 bytes of its 1000."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 80), timeout=5) as connection:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"prompt": "begin...')
        yield connection


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


def test_before_there_is_an_engine_the_server_says_what_it_is_doing(start_server: Callable[..., Running]) -> None:
    server = start_server(with_engine=False)
    server.state.phase, server.state.fraction = "loading weights", 0.5
    assert httpx.get(server.url + "/livez").status_code == 200
    assert httpx.get(server.url + "/readyz").status_code == 503
    startup = httpx.get(server.url + "/startupz")
    assert (startup.status_code, startup.json()) == (503, {"phase": "loading weights", "fraction": 0.5, "workers": []})
    reply = httpx.post(server.url + TEXT, json={"prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert int(reply.headers["retry-after"]) >= 1
    assert "nexusengine_" in httpx.get(server.url + "/metrics").text


def test_once_ready_and_while_draining(server: Running) -> None:
    assert httpx.get(server.url + "/readyz").json()["phase"] == "ready"
    assert httpx.get(server.url + "/startupz").status_code == 200
    server.state.draining = True
    assert httpx.get(server.url + "/readyz").status_code == 503
    assert httpx.get(server.url + "/startupz").status_code == 200
    assert httpx.post(server.url + TEXT, json={"prompt": "x"}).status_code == 503


def test_text_becomes_tokens_and_text_again(server: Running) -> None:
    tokens = httpx.post(server.url + "/tokenize", json={"prompt": "abc", "return_token_strs": True}).json()
    assert tokens == {"tokens": [65, 66, 67], "count": 3, "max_model_len": 400, "token_strs": ["a", "b", "c"]}
    assert httpx.post(server.url + "/detokenize", json={"tokens": [65, 66, 67]}).json() == {"prompt": "abc"}
    chat = httpx.post(server.url + "/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["count"] == len("user: a\n")


def test_requests_over_the_limit_are_told_to_come_back(start_server: Callable[..., Running]) -> None:
    server = start_server(max_requests=2, real_s=0.02)
    replies: list[httpx.Response] = []

    def post() -> None:
        replies.append(httpx.post(server.url + TEXT, json={"prompt": "x", "max_tokens": 30}, timeout=30))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    statuses = sorted(r.status_code for r in replies)
    assert 429 in statuses
    assert statuses.count(200) >= 2
    assert all("retry-after" in r.headers for r in replies if r.status_code == 429)
    assert server.idle()


def test_a_request_past_its_time_ends_with_504_or_an_error_event(start_server: Callable[..., Running]) -> None:
    server = start_server(request_timeout=0.2, real_s=0.02)
    body = {"prompt": "x", "max_tokens": 300}
    reply = httpx.post(server.url + TEXT, json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    events = httpx.post(server.url + TEXT, json=body | {"stream": True}).text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert len(events) > 2
    assert server.idle()


def test_a_body_that_does_not_come_is_not_waited_for_for_ever(start_server: Callable[..., Running]) -> None:
    server = start_server(request_timeout=0.2)
    with half_a_request(server) as connection:
        status_line = connection.makefile("rb").readline()
    assert b"504" in status_line
    assert server.idle()


def test_a_client_that_leaves_before_its_body_is_complete_is_forgotten(server: Running) -> None:
    with half_a_request(server):
        assert until(lambda: server.state.in_progress == 1)
    assert server.idle()
    assert server.core.stats().requests == 0


def test_a_device_that_fails_in_the_middle_of_a_stream_ends_it_with_an_error_event(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(real_s=0.02)
    events: list[str] = []
    body = {"prompt": "x", "max_tokens": 300, "stream": True}
    with httpx.stream("POST", server.url + TEXT, json=body, timeout=10) as reply:
        for line in filter(None, reply.iter_lines()):
            events.append(line)
            server.executor.broken = True
    assert len(events) >= 2
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "data: [DONE]" not in events
    later = httpx.post(server.url + TEXT, json=body)
    assert (later.status_code, later.json()["error"]["code"]) == (500, "internal_error")
    assert httpx.get(server.url + "/readyz").status_code == 503
    assert httpx.get(server.url + "/livez").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after_s", [0.0, 0.1])
def test_a_client_that_leaves_takes_its_request_with_it(
    start_server: Callable[..., Running], stream: bool, after_s: float
) -> None:
    """Before the first token (the executor is slow), and in the middle."""
    server = start_server(real_s=0.3 if after_s == 0 else 0.02)
    body = {"prompt": "x", "max_tokens": 300, "stream": stream}
    patience = httpx.Timeout(5, read=0.05)  # a step takes longer than this, or the whole answer does
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", server.url + TEXT, json=body, timeout=patience) as r,
    ):
        left_at_s = time.monotonic() + after_s
        for _ in r.iter_lines():
            if time.monotonic() > left_at_s:
                break
    assert server.idle()
    assert server.core.stats().finished_abort == 1


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_of_a_request_whose_client_leaves_are_counted(
    start_server: Callable[..., Running], stream: bool
) -> None:
    server = start_server(real_s=0.02)
    body = {"prompt": "four", "max_tokens": 300, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", server.url + TEXT, json=body, timeout=httpx.Timeout(5, read=0.5)) as reply,
    ):
        for n, _ in enumerate(reply.iter_lines()):
            if n > 10:
                break
    assert server.idle()
    text = httpx.get(server.url + "/metrics").text
    prompt, output, generated = (
        float(text.split(f"nexusengine_{name}_total")[-1].split("\n")[0].split()[-1])
        for name in ("prompt_tokens", "output_tokens", "worker_generated_tokens")
    )
    assert prompt == 4.0
    assert 5.0 < output <= generated < 300.0


def test_64_streams_half_of_which_break_off_leave_nothing_behind(start_server: Callable[..., Running]) -> None:
    server = start_server(real_s=0.005)
    rng = random.Random(1)
    plans = [rng.randrange(0, 40) if i % 2 else None for i in range(64)]
    finished: list[str] = []

    def client(lines: int | None, seed: int) -> None:
        body = {"prompt": "x" * (1 + seed), "max_tokens": 40, "stream": True}
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=60) as reply:
            for n, line in enumerate(reply.iter_lines()):
                if lines is not None and n >= lines:
                    return
                if line == "data: [DONE]":
                    finished.append(line)

    threads = [threading.Thread(target=client, args=(p, i)) for i, p in enumerate(plans)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(finished) >= 32
    assert server.idle()
    server.core.check()
    stats = server.core.stats()
    assert (stats.running, stats.waiting, stats.kv_used_blocks) == (0, 0, 0)


def test_metrics_count_what_happened(server: Running) -> None:
    httpx.post(server.url + TEXT, json={"prompt": "abc", "max_tokens": 4})
    httpx.post(server.url + TEXT, json={"prompt": "abc", "max_tokens": -4})
    assert server.idle()
    text = httpx.get(server.url + "/metrics").text
    for line in (
        'nexusengine_http_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'nexusengine_http_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        "nexusengine_prompt_tokens_total 3.0",
        "nexusengine_output_tokens_total 4.0",
        "nexusengine_ttft_seconds_count 1.0",
        "nexusengine_requests_in_progress 0.0",
        'nexusengine_worker_ready{device="fake",worker="w0"} 1.0',
        'nexusengine_worker_generated_tokens_total{device="fake",worker="w0"} 4.0',
    ):
        assert line in text
    assert server.state.model_name == MODEL


def test_the_metrics_page_is_made_of_the_tables() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == markdown()
