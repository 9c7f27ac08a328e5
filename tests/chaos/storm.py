"""A storm: workers and the router of a loaded server are killed, stopped and slowed in random order.

    python -m tests.chaos.storm --seconds 300 --seed 1

Under load on emulated devices. Afterwards every request must have ended in a complete answer or a clear error, none
with more tokens than it asked for, none after its deadline; ledger, queues and KV must be back at zero; and what was
sent from ten seconds after the last fault on must be served as what was sent before the first one. The exit status
says whether all this held.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import psutil

from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import items_of
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.report import verdict
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ServerInfo
from nexusengine.sim.workload.build import Builder, WorkloadSpec

DEVICES = "emulated:h100,emulated:a100,emulated:a100,emulated:l4,emulated:l4"
OPTIONS = ("--devices", DEVICES, "--scheduler", "lens", "--router", "prism", "--max-restarts", "1000")
DEADLINE_S = 20.0
CLEAR = ("worker_lost", "unavailable", "overloaded", "deadline_exceeded")
KINDS = ("kill", "stop", "slow", "router")
CALM_S, RECOVERED_AFTER_S = 8.0, 10.0
_MOST_LOST = 0.1
_MOST_KILLS = 3  # of one process: the pause before a restart doubles with each


@dataclass
class Result:
    """faults: (seconds since the beginning, what). unclear: errors that say too little. before, after: attainment of
    what was sent before the first fault, and from RECOVERED_AFTER_S after the last. rest: what was not zero at the
    end."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[float, str]] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    too_long: int = 0
    wrong_length: int = 0
    before: float = 0.0
    after: float = 0.0
    rest: dict[str, float] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """Which of the promises did not hold, in words."""
        found = [f"an unclear error: {error}" for error in sorted(set(self.unclear))]
        if self.too_long:
            found.append(f"{self.too_long} requests ended after their deadline")
        if self.wrong_length:
            found.append(f"{self.wrong_length} answers have another length than was asked for")
        found += [f"{name} is {value:g} at the end" for name, value in self.rest.items()]
        if not self.after >= self.before - _MOST_LOST:
            found.append(f"attainment was {self.before:.3f} before and is {self.after:.3f} after")
        return found


class Tormentor(threading.Thread):
    """Does harm to the children of a supervisor from `CALM_S` until `until_s` after its start."""

    def __init__(self, supervisor: psutil.Process, seed: int, until_s: float) -> None:
        super().__init__(daemon=True, name="tormentor")
        self.faults: list[tuple[float, str]] = []
        self.began_s = time.monotonic()
        self._supervisor, self._until_s = supervisor, until_s
        self._rng = np.random.default_rng(seed)
        self._kills: Counter[str] = Counter()

    def run(self) -> None:
        self._wait(CALM_S)
        while time.monotonic() - self.began_s < self._until_s:
            kind = KINDS[int(self._rng.integers(len(KINDS)))]
            role = "router.broker" if kind == "router" else "worker.worker"
            found = self._children(role)
            if found:
                self._harm(kind, role, found[int(self._rng.integers(len(found)))])
            self._wait(float(self._rng.uniform(1.5, 4.0)))

    def _harm(self, kind: str, role: str, victim: psutil.Process) -> None:
        slot = f"{role}{self._children(role).index(victim)}" if victim in self._children(role) else role
        if kind in ("kill", "router"):
            if self._kills[slot] == _MOST_KILLS:
                return
            self._kills[slot] += 1
        self.faults.append((time.monotonic() - self.began_s, f"{kind} {slot}"))
        try:
            if kind in ("kill", "router"):
                victim.kill()
            elif kind == "stop":
                self._stopped(victim, float(self._rng.uniform(0.5, 6.0)))
            else:
                for _ in range(30):  # half the time
                    self._stopped(victim, 0.05)
                    time.sleep(0.05)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass  # it ended by itself meanwhile, which is no concern of ours

    def _stopped(self, victim: psutil.Process, seconds: float) -> None:
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(victim.pid, signal.SIGCONT)

    def _children(self, role: str) -> list[psutil.Process]:
        found = []
        for child in self._supervisor.children():
            try:
                if any(role in word for word in child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda p: p.pid)

    def _wait(self, seconds: float) -> None:
        time.sleep(seconds)


