"""The router's client: a router that does not answer does not leave its callers waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from msgspec import structs

import nexusengine.serve.client
from nexusengine import wire
from nexusengine.errors import Unavailable
from nexusengine.serve.client import RouterClient
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta


async def test_requests_end_when_the_router_has_been_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.serve.client, "_GONE_S", 0.2)
    monkeypatch.setattr(nexusengine.serve.client, "_HELLO_EVERY_S", 0.02)
    client = RouterClient(f"ipc://{tmp_path}/nobody")
    await client.start()
    news: asyncio.Queue[TokenDelta] = asyncio.Queue()
    client.submit(EngineRequest("r", [1], SamplingParams(), 0.0), news.put_nowait)
    delta = await asyncio.wait_for(news.get(), 5)
    assert (delta.request_id, delta.finish_reason, delta.error_code) == ("r", "error", "unavailable")
    assert client.status() is None
    await client.close()
    assert news.empty()


async def test_a_loop_that_was_busy_is_not_a_router_that_was_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.serve.client, "_SILENT_S", 0.1)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(f"ipc://{tmp_path}/front")
    sent = threading.Event()

    def answer_twice() -> None:
        identity, _ = socket.recv_multipart()
        socket.send_multipart([identity, wire.encode(wire.Cluster("r", ()))])
        assert sent.wait(5)
        socket.send_multipart([identity, wire.encode(wire.Cluster("r", (), held=7))])
        sent.clear()

    router = threading.Thread(target=answer_twice)
    router.start()
    client = RouterClient(f"ipc://{tmp_path}/front")
    await client.start()
    await client.wait_for_ready(5)
    time.sleep(0.2)
    assert client.status() is None
    sent.set()
    router.join()
    time.sleep(0.1)
    cluster = client.status()
    assert cluster is not None
    assert cluster.held == 7
    await client.close()
    socket.close(0)


class Router:
    """A router with one worker that serves and one that is starting; it answers questions with `findings`."""

    def __init__(self, endpoint: str, findings: list[wire.Findings]) -> None:
        self.asked: list[wire.Ask] = []
        self._findings = findings
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.bind(endpoint)

    async def run(self) -> None:
        while True:
            identity, frame = await self._socket.recv_multipart()
            message = wire.decode_from_client(frame)
            replies: list[wire.Message] = []
            if isinstance(message, wire.Hello):
                states = (wire.WorkerState.READY, wire.WorkerState.STARTING)
                infos = (wire.WorkerInfo(f"w{i}", "e", 1, "cpu", "m") for i in range(2))
                workers = (wire.WorkerStatus(i, s, "", 1.0, 0, None) for i, s in zip(infos, states, strict=True))
                replies = [wire.Cluster("r", tuple(workers))]
            elif isinstance(message, wire.Ask):
                self.asked.append(message)
                replies = [structs.replace(f, query=message.query) for f in self._findings]
            for reply in replies:
                await self._socket.send_multipart([identity, wire.encode(reply)])

    def close(self) -> None:
        self._socket.close(0)


@pytest.mark.parametrize("answers", [True, False])
async def test_a_question_waits_for_the_workers_that_serve_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setattr(nexusengine.serve.client, "_ANSWER_S", 5.0 if answers else 0.2)
    findings = wire.Findings(b"", 0, "w0")
    router = Router(f"ipc://{tmp_path}/front", [findings] if answers else [])
    running = asyncio.create_task(router.run())
    client = RouterClient(f"ipc://{tmp_path}/front")
    await client.start()
    with pytest.raises(Unavailable, match="does not answer"):
        await client.ask(last_steps=3)  # nothing has been heard yet
    async with asyncio.timeout(5):
        while client.status() is None:
            await asyncio.sleep(0.01)
    found = await client.ask(last_steps=3, request_id="a")
    assert [f.worker_id for f in found] == (["w0"] if answers else [])
    assert [(a.last_steps, a.request_id) for a in router.asked] == [(3, "a")]
    running.cancel()
    await client.close()
    router.close()
