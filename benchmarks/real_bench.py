"""How real.py and real_sweep.py offer a load to servers: warm, one at a time; alone, as a crowd, in a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import nexusengine
from benchmarks import real_llama
from benchmarks.real_report import Idle, Promise, Run, ended_rps, judge_by, promised, unpromised
from benchmarks.real_systems import Server, System, free_port, llama_server, our_server
from nexusengine.errors import Unavailable
from nexusengine.loadgen.items import WorkItem, items_of
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.report import summary
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ServerInfo
from nexusengine.sim.workload.build import Builder, WorkloadSpec

MODEL, VOCABULARY = "smollm2-135m", 49_152
QUANTIZATION = {"fp32": "none", "int8": "int8"}
SHORT_TOKENS, LONG_TOKENS, ALONE_TOKENS = 16, 512, 64
_PROBE_SEED = 987_654
_IDLE_TIMES, _PROBE_LIMIT_S = 5, 300.0


class Bench:
    """The servers, started, and the load that is offered to them."""

    def __init__(self, args: argparse.Namespace, systems: Sequence[System], servers: dict[str, Server]) -> None:
        self.args, self.systems, self._servers = args, systems, servers
        self._trace = Builder(self._spec(1.0, 1.0, 0))

    def _spec(self, rate_rps: float, duration_s: float, seed: int) -> WorkloadSpec:
        a = self.args
        return WorkloadSpec(a.trace, "poisson", rate_rps, duration_s, seed=seed, max_tokens=a.max_tokens, scale=a.scale)

    def items(self, rate_rps: float, duration_s: float, seed: int) -> list[WorkItem]:
        return items_of(self._trace.with_spec(self._spec(rate_rps, duration_s, seed)).build())

    @contextlib.contextmanager
    def at_work(self, system: System) -> Iterator[Server]:
        """The only one of the servers that runs meanwhile."""
        server = self._servers[system.server]
        server.resume()
        try:
            yield server
        finally:
            server.pause()

    def _offer(
        self, server: Server, items: Sequence[WorkItem], seed: int, limit_s: float = _PROBE_LIMIT_S
    ) -> list[Record]:
        """Send at their times; an answer that is not complete `limit_s` later is a failure."""
        info = ServerInfo(server.model, self.args.max_tokens, VOCABULARY)
        return offer(server.target, items, info, seed=seed, bounds=True, timeout_s=limit_s).records

    def run(self, system: System, items: Sequence[WorkItem], promise: Promise, seed: int) -> dict[str, Any]:
        """The figures of one run, after a few requests that are not measured."""
        wanted = promised(items, promise)
        with self.at_work(system) as server:
            self._offer(server, [WorkItem(0.1 * i, 16 << i, 8) for i in range(4)], _PROBE_SEED, self.args.give_up)
            records = self._offer(server, wanted if system.told else unpromised(items), seed, self.args.give_up)
        judge_by(records, wanted)
        return summary(records)

    # ---- what comes before the runs ------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Prompts of all lengths beside decodes, on every server: every path has run, the step model has seen it."""
        lengths = [int(n) for n in np.geomspace(16, self.args.max_tokens // 2, 8)]
        items = [WorkItem(0.2 * i, n, 24) for i, n in enumerate([*lengths, *reversed(lengths)])]
        for system in {s.server: s for s in self.systems}.values():
            with self.at_work(system) as server:
                _all_answered(system, self._offer(server, items, _PROBE_SEED))

    def idle(self, system: System) -> Idle:
        """Medians of requests that are alone."""
        with self.at_work(system) as server:
            short = self._alone(system, server, SHORT_TOKENS, ALONE_TOKENS)
            long = self._alone(system, server, LONG_TOKENS, 1)
        return Idle(
            SHORT_TOKENS,
            statistics.median(r.ttft_s for r in short),
            LONG_TOKENS,
            statistics.median(r.ttft_s for r in long),
            statistics.median(r.tpot_s for r in short),
        )

    def _alone(self, system: System, server: Server, prompt: int, output: int) -> list[Record]:
        items = [WorkItem(0.0, prompt, output)]
        records = [self._offer(server, items, _PROBE_SEED + k)[0] for k in range(_IDLE_TIMES)]
        _all_answered(system, records)
        return records

    def capacity_rps(self, system: System) -> float:
        """Requests of this trace a second while a queue stands.

        Raises:
            Unavailable: fewer than half of a crowd were answered.
        """
        crowd = unpromised(self.items(100.0, self.args.crowd / 100, _PROBE_SEED))
        with self.at_work(system) as server:
            records = self._offer(server, [replace(i, send_at_s=0.0) for i in crowd], _PROBE_SEED)
        ends = [r.ended_s for r in records if r.completed]
        if len(ends) < len(crowd) / 2:
            raise Unavailable(
                f"{system.name} answered {len(ends)} of a crowd of {len(crowd)} within {_PROBE_LIMIT_S:g} s"
            )
        return ended_rps(ends)


def _all_answered(system: System, records: Sequence[Record]) -> None:
    failed = [r.error for r in records if r.error]
    if failed:
        raise Unavailable(f"{system.name} failed before the runs: {failed[0]}")


# ---- servers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(args: argparse.Namespace, systems: Sequence[System]) -> Iterator[Bench]:
    """All servers, warm and stopped."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, Server] = {}
        for system in systems:
            if system.server not in servers:
                servers[system.server] = stack.enter_context(_server_of(args, system))
                servers[system.server].pause()
                say(f"started {system.server}")
        bench = Bench(args, systems, servers)
        bench.warm_up()
        yield bench


def _server_of(args: argparse.Namespace, system: System) -> contextlib.AbstractContextManager[Server]:
    if not system.layout:
        port = free_port()
        settings = args.llama_settings[system.noise]
        options = real_llama.server_options(settings, args.gguf, args.max_tokens, port)
        environ = real_llama.environment(settings)
        return llama_server(args.binaries / "llama-server", options, port, environ)
    return our_server(
        [
            *("--model", MODEL, "--devices", system.layout, "--quantization", QUANTIZATION[args.weights]),
            *("--scheduler", system.scheduler, "--router", system.router, "--no-prefix-caching"),
            *("--max-model-len", str(args.max_tokens), "--kv-cache-memory", "1GiB", "--log-level", "error"),
        ]
    )


# ---- what both programs take and say --------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", help="lengths of requests")
    parser.add_argument("--scale", type=float, default=4.0, help="divide the trace's lengths by this")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest prompt + output; longer ones are clipped")
    parser.add_argument("--weights", choices=sorted(QUANTIZATION), default="fp32", help="int8: beside Q8_0")
    parser.add_argument("--ttft-factor", type=float, default=5.0, help="of the idle TTFT")
    parser.add_argument("--tpot-factor", type=float, default=3.0, help="of the idle TPOT")
    parser.add_argument("--give-up", type=float, default=60.0, help="seconds after which a request counts as missed")
    parser.add_argument("--crowd", type=int, default=40, help="requests in a probe of the capacity")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each has the next")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "nexusengine" / "peers")
    parser.add_argument("--json", type=Path)


def prepare(args: argparse.Namespace, *, llama: bool = True) -> dict[str, Any]:
    """Build and convert what is missing, and see to it that stopped servers end with us.

    Returns:
        When, where and of what the measurement is made, for its JSON.
    """
    from nexusengine.loading.resolve import resolve_model

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if llama:
        args.binaries = real_llama.installed(args.environments)
        original = Path(resolve_model(MODEL).path)
        args.gguf = real_llama.weights(args.binaries, args.environments, args.weights, original)
    shown = {k: v for k, v in vars(args).items() if isinstance(v, str | int | float | list | dict) or v is None}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": _machine(),
        "versions": {
            "nexusengine": f"{nexusengine.__version__} ({_commit()})",
            "llama-server": f"build {real_llama.BUILD}",
            "python": sys.version.split()[0],
        },
        "settings": shown,
    }


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_gib = round(psutil.virtual_memory().total / 2**30, 1)
    load = round(psutil.getloadavg()[0], 2)
    return {
        "cpu": names[0] if names else os.uname().machine,
        "cores": os.cpu_count(),
        "memory_gib": memory_gib,
        "kernel": os.uname().release,
        "load_before": load,
    }


def _commit() -> str:
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return "no git"
    return git.stdout.strip() or "no checkout"


def line(run: Run) -> str:
    ttft, tpot = run["ttft_ms"], run["tpot_ms"]
    return (
        f"{time.strftime('%H:%M:%S')} {run['round']} {run['noise']:<5} {run['layout'] or 'any':<11} {run['system']:<21}"
        f" {run['load']:.2f} ({run['rate_rps']:.2f}/s) {run['completed']}/{run['offered']} kept "
        f"{100 * run['attainment']:5.1f} % TTFT {ttft['p50']}/{ttft['p99']} TPOT {tpot['p50']}/{tpot['p99']} ms "
        f"{run['output_tokens_per_s']} tokens/s {run['errors'] or ''}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
