"""Processor time of a worker for each step, by part: planning, bookkeeping, messages. Nothing is computed.

    python -m benchmarks.step_cost [--sizes 1 32 128 256] [--loads decodes traffic] [--policy lens] [--json FILE]

The worker's own turn (receive, step, send) runs in this thread, with an engine core, an emulated device and a router's
socket that throws away what comes. The device does not sleep: only the core's clock is moved on by what its step would
take. Two loads: decodes alone, and traffic, where every answer that ends is followed by a new prompt. The total is
measured without timers; parts are measured in a second run, each without the parts inside it. The threads that report
and that write to sockets are left out, and shown below as what a report costs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from nexusengine import wire
from nexusengine.clock import VirtualClock
from nexusengine.config import EngineConfig, parse_device
from nexusengine.core import engine_core
from nexusengine.core.engine_core import EngineCore
from nexusengine.core.first_token import FirstTokens
from nexusengine.core.history import History
from nexusengine.core.in_flight import InFlightStep
from nexusengine.core.published_load import PublishedLoad
from nexusengine.execute.batch import StepResult
from nexusengine.execute.emulated import EmulatedExecutor
from nexusengine.execute.factory import make_executor
from nexusengine.loading.resolve import resolve_model
from nexusengine.perf.online import OnlineModel
from nexusengine.scheduler import scheduler
from nexusengine.scheduler.baselines.fcfs import FCFS
from nexusengine.scheduler.lens.policy import Lens
from nexusengine.scheduler.scheduler import Scheduler
from nexusengine.slo.classes import CLASSES, MIXED
from nexusengine.types import EngineRequest, SamplingParams
from nexusengine.worker.build import executor_options, make_core
from nexusengine.worker.gpu import Telemetry
from nexusengine.worker.link import RouterLink
from nexusengine.worker.worker import prefix_digest, serve_turn, with_memory

LOADS = ("decodes", "traffic")
_INFO = wire.WorkerInfo("w0", "e1", os.getpid(), "emulated", "m")
_WARM_STEPS, _REPORTS = 100, 200
_NEVER_S = 3600.0

PARTS: tuple[tuple[str, object, str], ...] = (
    ("receive", RouterLink, "receive"),
    ("new requests", EngineCore, "add"),
    ("schedule: view, prefix cache", Scheduler, "schedule"),
    ("schedule: policy", Lens, "plan"),
    ("schedule: policy", FCFS, "plan"),
    ("schedule: check of the plan", scheduler, "plan_problem"),
    ("schedule: KV blocks", Scheduler, "_place"),
    ("first tokens predicted", FirstTokens, "planned"),
    ("batch", engine_core, "step_batch"),
    ("submit", EmulatedExecutor, "submit"),
    ("columns moved on", EngineCore, "_advance"),
    ("history", History, "planned"),
    ("tokens", EngineCore, "_apply"),
    ("step-time model", OnlineModel, "observe"),
    ("load published", PublishedLoad, "publish"),
    ("record of the step", InFlightStep, "record"),
    ("send", RouterLink, "send_split"),
)
"""What each is called, its owner, and the function."""
NAMES = tuple(dict.fromkeys(name for name, _, _ in PARTS))


class Parts:
    """Timers around functions; a function's own time is what it takes without those inside it. Nanoseconds."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._inner: list[int] = []

    def watch(self, part: str, owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self._inner.append(0)
            began = time.thread_time_ns()
            try:
                return plain(*args, **options)
            finally:
                took = time.thread_time_ns() - began
                self.spent[part] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, name, timed)