def storm(
    url: str,
    supervisor: int,
    rest: Callable[[], dict[str, float]],
    *,
    seconds: float,
    rate_rps: float,
    seed: int,
) -> Result:
    """Run it against a server that is ready. supervisor: its process id. rest: what of ledger, queues and KV is not
    zero, by name."""
    calm_after_s = RECOVERED_AFTER_S + CALM_S
    spec = WorkloadSpec(
        trace="lengths:input=logn:300:1200,output=logn:60:150",
        arrivals="poisson",
        rate_rps=rate_rps,
        duration_s=seconds,
        classes="mixed",
        seed=seed,
        max_tokens=4096,
    )
    items = items_of(Builder(spec).build())
    tormentor = Tormentor(psutil.Process(supervisor), seed, seconds - calm_after_s)
    tormentor.start()
    info = ServerInfo(None, 4096, None)
    records = offer(Target(url, None), items, info, seed=seed, bounds=True, timeout_s=DEADLINE_S + 15.0).records
    tormentor.join(30.0)
    return judge(records, tormentor.faults, rest)


def judge(records: list[Record], faults: list[tuple[float, str]], rest: Callable[[], dict[str, float]]) -> Result:
    result = Result(faults=faults)
    began_s = min(r.intended_s - r.item.send_at_s for r in records)
    first_s, last_s = faults[0][0], faults[-1][0] + RECOVERED_AFTER_S
    before, after = [], []
    for record in records:
        result.ends[record.error or "complete"] += 1
        if record.error is None:
            result.wrong_length += record.output_tokens != record.item.output_tokens
        elif not any(word in record.error for word in CLEAR):
            result.unclear.append(f"{record.error} (HTTP {record.status})")
        result.too_long += not record.ended_s - record.intended_s < DEADLINE_S + 5.0
        at_s = record.intended_s - began_s
        if at_s + 3.0 < first_s:  # and was answered by then
            before.append(verdict(record).met)
        elif at_s >= last_s:
            after.append(verdict(record).met)
    result.before, result.after = float(np.mean(before)), float(np.mean(after))
    until_s = time.monotonic() + 10.0
    while (left := rest()) and time.monotonic() < until_s:
        time.sleep(0.2)
    result.rest = left
    return result


def main() -> None:
    from nexusengine.loadgen.server import own_server
    from tests.conftest import Served

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    before = {p.pid for p in psutil.Process().children()}
    with own_server([*OPTIONS, "--request-timeout", str(DEADLINE_S)]) as url:
        (supervisor,) = [p for p in psutil.Process().children() if p.pid not in before]
        served = Served(url, None, None)  # type: ignore[arg-type]
        result = storm(
            url, supervisor.pid, lambda: left_over(served), seconds=args.seconds, rate_rps=args.rate, seed=args.seed
        )
    for at_s, what in result.faults:
        print(f"{at_s:6.1f} s  {what}")
    print(f"ends: {dict(result.ends)}")
    print(f"unclear: {dict(Counter(result.unclear))}; wrong length: {result.wrong_length}")
    print(f"past their deadline: {result.too_long}")
    print(f"attainment before {result.before:.3f}, after {result.after:.3f}; left over: {result.rest}")
    for what in result.broken():
        print(f"BROKEN: {what}")
    print(f"{len(result.faults)} faults: {'BROKEN' if result.broken() else 'every promise held'}")
    sys.exit(1 if result.broken() else 0)


def left_over(served: object) -> dict[str, float]:
    """What of ledger, queues and KV is not zero."""
    names = ("router_ledger", "router_held", "worker_running", "worker_waiting", "worker_kv_used_blocks")
    found: dict[str, float] = {}
    for name in names:
        for worker, value in served.metric(f"nexusengine_{name}").items():  # type: ignore[attr-defined]
            if value:
                found[f"{name} {worker}"] = value
    return found


if __name__ == "__main__":
    main()
