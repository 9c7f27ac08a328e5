"""--record-trace: a line for everything that was asked, whatever became of it, and no text."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from nexusengine.recording.format import Header, Request, Workers, parse
from tests.api.conftest import Running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = "a secret of the house"


def post(server: Running, path: str = TEXT, timeout: float = 30.0, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"max_tokens": 3} | body, timeout=timeout)


def recorded(server: Running, path: Path) -> list[Request]:
    """Close the recorder and read what it wrote."""
    assert server.idle() or server.executor.broken
    assert server.state.recorder is not None
    server.state.recorder.close(10.0)
    lines = [parse(json.loads(line)) for line in path.read_text().splitlines()]
    assert isinstance(lines[0], Header)
    return [line for line in lines if isinstance(line, Request)]


def test_every_generation_gets_a_line_with_lengths_slo_and_verdict(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    file = tmp_path / "load.jsonl"
    server = start_server(record_trace=str(file))
    assert post(server, prompt="x" * 40, slo="interactive").status_code == 200
    assert post(server, prompt=["ab", "cde"], n=2, slo={"ttft_ms": 5000, "tpot_ms": 700}).status_code == 200
    chat = post(server, CHAT, messages=[{"role": "user", "content": "hello"}], stream=True, slo="none")
    assert chat.text.endswith("data: [DONE]\n\n")
    assert post(server, prompt="x", max_tokens=0).status_code == 200  # generates nothing
    assert post(server, prompt="x", max_tokens=100_000).status_code == 400  # asks for what cannot be
    first, *pairs, chatted = recorded(server, file)
    assert (first.input_tokens, first.output_tokens, first.max_tokens, first.ended) == (40, 3, 3, "length")
    assert first.slo is not None
    assert (first.slo_class, first.slo.ttft_ms, first.slo.tpot_ms) == ("interactive", 540.0, 50.0)
    assert (first.met, first.worker) == (True, "w0")
    assert 0 < (first.queue_ms or 0) <= (first.ttft_ms or 0) <= (first.e2e_ms or 0)
    assert sorted(p.input_tokens or 0 for p in pairs) == [2, 2, 3, 3]
    assert {p.request for p in pairs} == {first.request + 1}
    assert {p.slo_class for p in pairs} == {"custom"}
    assert (chatted.slo, chatted.slo_class, chatted.met) == (None, None, None)
    assert chatted.input_tokens == len("user: hello\n")


def test_neither_text_nor_tokens_nor_names_are_in_the_file(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    file = tmp_path / "load.jsonl"
    server = start_server(record_trace=str(file), record_trace_key=KEY, api_key="open-sesame")
    for n in range(2):
        headers = {"authorization": "Bearer open-sesame", "x-request-id": f"from-mallory-{n}"}
        body = {"prompt": "attack at dawn " * 4, "max_tokens": 5, "user": "alice@example.org"}
        assert httpx.post(server.url + TEXT, json=body, headers=headers).status_code == 200
    first, second = recorded(server, file)
    text = file.read_text()
    for secret in ("attack", "alice", "sesame", "mallory", KEY):
        assert secret not in text
    assert first.tenant == second.tenant
    assert len(first.tenant or "") == 16
    assert first.hash_ids == second.hash_ids
    assert len(first.hash_ids) == 60 // server.core.kv.block_size
    assert file.stat().st_mode & 0o077 == 0


def test_refused_and_abandoned_requests_are_recorded_too(start_server: Callable[..., Running], tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    server = start_server(record_trace=str(file), real_s=0.05, max_requests=1)
    with httpx.stream("POST", server.url + TEXT, json={"prompt": "a", "max_tokens": 300, "stream": True}) as reply:
        events = reply.iter_lines()  # kept: its end closes the connection
        assert next(events)
        assert post(server, prompt="b").status_code == 429
    turned_away, left = recorded(server, file)
    assert (turned_away.ended, turned_away.input_tokens, turned_away.error) == ("refused", None, "overloaded")
    assert left.ended == "left"
    assert left.missed == "unfinished"
    assert 1 <= left.output_tokens < 300


def test_a_failed_generation_says_with_which_error(start_server: Callable[..., Running], tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    server = start_server(record_trace=str(file))
    server.executor.broken = True
    assert post(server, prompt="x").status_code == 500
    (failed,) = recorded(server, file)
    assert (failed.ended, failed.met, failed.missed, failed.output_tokens) == ("failed", False, "failed", 0)
    assert failed.error == "internal_error"
    assert failed.input_tokens == 1


def test_the_workers_and_what_they_learned_are_in_the_file(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    file = tmp_path / "load.jsonl"
    server = start_server(record_trace=str(file))
    post(server, prompt="x" * 20)
    recorded(server, file)
    described = [
        line for line in map(parse, map(json.loads, file.read_text().splitlines())) if isinstance(line, Workers)
    ]
    (worker,) = described[-1].workers
    assert worker.learned is not None
    assert worker.learned.kind == "online-2"
    assert (worker.worker, worker.block_tokens) == ("w0", server.core.kv.block_size)


def test_a_full_disk_fails_no_request_and_is_said_once(
    start_server: Callable[..., Running],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "load.jsonl"
    server = start_server(record_trace=str(file))
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patched, caplog.at_level(logging.INFO, "nexusengine"):
        patched.setattr("nexusengine.recording.files.os.write", full)
        for _ in range(3):
            assert post(server, prompt="x" * 30).status_code == 200
        assert recorded(server, file) == []
    said = [r.message for r in caplog.records if "cannot write the trace" in r.message]
    assert len(said) == 1
    assert str(file) in said[0]
    assert "No space left" in said[0]
    assert "unrecorded_requests_total 3.0" in httpx.get(server.url + "/metrics").text
