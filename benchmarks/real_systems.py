"""The servers that benchmarks/real.py compares, one at work at a time, and the neighbours that disturb them.

A server that is not measured is stopped with SIGSTOP, all its processes at once, and goes on with SIGCONT: starting
anew for each run would take longer than the run, and an idle server still reports and looks for work.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from nexusengine.errors import Unavailable
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.server import own_server
from nexusengine.process.parent_death import set_parent_death_signal

LLAMA = "llama-server"
NOISES = {"quiet": 0, "busy": 2}
"""Neighbours."""
_START_S, _END_S = 300.0, 20.0


@dataclass(frozen=True, slots=True)
class System:
    """What is compared.

    Attributes:
        name: of the row in the table.
        layout: devices of our server; empty for a server of others, which takes the machine as it likes.
        scheduler, router: of ours.
        told: whether its requests carry the SLO.
        noise: for which it is; empty for all.
    """

    name: str
    layout: str = ""
    scheduler: str = ""
    router: str = ""
    told: bool = False
    noise: str = ""

    @property
    def server(self) -> str:
        """The same for systems that one server can be: they differ in what requests say."""
        return f"{self.scheduler}/{self.router} {self.layout}" if self.layout else f"{self.name} {self.noise}"


def systems_of(layouts: Sequence[str], scheduler: str, baseline: str, noises: Sequence[str]) -> list[System]:
    """LENS + PRISM with SLO and without, and the baseline, which reads no SLO, for each layout; llama-server as each
    noise wants it."""
    found = []
    for layout in layouts:
        found += [
            System("lens + prism, SLO", layout, scheduler, "prism", told=True),
            System("lens + prism, nothing said", layout, scheduler, "prism"),
            System("fcfs + round-robin", layout, baseline, "round-robin"),
        ]
    return [*found, *(System(LLAMA, noise=noise) for noise in noises)]


@dataclass(slots=True)
class Server:
    """A server that runs. processes: all of it."""

    target: Target
    model: str | None
    processes: list[psutil.Process] = field(default_factory=list)

    def pause(self) -> None:
        """Raises Unavailable if a process does not stop."""
        self._send(signal.SIGSTOP)
        until_s = time.monotonic() + _END_S
        while not all(map(_stopped, self.processes)):
            if time.monotonic() > until_s:
                raise Unavailable(f"{self.target.url} does not stop")
            time.sleep(0.001)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def our_server(options: Sequence[str]) -> Iterator[Server]:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with own_server(options) as url:
        mine = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        server = Server(Target(url), "smollm2-135m", mine)
        try:
            yield server
        finally:
            server.resume()  # what is stopped does not end


@contextlib.contextmanager
def llama_server(binary: Path, options: Sequence[str], port: int, environ: dict[str, str]) -> Iterator[Server]:
    """Raises Unavailable if it ends or is not ready in time."""
    process = subprocess.Popen(
        [str(binary), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environ,
        preexec_fn=partial(set_parent_death_signal, signal.SIGKILL),
    )
    url = f"http://127.0.0.1:{port}"
    server = Server(Target(url), None, [psutil.Process(process.pid)])
    try:
        _wait_for(url, process)
        yield server
    finally:
        server.resume()
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise Unavailable(f"llama-server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (OSError, urllib.error.HTTPError):
            pass
        time.sleep(0.1)
    raise Unavailable(f"llama-server was not ready after {_START_S:g} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without pause, at the usual priority."""
    spin = [sys.executable, "-c", "while True: pass"]
    started = [
        subprocess.Popen(spin, preexec_fn=partial(set_parent_death_signal, signal.SIGKILL)) for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
