"""What is no message, or says what cannot be true, is a ProtocolError that hurts its sender alone."""

from __future__ import annotations

import math
import queue
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from nexusengine import wire
from nexusengine.perf.registry import make_model
from nexusengine.router.broker import Broker
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.baselines import LeastRequests
from nexusengine.router.placement.registry import POLICIES, make_policy
from nexusengine.types import EngineRequest, SamplingParams, Timings, TokenDelta
from nexusengine.wire import identity_of
from tests.chaos.fuzz import Fuzz

CLIENT = b"client"
DECODERS = (wire.decode_from_worker, wire.decode_for_worker, wire.decode_from_client, wire.decode_for_client)
FRAMES = {
    "a tag that is not UTF-8": b"\x91\xa1\x81",
    "nothing": b"",
    "an unknown tag": msgspec.msgpack.encode(["Nonsense", 1]),
    "no array": msgspec.msgpack.encode({"type": "Hello"}),
    "nested without end": b"\x91" * 100_000,
    "a length beyond the frame": b"\xdd\xff\xff\xff\xff",
    "an extension": b"\xc7\x03\x05abc",
}


@pytest.mark.parametrize("decode", DECODERS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_a_frame_that_is_no_message_is_a_protocol_error(decode: Callable[[bytes], object], frame: bytes) -> None:
    with pytest.raises(wire.ProtocolError):
        decode(frame)


def info(worker: str = "w0", epoch: str = "e1") -> wire.WorkerInfo:
    return wire.WorkerInfo(worker, epoch, 1, "cpu", "m", max_model_len=1000, max_batch_tokens=512, block_size=16)


def router(policy: str = "prism", epoch: str = "e1") -> RouterCore:
    """With one worker, w0, that is ready."""
    core = RouterCore(make_policy(policy), [wire.WorkerInfo("w0", epoch, 0, "cpu", "m")], epoch="r")
    core.on_worker(identity_of("w0", "e1"), wire.Ready(info()), 0.0)
    core.take()
    return core


def request(name: str = "a", **fields: Any) -> EngineRequest:
    return EngineRequest(**{
        "request_id": name,
        "prompt_token_ids": [1, 2],
        "sampling": SamplingParams(seed=1, max_tokens=5),
        "arrival_s": 0.0,
        **fields,
    })  # fmt: skip


def perf(**fields: Any) -> wire.PerfSnapshot:
    s = make_model().snapshot()
    return msgspec.structs.replace(wire.PerfSnapshot(s.kind, s.weights, s.quantile, 0, 0), **fields)


def pending(**fields: Any) -> wire.PendingPrefill:
    return msgspec.structs.replace(wire.PendingPrefill(1.0, 10, 0, 0.05, False), **fields)


GOOD_LOAD = wire.WorkerLoad(0, perf=perf(), pending=(pending(), pending(deadline_s=math.nan, tpot_s=math.nan)))
LOADS = {
    "an unknown kind of model": {"perf": perf(kind="nonsense")},
    "a model with too few weights": {"perf": perf(weights=(1.0,))},
    "a model with a weight that is not a number": {"perf": perf(weights=(math.nan, *perf().weights[1:]))},
    "a model whose steps never end": {"perf": perf(weights=(1e300, *perf().weights[1:]))},
    "a quantile of 0": {"perf": perf(quantile=0.0)},
    "a negative count": {"waiting": -1},
    "a count beyond all bounds": {"pending_tokens": 2**63},
    "a time that is not a number": {"step_running_s": math.nan},
    "an infinite time": {"step_upper_s": math.inf},
    "a mean that is not a number": {"mean_output_tokens": math.nan},
    "a time per token of 0": {"tightest_tpot_s": 0.0},
    "a negative time per token": {"pending": (pending(tpot_s=-1.0),)},
    "negative tokens": {"pending": (pending(left_tokens=-5),)},
    "too many prompts": {"pending": (pending(),) * (wire.MAX_PENDING_IN_REPORT + 1)},
}


def hear(core: RouterCore, message: wire.Message, now: float = 0.0, identity: bytes = b"") -> None:
    core.on_worker(identity or identity_of("w0", "e1"), wire.decode_from_worker(wire.encode(message)), now)


@pytest.mark.parametrize("wrong", LOADS.values(), ids=LOADS.keys())
def test_a_report_that_cannot_be_true_is_refused_and_the_one_before_counts(wrong: dict[str, Any]) -> None:
    core = router()
    hear(core, wire.Report(1, GOOD_LOAD))
    with pytest.raises(wire.ProtocolError):
        hear(core, wire.Report(2, msgspec.structs.replace(GOOD_LOAD, **wrong)))
    assert repr(core.workers.by_id["w0"].load) == repr(GOOD_LOAD)  # NaN is not equal to itself
    core.prepare(0.0)
    core.on_client(CLIENT, wire.Submit(request()), 0.0)
    assert [o.message for o in core.take() if isinstance(o.message, wire.Dispatch)] == [wire.Dispatch(1, request())]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"prompt_token_ids": [1, -1]}, "token ids"),
        ({"prompt_token_ids": [2**40]}, "token ids"),
        ({"prompt_token_ids": []}, "token ids"),
        ({"arrival_s": math.nan}, "arrived"),
        ({"deadline_s": math.nan}, "deadline"),
        ({"priority": 2**31}, "priority"),
        ({"request_id": "x" * 5000}, "5000 characters"),
    ],
)
def test_a_request_that_makes_no_sense_is_answered(wrong: dict[str, Any], word: str) -> None:
    core = router()
    submitted = wire.decode_from_client(wire.encode(wire.Submit(request(**wrong))))
    core.on_client(CLIENT, submitted, 0.0)
    (delta,) = [d for o in core.take() if isinstance(o.message, wire.Deltas) for d in o.message.full]
    assert (delta.finish_reason, delta.error_code) == ("error", "invalid_value")
    assert word in (delta.error_message or "")
    assert len(core.ledger) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"token_ids": (-1,)}, {"token_ids": (2**40,)}, {"cached_tokens": -1}, {"retry_after_s": math.nan}],
)
def test_an_answer_that_makes_no_sense_ends_its_request_alone(wrong: dict[str, Any]) -> None:
    core = router()
    for name in ("a", "b"):
        core.on_client(CLIENT, wire.Submit(request(name)), 0.0)
    core.take()
    fields: dict[str, Any] = {"token_ids": (7,), "timings": Timings(0.0), **wrong}
    hear(core, wire.WorkerDeltas(*wire.split_deltas([TokenDelta("a", **fields), TokenDelta("b", (7,))])))
    out = core.take()
    deltas = {
        d.request_id: d
        for o in out
        if isinstance(o.message, wire.Deltas)
        for d in wire.join_deltas(o.message.plain, o.message.full)
    }
    assert deltas["a"].error_code == "internal_error"
    assert deltas["b"].token_ids == (7,)
    assert [o.message for o in out if o.side == "worker"] == [wire.Cancel("a")]


