"""Fixtures of all tests: a real `nexusengine serve` in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`serve(option, ...)` starts `nexusengine serve` on a free port, waits until it is ready, and returns its URL."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*options: str, ready_s: float = 120.0) -> str:
        port = free_port()
        log = (tmp_path / f"serve-{port}.log").open("wb")
        command = [sys.executable, "-m", "nexusengine.cli.main", "serve", "--port", str(port), *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        processes.append(process)
        url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + ready_s
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                    return url
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        pytest.fail(f"serve did not become ready:\n{Path(log.name).read_text()}")

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(45)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("serve did not end within 45 s of SIGTERM")
