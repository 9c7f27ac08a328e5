"""The server's process: its port first, then the application, then the end of its parent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from nexusengine.config import ServeConfig
from nexusengine.server import process
from nexusengine.server.state import ServerState
from tests.unit.test_special_tokens import CONFIG, save


@contextmanager
def server_process(tmp_path: Path, **settings: Any) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """The process, and its first event."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nexusengine.server.main"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    given = {
        "config": dataclasses.asdict(ServeConfig(**settings)),
        "front": f"ipc://{tmp_path}/front",
        "parent_death_signal": True,
        "parent_pid": os.getpid(),
    }
    try:
        process.stdin.write(json.dumps(given).encode() + b"\n")
        process.stdin.flush()
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()  # type: ignore[union-attr]


def tell(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def test_it_answers_before_there_is_a_model_and_ends_with_its_parent(tmp_path: Path) -> None:
    with server_process(tmp_path, port=0, model="some/model") as (child, event):
        assert (event["type"], event["host"]) == ("listening", "127.0.0.1")
        url = f"http://127.0.0.1:{event['port']}"
        assert httpx.get(f"{url}/livez", timeout=20).status_code == 200
        startup = httpx.get(f"{url}/startupz")
        assert startup.status_code == 503
        assert set(startup.json()) == {"phase", "fraction", "workers"}
        tell(child, {"type": "phase", "phase": "downloading", "fraction": 0.25})
        tell(child, {"type": "drain"})
        while (progress := httpx.get(f"{url}/startupz").json())["phase"] != "draining":
            pass
        assert progress["fraction"] == 0.25
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "some/model"
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(10) == 0


def test_it_is_drained_once_every_request_is_answered(tmp_path: Path) -> None:
    """The router is done earlier: what it sent last may still be on its way to the server."""
    with server_process(tmp_path, port=0) as (child, event), socket.socket() as client:
        client.connect(("127.0.0.1", event["port"]))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
        url = f"http://127.0.0.1:{event['port']}"
        while "nexusengine_requests_in_progress 1.0" not in httpx.get(f"{url}/metrics", timeout=20).text:
            pass
        tell(child, {"type": "drain"})
        while httpx.get(f"{url}/startupz").json()["phase"] != "draining":
            pass
        assert child.stdout is not None
        assert select.select([child.stdout], [], [], 0.3)[0] == []
        client.sendall(b"}")
        assert client.recv(12) == b"HTTP/1.1 400"
        assert json.loads(child.stdout.readline()) == {"type": "drained"}


def test_a_port_in_use_is_one_clear_cause(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with server_process(tmp_path, port=port) as (child, event):
            assert event == {
                "type": "failed",
                "message": f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port, or "
                "0 for a free one",
            }
            assert child.wait(10) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", '{"bos_token": {}}', "bos_token is {}"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "is not a usable tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_ends_the_process_with_the_reason(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    save(tmp_path, config=CONFIG)
    (tmp_path / name).write_text(text)
    with server_process(tmp_path, port=0) as (child, event):
        assert event["type"] == "listening"
        tell(child, {"type": "model_ready", "path": str(tmp_path), "name": "m"})
        assert child.stdout is not None
        failed = json.loads(child.stdout.readline())
        assert failed["type"] == "failed"
        assert words in failed["message"]
        assert child.wait(10) == 1


def test_an_error_that_nobody_foresaw_ends_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def load(files: Any) -> Any:
        raise OverflowError("too large")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(process, "resolve_model", lambda *args, **options: None)
    monkeypatch.setattr(process, "load_tokenizer", load)
    monkeypatch.setattr(process.child, "emit", told.append)
    monkeypatch.setattr(process.os, "_exit", leave)
    control = process.Control(ServerState(ServeConfig(), "m"), "ipc://nowhere")
    with pytest.raises(SystemExit) as ended:
        asyncio.run(control._load({"path": "m", "name": "m"}))
    assert ended.value.code == 1
    assert told == [{"type": "failed", "message": "cannot load the tokenizer of m: OverflowError('too large')"}]


async def test_at_the_end_what_streams_is_ended_before_the_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's client fails what is pending when it is shut, and each stream says so in an error event."""
    reasons: list[str] = []

    class Client:
        def shut(self, reason: str) -> None:
            reasons.append(reason)

    class Server:
        should_exit = False

    timers: list[float] = []
    monkeypatch.setattr(
        process, "threading", SimpleNamespace(Timer=lambda s, *_: SimpleNamespace(start=lambda: timers.append(s)))
    )
    control = process.Control.__new__(process.Control)
    control._tasks, control._client = set(), Client()  # type: ignore[assignment]
    control._loop, control._server = asyncio.get_running_loop(), Server()  # type: ignore[assignment]
    control.on_end()
    await asyncio.sleep(0)
    assert reasons == ["the server is shutting down"]
    assert control._server.should_exit
    assert len(timers) == 1
