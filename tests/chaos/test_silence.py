"""A server, router or worker that does not run for a while, or is killed while draining: every stream ends, with its
reason if not with its end, and soon; exit statuses say what was lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import zmq

from nexusengine import wire
from tests.chaos.test_processes import TEXT, Stream, at_rest, start_and_fail, wait_until
from tests.conftest import Served

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]
Serve = Callable[..., Served]


def child(served: Served, module: str) -> psutil.Process:
    """The first child of the supervisor that runs it."""
    return next(p for p in psutil.Process(served.process.pid).children() if f"nexusengine.{module}" in p.cmdline())


def stop(process: psutil.Process, seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_server_that_was_stopped_until_the_router_forgot_it_tells_its_streams_at_once(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4,emulated:t4")
    streams = [Stream(served.url, 4000) for _ in range(3)]
    for stream in streams:
        stream.wait_for_tokens()
    stop(child(served, "server.main"), 17.0)
    began_s = time.monotonic()
    assert [stream.join() for stream in streams] == ["worker_lost"] * 3
    assert time.monotonic() - began_s < 30.0, "they did not wait for a time limit"
    assert Stream(served.url, 5).join() == "done"
    wait_until(lambda: at_rest(served))


@pytest.mark.parametrize("module", ["router.broker", "worker.worker"])
def test_streams_go_on_after_a_router_or_a_worker_was_stopped_for_a_while(serve: Serve, module: str) -> None:
    served = serve("--devices", "emulated:t4")
    stream = Stream(served.url, 500)
    stream.wait_for_tokens()
    stop(child(served, module), 6.0)
    assert stream.join() == "done"
    assert stream.tokens == 500
    assert Stream(served.url, 5).join() == "done"


@pytest.mark.parametrize(
    ("module", "name", "end"),
    [
        ("router.broker", "router", "worker_lost"),
        ("server.main", "server", "broken off"),
        ("worker.worker", "w0", "worker_lost"),
    ],
)
def test_a_process_that_dies_while_draining_is_an_error(serve: Serve, module: str, name: str, end: str) -> None:
    served = serve("--devices", "emulated:t4")
    stream = Stream(served.url, 3000)
    stream.wait_for_tokens()
    replies: list[httpx.Response] = []
    body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True}

    def ask() -> None:
        try:
            replies.append(httpx.post(served.url + TEXT, json=body, timeout=60))
        except httpx.RemoteProtocolError:
            assert name == "server"

    whole = threading.Thread(target=ask)
    whole.start()
    wait_until(lambda: served.metric("nexusengine_router_ledger")[""] == 2)
    served.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(served.url + "/readyz").status_code == 503)
    child(served, module).kill()
    assert stream.join() == end
    whole.join(60)
    assert [r.status_code for r in replies] == ([] if name == "server" else [503])
    assert served.process.wait(30) == 1
    assert f"nexusengine: {name} ended while the last requests were being finished: killed by" in served.log.read_text()


def test_what_is_not_finished_when_the_drain_time_is_over_is_told(serve: Serve) -> None:
    served = serve("--devices", "emulated:t4", "--drain-timeout", "1")
    stream = Stream(served.url, 4000)
    stream.wait_for_tokens()
    served.process.send_signal(signal.SIGTERM)
    assert stream.join() == "worker_lost"
    assert served.process.wait(30) == 0


def test_the_folder_of_a_killed_supervisor_goes_with_the_next_start(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    killed = serve("--devices", "emulated:t4")
    (left,) = temporary.glob("nexusengine-*")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (left, *left.iterdir()))
    killed.process.kill()
    killed.process.wait()
    served = serve("--devices", "emulated:t4")
    (alive,) = temporary.glob("nexusengine-*")
    assert alive != left
    served.process.send_signal(signal.SIGTERM)
    served.process.wait(30)
    assert list(temporary.glob("nexusengine-*")) == []


def test_a_runtime_folder_that_others_may_write_to_is_refused_in_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    cause = start_and_fail("--devices", "emulated:t4", "--runtime-dir", str(tmp_path))
    assert f"other users may write to the runtime folder {tmp_path}" in cause


def test_frames_of_strangers_on_its_sockets_do_not_disturb_a_server(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "runtime"
    served = serve("--devices", "emulated:t4", "--runtime-dir", str(folder))
    stream = Stream(served.url, 300)
    stream.wait_for_tokens()
    stranger = wire.WorkerInfo("w7", "e", 1, "cpu", "m", max_model_len=10_000)
    nonsense = wire.PerfSnapshot("nonsense", (), 1.0, 0, 0)
    frames = [
        b"\x91\xa1\x81",
        b"\x91" * 5000,
        wire.encode(wire.Ready(stranger)),
        wire.encode(wire.Report(1, wire.WorkerLoad(0, perf=nonsense))),
        wire.encode(wire.Hello(protocol=99)),
    ]
    for name in ("front", "back"):
        assert (folder / name).stat().st_mode & 0o077 == 0
        for identity in (b"w7.e", b"w0"):
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
            socket.set(zmq.IDENTITY, identity)
            socket.connect(f"ipc://{folder}/{name}")
            for frame in frames * 20:
                socket.send(frame)
            socket.close(1000)
    assert stream.join() == "done"
    assert stream.tokens == 300
    assert [Stream(served.url, 5).join() for _ in range(4)] == ["done"] * 4
    assert [w["id"] for w in served.workers()] == ["w0"]
    wait_until(lambda: "ignored a message from" in served.log.read_text())
    assert "starting it again" not in served.log.read_text()
