"""How the processes of one engine are tied together.

A child reads its configuration as one JSON line on stdin, then control messages, one a line. The end of stdin means
that its parent is gone: it exits at once. Where the parent spawns from its main thread, the kernel also kills the child
when the parent dies. A child says what happened to it as JSON lines on stdout; logs go to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from nexusengine.obs.console import write_line

Message = dict[str, Any]
_PR_SET_PDEATHSIG = 1
_STDERR_LINES_KEPT = 20


# ---- in the child ---------------------------------------------------------------------------------------------------


def _lines() -> Iterator[bytes]:
    """Lines of stdin. Unbuffered: Python's own reader holds a lock that breaks an exit while a thread waits in it."""
    rest = b""
    while chunk := os.read(0, 65_536):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


_stdin = _lines()


def set_parent_death_signal(number: int) -> None:
    """From now on the kernel sends this process signal `number` when the thread that spawned it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def die_with(parent_pid: int) -> None:
    """From now on the kernel kills this process when the thread that spawned it ends, in the process `parent_pid`
    (0: whatever it is)."""
    set_parent_death_signal(signal.SIGKILL)
    if parent_pid not in (0, os.getppid()):  # it died before the signal was armed
        os._exit(1)


def read_config() -> Message:
    """The configuration line; ties this process to its parent's life. Call first, from the main thread."""
    line = next(_stdin, None)
    if line is None:
        os._exit(1)
    config: Message = json.loads(line)
    for number in (signal.SIGINT, signal.SIGTERM):  # service managers reach every process; the supervisor handles it
        signal.signal(number, signal.SIG_IGN)
    if config["parent_death_signal"]:
        die_with(config["parent_pid"])
    return config


def listen(handle: Callable[[Message], None], on_end: Callable[[], None] = lambda: os._exit(0)) -> None:
    """Pass control messages to `handle`, from a thread of their own; at the end of stdin call `on_end`, which must see
    to it that the process ends within a second."""

    def loop() -> None:
        for line in _stdin:
            handle(json.loads(line))
        on_end()

    threading.Thread(target=loop, name="control", daemon=True).start()


def emit(event: Message) -> None:
    """Tell the parent."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


# ---- in the parent --------------------------------------------------------------------------------------------------


def tied(*command: str, by_us: bool = True) -> list[str]:
    """The command, for programs that are not ours: it ends with the thread that runs it. by_us: whether this process
    will run it, or a program that it started."""
    return [sys.executable, "-m", "nexusengine.process.child", str(os.getpid() if by_us else 0), *command]


class Child:
    """A spawned process. on_event(child, message) is called from threads: with what it emits, and once at its end with
    {"type": "exit", "code", "cause"}, cause being its own word or the last lines of its stderr."""

    def __init__(
        self,
        name: str,
        module: str,
        config: Message,
        on_event: Callable[[Child, Message], None],
        *,
        environ: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._on_event = on_event
        self._cause: str | None = None
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES_KEPT)
        self._write_lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environ or {})},
            process_group=0,  # Ctrl-C is for the supervisor alone, also while this one is still being imported
        )
        main_thread = threading.current_thread() is threading.main_thread()
        self.send({**config, "parent_death_signal": main_thread, "parent_pid": os.getpid()})
        self._readers = [
            threading.Thread(target=self._read_events, daemon=True, name=f"{name} stdout"),
            threading.Thread(target=self._read_stderr, daemon=True, name=f"{name} stderr"),
        ]
        for reader in self._readers:
            reader.start()
        threading.Thread(target=self._wait, daemon=True, name=f"{name} exit").start()

    def send(self, message: Message) -> None:
        """A control message; lost if the child has ended."""
        with self._write_lock:
            try:
                self.process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
                self.process.stdin.flush()  # type: ignore[union-attr]
            except (BrokenPipeError, ValueError):
                return  # its end is reported by `exit`

    def close(self) -> None:
        """Ask it to end, by closing its stdin."""
        with self._write_lock:
            try:
                self.process.stdin.close()  # type: ignore[union-attr]
            except BrokenPipeError:
                return

    def kill(self) -> None:
        self.process.kill()

    def _read_events(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            event = _event(line)
            if event is None:
                write_line(f"[{self.name}] {line.decode(errors='replace').rstrip()}")
                continue
            if event.get("type") == "failed":
                self._cause = event["message"]
            self._on_event(self, event)

    def _read_stderr(self) -> None:
        for raw in self.process.stderr:  # type: ignore[union-attr]
            line = raw.decode(errors="replace").rstrip()
            self._stderr.append(line)
            write_line(f"[{self.name}] {line}")

    def _wait(self) -> None:
        code = self.process.wait()
        for reader in self._readers:
            reader.join(2.0)
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        last = f"; its last line: {self._stderr[-1]}" if self._stderr else ""
        self._on_event(self, {"type": "exit", "code": code, "cause": self._cause or ended + last})


def _event(line: bytes) -> Message | None:
    """What a child said; None for a line that something else in it wrote to stdout."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("type"), str) else None


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
