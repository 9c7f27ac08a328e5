"""A worker's link to the router, against a socket that plays the router."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from nexusengine import wire
from nexusengine.process.control import Ready, decode_from_child
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta
from nexusengine.wire import identity_of
from nexusengine.worker.link import RouterLink

INFO = wire.WorkerInfo("w0", "e1", 1, "cpu", "m")


class Router:
    """The other end of a link that reports every 20 ms. refused: the reasons its worker was given."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.set(zmq.RCVTIMEO, 10_000)
        self._socket.bind(endpoint)
        self.refused: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.link = RouterLink(endpoint, INFO, 0.02, self.refused.put)

    def hear(self, kind: type[wire.Message]) -> wire.Message:
        """The next message of this kind."""
        while True:
            identity, frame = self._socket.recv_multipart()
            assert identity == identity_of("w0", "e1")
            if isinstance(message := wire.decode_from_worker(frame), kind):
                return message

    def say(self, frame: bytes) -> None:
        self._socket.send_multipart([identity_of("w0", "e1"), frame])

    def close(self) -> None:
        self.link.leave("the test is over")
        self._socket.close(0)


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Router]:
    made = Router(f"ipc://{tmp_path}/back")
    yield made
    made.close()


def test_frames_that_are_no_messages_do_not_end_the_link(router: Router) -> None:
    router.hear(wire.Starting)
    for frame in (b"\x91\xa1\x81", b"", b"\xdd\xff\xff\xff\xff", wire.encode(wire.Hello())):
        router.say(frame)
    dispatch = wire.Dispatch(1, EngineRequest("a", [1], SamplingParams(seed=1), 0.0))
    router.say(wire.encode(dispatch))
    while not router.link.inbox:
        router.link.wait(1.0)
    assert list(router.link.inbox) == [dispatch]
    assert router.hear(wire.Starting), "it goes on reporting"


def test_a_worker_that_is_asked_to_register_again_says_what_it_has_and_has_seen(router: Router) -> None:
    router.link.ready(INFO, lambda: wire.WorkerLoad(last_dispatch_seq=7), lambda: ["a", "b"])
    assert router.hear(wire.Ready) == wire.Ready(INFO)
    router.say(wire.encode(wire.Reregister()))
    assert router.hear(wire.Ready) == wire.Ready(INFO, ("a", "b"), last_dispatch_seq=7)
    router.link.send([TokenDelta("a", (5,))], 7)
    assert router.hear(wire.WorkerDeltas) == wire.WorkerDeltas((("a", (5,)),), (), 7)


def test_the_first_report_comes_before_requests_may(router: Router) -> None:
    router.hear(wire.Starting)
    router.link.ready(INFO, lambda: wire.WorkerLoad(last_dispatch_seq=0), list)
    report = router.hear(wire.Report)
    assert isinstance(report, wire.Report)
    assert report.seq == 1
    assert router.hear(wire.Ready) == wire.Ready(INFO)


def test_a_worker_of_another_version_is_told_why_it_is_not_taken(router: Router) -> None:
    router.hear(wire.Starting)
    router.say(wire.encode(wire.Refused("it speaks version 1")))
    assert router.refused.get(timeout=10) == "it speaks version 1"


def test_progress_beyond_its_range_is_still_a_message(router: Router) -> None:
    router.link.phase("loading", 1.0000001)
    while (message := router.hear(wire.Starting)).phase != "loading":  # type: ignore[attr-defined]
        pass
    assert message == wire.Starting(INFO, "loading", 1.0)


@pytest.mark.parametrize("line", [b"null", b"5", b"[1]", b'"x"', b"{}", b'{"type": 5}', b"[" * 100_000, b"\xff", b""])
def test_what_a_library_writes_to_a_childs_stdout_is_no_event(line: bytes) -> None:
    assert decode_from_child(line) is None
    assert decode_from_child(b'{"type": "ready"}') == Ready()