def test_a_worker_that_names_ever_more_blocks_does_not_fill_the_routers_memory() -> None:
    core = router()
    most = 0
    for seq in range(60):
        names = np.arange(2000 * seq, 2000 * (seq + 1), dtype="<u8").tobytes()
        hear(core, wire.Report(seq, GOOD_LOAD, wire.PrefixDigest(0, seq, ((names, b""),))))
        most = max(most, len(core.prefixes))
    assert most <= 42_000
    assert any(isinstance(o.message, wire.RepeatPrefixes) for o in core.take())


def test_a_worker_that_this_engine_did_not_start_is_refused() -> None:
    core = router()
    for worker, epoch, identity in (
        ("w9", "e1", identity_of("w9", "e1")),  # no such worker
        ("w0", "e2", identity_of("w0", "e2")),  # not the process that was started
        ("w0", "e1", identity_of("w0", "e2")),  # not who it says it is
    ):
        for message in (wire.Ready(info(worker, epoch)), wire.Starting(info(worker, epoch), "loading", 0.0)):
            with pytest.raises(wire.ProtocolError, match="not started by this engine"):
                hear(core, message, identity=identity)
    assert list(core.workers.by_id) == ["w0"]
    core.on_client(CLIENT, wire.Submit(request()), 0.0)
    assert [o.identity for o in core.take() if isinstance(o.message, wire.Dispatch)] == [identity_of("w0", "e1")]


