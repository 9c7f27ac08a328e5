"""Fixtures of all tests: a real `nexusengine serve` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # no test fails because a machine is busy
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).parents[1]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell without job control starts what is in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("NEXUSENGINE_NATIVE_ISA", "all")  # the kernels' tests switch between them; servers take the best

os.environ.setdefault("NEXUSENGINE_STEP_TIMES", "none")  # a test's worker neither learns from others nor teaches them


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def runs(process: psutil.Process) -> bool:
    """Whether it is there; one that has ended and that nobody asked for its exit status yet is not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Served:
    """A running `nexusengine serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def workers(self) -> list[dict[str, Any]]:
        """What /startupz says of each worker."""
        with urllib.request.urlopen(f"{self.url}/startupz", timeout=5) as reply:
            workers: list[dict[str, Any]] = json.load(reply)["workers"]
            return workers

    def metric(self, name: str) -> dict[str, float]:
        """Worker id -> value, or "" -> value for a metric without workers."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return {(re.findall(r'worker="(\w+)"', line) or [""])[0]: float(line.split()[-1]) for line in lines}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """`serve(option, ...)` starts `nexusengine serve` on a free port, or the given one, and waits until it is ready.
    port 0: whatever it takes."""
    running: list[Served] = []

    def start(*options: str, ready_s: float = 120.0, port: int | None = None) -> Served:
        port = free_port() if port is None else port
        log = tmp_path / f"serve-{len(running)}.log"
        command = [sys.executable, "-m", "nexusengine.cli.main", "serve", "--port", str(port), *options]
        with log.open("wb") as output:
            served = Served(f"http://127.0.0.1:{port}", subprocess.Popen(command, stdout=output, stderr=output), log)
        running.append(served)
        deadline_s = time.monotonic() + ready_s
        while port == 0 and time.monotonic() < deadline_s:
            time.sleep(0.1)
            if said := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()):
                port = int(said[1])
                served = replace(served, url=f"http://127.0.0.1:{port}")
        while time.monotonic() < deadline_s and served.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{served.url}/readyz", timeout=2):
                    return served
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        pytest.fail(f"serve did not become ready:\n{log.read_text()}")

    yield start
    for served in running:
        served.process.send_signal(signal.SIGTERM)
    for served in running:
        try:
            served.process.wait(45)
        except subprocess.TimeoutExpired:
            served.process.kill()
            pytest.fail(f"serve did not end within 45 s of SIGTERM:\n{served.log.read_text()}")
