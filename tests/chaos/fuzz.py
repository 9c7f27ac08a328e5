"""Throws frames at the router that no peer of ours would send, between those of a client and a worker that behave.

    python -m tests.chaos.fuzz --frames 100000 --seed 1

Random bytes, valid frames with bytes changed, and valid frames with nonsensical values, from processes that the router
knows and from others. The router may answer with ProtocolError only, what it sends must be readable by whom it is for,
and every request of the client that behaves must end exactly once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from nexusengine import wire
from nexusengine.perf.registry import make_model
from nexusengine.router.core import RouterCore
from nexusengine.router.placement.registry import POLICIES, make_policy
from nexusengine.types import SLO, EngineRequest, SamplingParams, Service, Timings, TokenDelta
from nexusengine.wire import identity_of

GOOD_CLIENT, BAD_CLIENT, NOBODY = b"good client", b"bad client", b"nobody"
GOOD, BAD = identity_of("w0", "e0"), identity_of("w1", "e1")
LIFETIME_S = 5.0
MODELS = [make_model(name).snapshot() for name in ("online", "paper-surface", "line")]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**63 - 1, -(2**63), 2**64 - 1, 0.0, -0.0, -1.0, 1e-320, 1e308, -1e308,
    math.nan, math.inf, -math.inf, "", "w0", "w1", "error", "length", "\x00\n", "x" * 5000, b"", b"\xff" * 7, b"x" * 40,
    [], [[]], {}, {"a": 1}, [None] * 70, ["w0", "e9", 1, "cpu", "m"], [1] * 1000, {str(i): 1.0 for i in range(2000)},
)  # fmt: skip


def info(worker: str, epoch: str) -> wire.WorkerInfo:
    return wire.WorkerInfo(
        worker, epoch, 1, "cpu", "m", max_model_len=4096, max_batch_tokens=512, block_size=16, kv_total_blocks=1000,
        scheduler="lens", max_waiting=100,
    )  # fmt: skip


def request(name: str, now: float, rng: random.Random) -> EngineRequest:
    slo = rng.choice([None, SLO(0.5, 0.05), SLO(30.0, 0.5)])
    sampling = SamplingParams(seed=1, max_tokens=rng.randrange(1, 50))
    prompt = [rng.randrange(5)] * rng.randrange(1, 300)
    return EngineRequest(name, prompt, sampling, now, slo=slo, deadline_s=now + LIFETIME_S)


def load(last_dispatch_seq: int, now: float, rng: random.Random) -> wire.WorkerLoad:
    s = rng.choice(MODELS)
    pending = tuple(wire.PendingPrefill(now + i, 100, 5, 0.05, bool(i % 2)) for i in range(rng.randrange(4)))
    return wire.WorkerLoad(
        last_dispatch_seq, running=3, waiting=2, kv_used_blocks=10, kv_total_blocks=1000, decodes=2,
        decode_kv_tokens=200, tightest_tpot_s=0.05, pending=pending, pending_tokens=400, mean_output_tokens=20.0,
        perf=s, counters={"steps": 5.0},
    )  # fmt: skip


class Fuzz:
    """A router, a client and a worker that behave, and a source of frames from others. ends: of the good client's
    requests; refused: how many frames were; served: how many requests the good worker answered."""

    def __init__(self, seed: int, policy: str = "prism") -> None:
        self.rng = random.Random(seed)
        expected = [wire.WorkerInfo(w, e, 0, "cpu", "m") for w, e in (("w0", "e0"), ("w1", "e1"))]
        self.core = RouterCore(make_policy(policy), expected, epoch="r", block_hashes=self._names)
        self.now, self.sent, self.seq = 100.0, 0, 0
        self.open: set[str] = set()
        self.ends: Counter[str] = Counter()
        self.refused = self.served = self.frames = 0
        self.seen = {GOOD: 0, BAD: 0}
        for identity, name in ((GOOD, info("w0", "e0")), (BAD, info("w1", "e1"))):
            self.core.on_worker(identity, wire.Ready(name), self.now)
        for client in (GOOD_CLIENT, BAD_CLIENT):
            self.core.on_client(client, wire.Hello(), self.now)

    @staticmethod
    def _names(request: EngineRequest, block_size: int) -> list[bytes]:
        return [bytes([request.prompt_token_ids[0] % 251] * 16)] * (len(request.prompt_token_ids) // block_size)

    # ---- those that behave ---------------------------------------------------------------------------------------

    def turn(self) -> None:
        """The good client asks, the good worker reports, time passes."""
        self.now += 0.05
        name = f"good-{self.sent}"
        self.sent += 1
        self.open.add(name)
        self.core.on_client(GOOD_CLIENT, wire.Submit(request(name, self.now, self.rng), self.sent), self.now)
        self.settle()
        self.seq += 1
        report = wire.Report(self.seq, load(self.seen[GOOD], self.now, self.rng))
        self.core.on_worker(GOOD, report, self.now)
        self.core.prepare(self.now)
        self.core.on_timer(self.now)
        self.settle()

    def settle(self) -> None:
        while out := self.core.take():
            for o in out:
                frame = wire.encode(o.message)
                if o.side == "client":
                    self.client_gets(o.identity, wire.decode_for_client(frame))
                else:
                    self.worker_gets(o.identity, wire.decode_for_worker(frame))

    def client_gets(self, identity: bytes, message: wire.ToClient) -> None:
        if identity != GOOD_CLIENT or not isinstance(message, wire.Deltas):
            return
        for delta in wire.join_deltas(message.plain, message.full):
            assert delta.request_id in self.open, "news of a request that has ended, or was never made"
            if delta.finish_reason is not None:
                self.open.remove(delta.request_id)
                self.ends[delta.error_code or delta.finish_reason] += 1

    def worker_gets(self, identity: bytes, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Reregister) and identity == BAD:
            self.core.on_worker(BAD, wire.Ready(info("w1", "e1")), self.now)
        elif isinstance(message, wire.Dispatch) and identity == GOOD:
            self.seen[GOOD] = message.seq
            self.served += message.request.request_id in self.open
            end = TokenDelta(message.request.request_id, (1, 2), finish_reason="length")
            self.core.on_worker(GOOD, wire.WorkerDeltas((), (end,)), self.now)

    # ---- those that do not ---------------------------------------------------------------------------------------

    def start_anew(self) -> None:
        """The bad worker is in good order again, so that its next nonsense counts."""
        self.core.on_worker_exited("w1", "e1", "killed", 1, self.now, next_epoch="e1")
        self.core.on_worker(BAD, wire.Ready(info("w1", "e1")), self.now)
        self.core.on_worker(BAD, wire.Report(0, load(0, self.now, self.rng)), self.now)
        self.settle()

    def throw(self) -> None:
        """One frame from somebody who does not behave."""
        self.frames += 1
        on_client_side = self.rng.random() < 0.4
        valid = self.valid_of_client() if on_client_side else self.valid_of_worker()
        frame = self.rng.choices([self.noise, self.changed, self.nonsense], [1, 3, 6])[0](valid)
        identity = self.rng.choice(
            [BAD_CLIENT, NOBODY] if on_client_side else [BAD, BAD, NOBODY, identity_of("w9", "e")]
        )
        for decode in (wire.decode_for_client, wire.decode_for_worker):  # no reader may raise anything else
            with contextlib.suppress(wire.ProtocolError):
                decode(frame)
        take: Callable[[], None]
        if on_client_side:
            take = lambda: self.core.on_client(identity, wire.decode_from_client(frame), self.now)  # noqa: E731
        else:
            take = lambda: self.core.on_worker(identity, wire.decode_from_worker(frame), self.now)  # noqa: E731
        try:
            take()
        except wire.ProtocolError:
            self.refused += 1
        self.settle()

    def noise(self, valid: wire.Message) -> bytes:
        return self.rng.randbytes(self.rng.randrange(0, 60))

    def some_name(self) -> str:
        return self.rng.choice([*sorted(self.open)[:1], f"good-{self.sent - 1}", "bad", f"bad-{self.frames - 1}"])

    def valid_of_client(self) -> wire.Message:
        return self.rng.choice([
            wire.Hello(submitted=3),
            wire.Submit(request(f"bad-{self.frames}", self.now, self.rng), 5),
            wire.Abort(self.some_name()),
            wire.DebugQuery(3, 4, "bad"),
        ])  # fmt: skip

    def valid_of_worker(self) -> wire.Message:
        rng, name = self.rng, self.some_name()
        timings, service = Timings(1.0, 2.0, 3.0), Service("w1", 0.7)
        delta = TokenDelta(name, (5,), timings=timings, service=service, finish_reason=rng.choice([None, "stop"]))
        digest = wire.PrefixDigest(rng.randrange(3), self.frames, ((rng.randbytes(80), rng.randbytes(16)),))
        return rng.choice([
            wire.Ready(info("w1", "e1"), ("bad",)),
            wire.Report(self.frames + 1, load(self.frames, self.now, rng), digest),
            wire.Report(self.frames + 1, load(self.frames, self.now, rng)),
            wire.WorkerDeltas(((name, (3,)),), (delta,)),
            rng.choice([wire.Leaving(), wire.Starting(info("w1", "e1"), "loading", 0.5)]),
            wire.DebugReply(rng.choice([GOOD_CLIENT, BAD_CLIENT]), 1, "w1"),
        ])  # fmt: skip

    def changed(self, valid: wire.Message) -> bytes:
        frame = bytearray(wire.encode(valid))
        for _ in range(self.rng.randrange(1, 4)):
            at = self.rng.randrange(len(frame))
            what = self.rng.randrange(4)
            if what == 0:
                frame[at] = self.rng.randrange(256)
            elif what == 1:
                frame[at] ^= 1 << self.rng.randrange(8)
            elif what == 2 and len(frame) > 1:
                del frame[at:]
            else:
                frame[at:at] = frame[at : at + self.rng.randrange(1, 30)]
            if not frame:
                break
        return bytes(frame)

    def nonsense(self, valid: wire.Message) -> bytes:
        tree = msgspec.msgpack.decode(wire.encode(valid))
        for _ in range(self.rng.randrange(1, 3)):
            self.spoil(tree)
        return msgspec.msgpack.encode(tree)

    def spoil(self, tree: list[Any]) -> None:
        """Put another value somewhere into it, anywhere but in the place of its tag."""
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(1 if node is tree else 0, len(node)))
            if not keys:
                return
            key = self.rng.choice(keys)
            if isinstance(node[key], list | dict) and node[key] and self.rng.random() < 0.8:
                node = node[key]
            else:
                alike = [v for v in VALUES if type(v) is type(node[key])]
                node[key] = copy.deepcopy(self.rng.choice(alike if alike and self.rng.random() < 0.8 else VALUES))
                return

    def run(self, frames: int) -> None:
        with np.errstate(all="ignore"):
            for n in range(frames):
                if n % 1000 == 0:
                    self.start_anew()
                if n % 10 == 0:
                    self.turn()
                self.throw()
            for _ in range(int((LIFETIME_S + 3.0) / 0.05)):  # what the bad worker took ends at its deadline
                self.now += 0.05
                self.seq += 1
                self.core.on_worker(GOOD, wire.Report(self.seq, load(self.seen[GOOD], self.now, self.rng)), self.now)
                self.core.on_client(GOOD_CLIENT, wire.Hello(submitted=self.sent), self.now)
                self.core.on_timer(self.now)
                self.settle()
        assert not self.open, f"{len(self.open)} requests did not end"
        assert self.served > 0.2 * self.sent, f"only {self.served} of {self.sent} requests were served"
        assert self.ends["length"] >= self.served - self.ends["internal_error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    names = sorted(POLICIES)
    for i, policy in enumerate(names):
        fuzz = Fuzz(args.seed + i, policy)
        try:
            fuzz.run(args.frames // len(names))
        finally:
            print(f"{policy}: {fuzz.frames} frames, {fuzz.refused} refused, requests: {dict(fuzz.ends)}", flush=True)


if __name__ == "__main__":
    main()