def test_the_process_that_replaces_a_dead_one_is_taken_and_the_dead_one_is_not() -> None:
    core = router()
    core.on_worker_exited("w0", "e1", "killed", 1, 0.0, next_epoch="e2")
    with pytest.raises(wire.ProtocolError):
        hear(core, wire.Ready(info()))
    hear(core, wire.Ready(info(epoch="e2")), identity=identity_of("w0", "e2"))
    assert core.workers.by_id["w0"].state is wire.WorkerState.READY


def test_an_info_that_cannot_be_true_is_refused() -> None:
    core = router()
    for wrong in ({"block_size": -1}, {"max_model_len": 2**60}, {"device": "x" * 10_000}):
        with pytest.raises(wire.ProtocolError):
            hear(core, wire.Ready(msgspec.structs.replace(info(), **wrong)))


def test_another_version_of_the_protocol_is_refused_by_name() -> None:
    core = router()
    words = f"speaks version 1 of the protocol, the router version {wire.PROTOCOL_VERSION}"
    with pytest.raises(wire.ProtocolError, match=words):
        core.on_client(CLIENT, wire.Hello(protocol=1), 0.0)
    (answer,) = core.take()
    assert (answer.side, answer.identity) == ("client", CLIENT)
    assert isinstance(wire.decode_for_client(wire.encode(answer.message)), wire.Refused)
    for message in (wire.Ready(info(), protocol=1), wire.Starting(info(), "loading", 0.0, protocol=1)):
        with pytest.raises(wire.ProtocolError, match=words):
            hear(core, message)
        (answer,) = core.take()
        assert isinstance(wire.decode_for_worker(wire.encode(answer.message)), wire.Refused)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_frame_makes_the_router_raise_or_a_request_of_others_hang(policy: str) -> None:
    """`python -m tests.chaos.fuzz` throws more."""
    seed = sum(map(ord, policy))
    fuzz = Fuzz(seed, policy)
    fuzz.run(300)
    assert fuzz.refused > 100, f"seed {seed}"


@pytest.fixture
def broker(tmp_path: Path) -> tuple[str, str, queue.SimpleQueue[BaseException]]:
    """The endpoints of a broker that runs in a thread, and what it raised."""
    front, back = f"ipc://{tmp_path}/front", f"ipc://{tmp_path}/back"
    core = RouterCore(LeastRequests(), [wire.WorkerInfo("w0", "e1", 0, "cpu", "m")], epoch="r")
    running = Broker(core, front, back, 0.05)
    raised: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            running.run()
        except BaseException as error:
            raised.put(error)

    threading.Thread(target=run, daemon=True).start()
    return front, back, raised


def dealer(endpoint: str, identity: bytes | None = None) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVTIMEO, 10_000)
    if identity is not None:
        socket.set(zmq.IDENTITY, identity)
    socket.connect(endpoint)
    return socket


def test_frames_of_strangers_on_both_sockets_do_not_disturb_a_request(broker: tuple[str, str, Any]) -> None:
    front, back, raised = broker
    strangers = [dealer(front), dealer(back)]
    client, worker = dealer(front), dealer(back, identity_of("w0", "e1"))
    worker.send(wire.encode(wire.Ready(info())))
    client.send(wire.encode(wire.Hello()))
    for socket in strangers:
        for frame in FRAMES.values():
            socket.send(frame)
            socket.send_multipart([frame, frame])
    client.send(wire.encode(wire.Submit(request())))
    while not isinstance(message := wire.decode_for_worker(worker.recv()), wire.Dispatch):
        pass
    end = TokenDelta(message.request.request_id, (5,), finish_reason="length")
    worker.send(wire.encode(wire.WorkerDeltas((), (end,))))
    while not isinstance(answer := wire.decode_for_client(client.recv()), wire.Deltas):
        pass
    assert answer.full == (end,)
    assert raised.empty()
    for socket in (*strangers, client, worker):
        socket.close()


def test_the_sockets_are_for_this_user_alone(broker: tuple[str, str, Any]) -> None:
    for endpoint in broker[:2]:
        mode = stat.S_IMODE(Path(endpoint.removeprefix("ipc://")).stat().st_mode)
        assert mode & 0o077 == 0, oct(mode)
