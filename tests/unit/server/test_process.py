"""The server's process: its port first, then the application, then the end of its parent."""

from __future__ import annotations

import asyncio
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
import uvicorn

from nexusengine.config import ServeConfig
from nexusengine.process.control import (
    BootLine,
    Drain,
    Drained,
    Failed,
    FromChild,
    Listening,
    Model,
    Phase,
    ServerBoot,
    ToChild,
    decode_from_child,
    encode,
)
from nexusengine.server import process
from nexusengine.server.state import ServerState
from tests.unit.tokenize.test_special_tokens import CONFIG, save


@contextmanager
def server_process(tmp_path: Path, **settings: Any) -> Iterator[tuple[subprocess.Popen[bytes], FromChild | None]]:
    """The process, and its first message."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nexusengine.server.main"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    boot = ServerBoot(ServeConfig(**settings), f"ipc://{tmp_path}/front")
    try:
        send(process, BootLine(boot, os.getpid(), True))
        yield process, decode_from_child(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()  # type: ignore[union-attr]


def send(process: subprocess.Popen[bytes], message: BootLine | ToChild) -> None:
    assert process.stdin is not None
    process.stdin.write(encode(message))
    process.stdin.flush()


def test_it_answers_before_there_is_a_model_and_ends_with_its_parent(tmp_path: Path) -> None:
    with server_process(tmp_path, port=0, model="some/model") as (child, event):
        assert isinstance(event, Listening)
        assert event.host == "127.0.0.1"
        url = f"http://127.0.0.1:{event.port}"
        assert httpx.get(f"{url}/livez", timeout=20).status_code == 200
        startup = httpx.get(f"{url}/startupz")
        assert startup.status_code == 503
        assert set(startup.json()) == {"phase", "fraction", "workers"}
        send(child, Phase("downloading", 0.25))
        send(child, Drain())
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
        assert isinstance(event, Listening)
        client.connect(("127.0.0.1", event.port))
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
        url = f"http://127.0.0.1:{event.port}"
        while "nexusengine_requests_in_progress 1.0" not in httpx.get(f"{url}/metrics", timeout=20).text:
            pass
        send(child, Drain())
        while httpx.get(f"{url}/startupz").json()["phase"] != "draining":
            pass
        assert child.stdout is not None
        assert select.select([child.stdout], [], [], 0.3)[0] == []
        client.sendall(b"}")
        assert client.recv(12) == b"HTTP/1.1 400"
        assert decode_from_child(child.stdout.readline()) == Drained()


def test_a_port_in_use_is_one_clear_cause(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with server_process(tmp_path, port=port) as (child, event):
            assert event == Failed(
                f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port, or 0 for a "
                "free one"
            )
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
        assert isinstance(event, Listening)
        send(child, Model(str(tmp_path), "m"))
        assert child.stdout is not None
        failed = decode_from_child(child.stdout.readline())
        assert isinstance(failed, Failed)
        assert words in failed.message
        assert child.wait(10) == 1


def test_an_error_that_nobody_foresaw_ends_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[FromChild] = []

    def load(files: Any) -> Any:
        raise OverflowError("too large")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(process, "resolve_model", lambda *args, **options: None)
    monkeypatch.setattr(process, "load_tokenizer", load)
    monkeypatch.setattr("nexusengine.process.child.send", sent.append)
    monkeypatch.setattr("os._exit", leave)
    control = process.Control(ServerState(ServeConfig(), "m"), "ipc://nowhere")

    async def serve() -> None:
        control.attach(asyncio.get_running_loop(), uvicorn.Server(uvicorn.Config("none")))
        control.on_message(Model("m", "m"))
        await asyncio.Event().wait()

    with pytest.raises(SystemExit) as ended:
        asyncio.run(serve())
    assert ended.value.code == 1
    assert sent == [Failed("cannot load the tokenizer of m: OverflowError('too large')")]


async def test_at_the_end_what_streams_is_ended_before_the_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's client fails what is pending when it is shut, and each stream says so in an error event."""
    reasons: list[str] = []

    class Client:
        def shut(self, reason: str) -> None:
            reasons.append(reason)

    timers: list[float] = []
    server = uvicorn.Server(uvicorn.Config("none"))
    control = process.Control(ServerState(ServeConfig(), "m"), "ipc://nowhere")
    monkeypatch.setattr(
        process, "threading", SimpleNamespace(Timer=lambda s, *_: SimpleNamespace(start=lambda: timers.append(s)))
    )
    control.attach(asyncio.get_running_loop(), server)
    control._client = Client()  # type: ignore[assignment]
    control.on_end()
    await asyncio.sleep(0)
    assert reasons == ["the server is shutting down"]
    assert server.should_exit
    assert len(timers) == 1


def test_a_control_message_that_is_unknown_ends_the_process_and_is_named(tmp_path: Path) -> None:
    with server_process(tmp_path, port=0) as (child, _):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b'{"type": "reload"}\n')
        child.stdin.flush()
        failed = decode_from_child(child.stdout.readline())
        assert isinstance(failed, Failed)
        assert "unknown control message" in failed.message
        assert "reload" in failed.message
        assert child.wait(10) == 1