class Bench:
    """A worker without a process of its own, and the router's end of its socket.

    Args:
        folder: for the socket.
        device, policy: an emulated one, and how it is scheduled.
        running: how many requests decode.
        load: "decodes" or "traffic".
    """

    def __init__(self, folder: Path, device: str, policy: str, running: int, load: str) -> None:
        self._rng, self._traffic, self._names = np.random.default_rng(1), load == "traffic", 0
        config = EngineConfig(max_running=256, scheduler=policy)
        executor = make_executor(
            resolve_model("smollm2-135m", weights=False), parse_device(device), executor_options(config)
        )
        clock = VirtualClock(1000.0)

        def collect() -> StepResult:
            result, _ = executor._in_flight.popleft()  # type: ignore[attr-defined]
            clock.advance(result.device_s)
            return result  # type: ignore[no-any-return]

        executor.collect = collect  # type: ignore[method-assign]
        self.core = make_core(executor, config, clock)
        self._router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        endpoint = f"ipc://{folder}/{running}-{load}-{id(self)}"
        self._router.bind(endpoint)
        self.link = RouterLink(endpoint, _INFO, _NEVER_S)
        self.link.ready(_INFO, with_memory(self.core.load), self.core.request_ids, prefix_digest(self.core))
        self._identity: bytes = self._router.recv_multipart()[0]
        self._telemetry = Telemetry({})
        self._send(running)
        while self.core.scheduler.waiting or self.core.room == 0 or len(self._decodes()) < running:
            self.turn()
            if self._traffic and self.core.stats().steps > _WARM_STEPS:
                break

    def _decodes(self) -> np.ndarray:
        c, running = self.core.scheduler.columns, self.core.scheduler.view().running
        decoding: np.ndarray = running[c.generated_tokens[running] > 0]
        return decoding

    def _send(self, requests: int) -> None:
        """Dispatch new ones; the first of traffic are at any place of their answers."""
        begun = self._names == 0
        for _ in range(requests):
            self._names += 1
            slo_class = CLASSES[str(self._rng.choice(list(MIXED), p=list(MIXED.values())))]
            prompt_tokens = int(self._rng.integers(64, 1024 if self._traffic else 192))
            output_tokens = int(self._rng.integers(1 if begun else 64, 448)) if self._traffic else 7000
            request = EngineRequest(
                f"r{self._names:08}-0000-0000",
                self._rng.integers(10, 30_000, prompt_tokens).tolist(),
                SamplingParams(seed=self._names, max_tokens=output_tokens),
                self.core.clock.now(),
                eos_token_ids=(0, 2),
                slo=slo_class.slo(prompt_tokens),
                slo_class=slo_class.name,
            )
            self._router.send_multipart([self._identity, wire.encode(wire.Dispatch(self._names, request))])
        while len(self.link.inbox) < requests:
            self.link.wait(0.1)

    def turn(self) -> int:
        """Nanoseconds of this thread for a turn of the worker."""
        began = time.thread_time_ns()
        serve_turn(self.core, self.link, self._telemetry, None)
        took = time.thread_time_ns() - began
        ended = 0
        while self._router.poll(0):
            message = wire.decode_from_worker(self._router.recv_multipart()[1])
            if isinstance(message, wire.WorkerDeltas):
                ended += sum(delta.finish_reason is not None for delta in message.full)
        if ended:
            self._send(ended)
        return took

    def report_us(self) -> float:
        """Microseconds for a report of the load, as the link's thread makes it."""
        began = time.thread_time_ns()
        for _ in range(_REPORTS):
            wire.encode(self.link._heartbeat())
        return (time.thread_time_ns() - began) / _REPORTS / 1000

    def close(self) -> None:
        self.link.leave("measured")
        self._router.close(0)


def measure(args: argparse.Namespace, folder: Path, running: int, load: str, parts: Parts | None) -> dict[str, float]:
    """Microseconds a step: of each part, or in total where nothing is watched."""
    bench = Bench(folder, args.device, args.policy, running, load)
    for _ in range(_WARM_STEPS):
        bench.turn()
    if parts is not None:
        parts.spent.clear()
    took = [bench.turn() for _ in range(args.steps)]
    scale = 1.0 / args.steps / 1000
    found = {part: ns * scale for part, ns in parts.spent.items()} if parts else {"report": bench.report_us()}
    bench.close()
    return found | {"total": sum(took) * scale, "median": float(np.median(took)) / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--loads", nargs="+", default=LOADS, choices=LOADS)
    parser.add_argument("--device", default="emulated:h100")
    parser.add_argument("--policy", default="lens", help="lens or fcfs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cells = [(running, load) for load in args.loads for running in args.sizes]
    totals: dict[tuple[int, str], dict[str, float]] = {}
    by_part: dict[tuple[int, str], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for cell in cells:
            runs = [measure(args, folder, *cell, None) for _ in range(args.repeats)]
            totals[cell] = min(runs, key=lambda run: run["total"])
        parts = Parts()
        for part, owner, name in PARTS:
            parts.watch(part, owner, name)
        for cell in cells:
            runs = [measure(args, folder, *cell, parts) for _ in range(args.repeats)]
            by_part[cell] = min(runs, key=lambda run: run["total"])
    print(f"{'us a step':32}" + "".join(f"{running:>7} {load:8}" for running, load in cells))
    for part in NAMES:
        print(f"{part:32}" + "".join(f"{by_part[cell].get(part, 0.0):>9.1f}       " for cell in cells))
    rest = {cell: by_part[cell]["total"] - sum(by_part[cell].get(name, 0.0) for name in NAMES) for cell in cells}
    print(f"{'the rest':32}" + "".join(f"{rest[cell]:>9.1f}       " for cell in cells))
    for name in ("total", "median", "report"):
        title = {"total": "mean, without timers", "median": "median, without timers", "report": "a report"}[name]
        print(f"{title:32}" + "".join(f"{totals[cell][name]:>9.1f}       " for cell in cells))
    if args.json:
        rows = [
            {"running": running, "load": load, **totals[running, load], "parts": by_part[running, load]}
            for running, load in cells
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
