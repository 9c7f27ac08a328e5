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

import nexusengine.engine.router_client
from nexusengine import wire
from nexusengine.engine.router_client import RouterClient
from nexusengine.errors import Unavailable
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta


async def test_requests_end_when_the_router_has_been_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.engine.router_client, "_GONE_S", 0.2)
    monkeypatch.setattr(nexusengine.engine.router_client, "_HELLO_EVERY_S", 0.02)
    client = RouterClient(f"ipc://{tmp_path}/nobody")
    await client.start()
    news: asyncio.Queue[TokenDelta] = asyncio.Queue()
    client.submit(EngineRequest("r", [1], SamplingParams(), 0.0), news.put_nowait)
    delta = await asyncio.wait_for(news.get(), 5)
    assert (delta.request_id, delta.finish_reason, delta.error_code) == ("r", "error", "unavailable")
    assert client.status() is None
    await client.close()
    assert news.empty()


class Peer:
    """What a client talks to, one message at a time."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client = b""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(endpoint)

    async def hear(self, kind: type[wire.Message]) -> wire.Message:
        """The next message of this kind."""
        async with asyncio.timeout(10):
            while True:
                self.client, frame = await self._socket.recv_multipart()
                if isinstance(message := wire.decode_from_client(frame), kind):
                    return message

    async def say(self, message: wire.Message) -> None:
        await self._socket.send_multipart([self.client, wire.encode(message)])

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class Asked:
    """Requests submitted to a client, and how they ended."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client
        self.news: dict[str, asyncio.Queue[TokenDelta]] = {}

    def submit(self, name: str) -> None:
        self.news[name] = asyncio.Queue()
        self._client.submit(EngineRequest(name, [1], SamplingParams(), 0.0), self.news[name].put_nowait)

    async def end(self, name: str) -> tuple[str | None, str | None]:
        """The code and the message of its end."""
        async with asyncio.timeout(5):
            while (delta := await self.news[name].get()).finish_reason is None:
                pass
        assert self.news[name].empty(), "news after the end"
        assert delta.error_code is None or delta.retry_after_s is not None, "it can be tried again"
        return delta.error_code, delta.error_message


@pytest.mark.parametrize("restarted", [False, True], ids=["the router forgot the client", "the router was restarted"])
async def test_what_the_router_has_lost_ends_at_once_and_what_came_after_is_served(
    tmp_path: Path, restarted: bool
) -> None:
    peer, client = Peer(f"ipc://{tmp_path}/front"), RouterClient(f"ipc://{tmp_path}/front")
    asked = Asked(client)
    await client.start()
    await peer.hear(wire.Hello)
    await peer.say(wire.Cluster("r1", (), session=1))
    for name in ("streams", "waits"):
        asked.submit(name)
        await peer.hear(wire.Submit)
    await peer.say(wire.Deltas((("streams", (7,)),)))
    await asked.news["streams"].get()
    asked.submit("new")
    assert await peer.hear(wire.Submit) == wire.Submit(EngineRequest("new", [1], SamplingParams(), 0.0), 2)
    epoch, session = ("r2", 1) if restarted else ("r1", 2)
    await peer.say(wire.Cluster(epoch, (), session=session, since=2))
    why = "the router was restarted" if restarted else "the router gave the request up: this process was silent"
    assert await asked.end("streams") == ("worker_lost", why)
    assert await asked.end("waits") == ("unavailable", why)
    await peer.say(wire.Cluster(epoch, (), session=session, since=2))
    await peer.say(wire.Deltas((), (TokenDelta("new", (3,), finish_reason="stop"),)))
    assert await asked.end("new") == (None, None)
    await client.close()
    peer.close()


async def test_requests_end_at_once_when_the_router_ends(tmp_path: Path) -> None:
    peer, client = Peer(f"ipc://{tmp_path}/front"), RouterClient(f"ipc://{tmp_path}/front")
    asked = Asked(client)
    await client.start()
    asked.submit("a")
    await peer.hear(wire.Submit)
    peer.close()
    assert await asked.end("a") == ("unavailable", "the router has ended")
    again = Peer(f"ipc://{tmp_path}/front")
    assert await again.hear(wire.Hello)
    await client.close()
    again.close()


async def test_a_loop_that_is_held_up_still_says_hello_and_hears_what_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.engine.router_client, "_HELLO_EVERY_S", 0.02)
    monkeypatch.setattr(nexusengine.engine.router_client, "_GONE_S", 0.3)
    monkeypatch.setattr(nexusengine.engine.router_client, "_SILENT_S", 0.3)
    client = RouterClient(f"ipc://{tmp_path}/front")
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/front")
    asked = Asked(client)
    await client.start()
    asked.submit("a")
    hellos, submits, until_s = 0, 0, time.monotonic() + 1.0
    while time.monotonic() < until_s:  # the loop is held up for a second, and the router is there all the time
        identity, frame = router.recv_multipart()
        submits += isinstance(message := wire.decode_from_client(frame), wire.Submit)
        if isinstance(message, wire.Hello):
            hellos += 1
            router.send_multipart([identity, wire.encode(wire.Cluster("r", ()))])
    assert submits == 1
    assert hellos > 3
    assert client.status() == wire.Cluster("r", ())
    await asyncio.sleep(0.05)
    assert asked.news["a"].empty(), "the router was not silent"
    await client.close()
    router.close(0)


async def test_a_client_that_the_router_does_not_take_says_why(tmp_path: Path) -> None:
    peer, client = Peer(f"ipc://{tmp_path}/front"), RouterClient(f"ipc://{tmp_path}/front")
    asked = Asked(client)
    await client.start()
    asked.submit("a")
    await peer.hear(wire.Submit)
    await peer.say(wire.Refused("it speaks version 1"))
    why = "the router does not take this process: it speaks version 1"
    assert await asked.end("a") == ("unavailable", why)
    assert client.status() is None
    with pytest.raises(Unavailable, match="version 1"):
        asked.submit("b")
    with pytest.raises(wire.ProtocolError, match="version 1"):
        await client.wait_for_ready(1.0)
    await client.close()
    peer.close()


async def test_a_loop_that_was_busy_is_not_a_router_that_was_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexusengine.engine.router_client, "_SILENT_S", 0.1)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
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

    def __init__(self, endpoint: str, findings: list[wire.DebugReply]) -> None:
        self.asked: list[wire.DebugQuery] = []
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
            elif isinstance(message, wire.DebugQuery):
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
    monkeypatch.setattr(nexusengine.engine.router_client, "_ANSWER_S", 5.0 if answers else 0.2)
    findings = wire.DebugReply(b"", 0, "w0")
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
