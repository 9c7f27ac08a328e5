"""A process of an engine, seen from inside (`read_boot`, `listen`, `send`) and from its parent (`Child`).

A child reads control messages (see `control`) on stdin, one a line, and sends its own on stdout; logs go to stderr. The
end of stdin means that its parent is gone: it exits at once. Where the parent spawns from its main thread, the kernel
also kills the child when the parent dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from nexusengine.obs.console import write_line
from nexusengine.process.control import (
    Boot,
    BootLine,
    ControlError,
    Failed,
    FromChild,
    RouterBoot,
    ServerBoot,
    ToChild,
    WorkerBoot,
    decode_boot,
    decode_from_child,
    decode_to_child,
    encode,
)
from nexusengine.process.parent_death import end_with_parent

_STDERR_LINES_KEPT = 20
B = TypeVar("B", RouterBoot, ServerBoot, WorkerBoot)


# ---- in the child ---------------------------------------------------------------------------------------------------


def _lines() -> Iterator[bytes]:
    """Lines of stdin. Unbuffered: Python's own reader holds a lock that breaks an exit while a thread waits in it."""
    rest = b""
    while chunk := os.read(0, 65_536):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


_stdin = _lines()


def read_boot(kind: type[B]) -> B:
    """How this process is started; also makes it end with its parent. Call first, from the main thread.

    Raises:
        ControlError: it is not of this kind.
    """
    line = next(_stdin, None)
    if line is None:
        os._exit(1)
    first = decode_boot(line)
    for number in (signal.SIGINT, signal.SIGTERM):  # service managers reach every process; the supervisor handles it
        signal.signal(number, signal.SIG_IGN)
    if first.parent_death_signal:
        end_with_parent(first.parent_pid)
    if not isinstance(first.boot, kind):
        raise ControlError(f"a {type(first.boot).__name__} was sent to a process that is started by a {kind.__name__}")
    return first.boot


def listen(handle: Callable[[ToChild], None], on_end: Callable[[], None] = lambda: os._exit(0)) -> None:
    """Pass control messages to `handle`, from a thread of their own. A message that is unknown ends the process.

    Args:
        on_end: called at the end of stdin; must see to it that the process ends within a second.
    """

    def loop() -> None:
        for line in _stdin:
            try:
                message = decode_to_child(line)
            except ControlError as error:
                send(Failed(error.message))
                os._exit(1)
            handle(message)
        on_end()

    threading.Thread(target=loop, name="control", daemon=True).start()


def send(message: FromChild) -> None:
    """Send a message to the parent."""
    sys.stdout.write(encode(message).decode())
    sys.stdout.flush()


# ---- in the parent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exited:
    """A child has ended. cause: what it said itself, or how it ended and the last line of its stderr."""

    code: int
    cause: str


class Child:
    """A spawned process.

    Args:
        on_event: called from threads with this child and each of its messages, and at its end with `Exited`.
        environ: added to this process's environment.
    """

    def __init__(
        self,
        name: str,
        module: str,
        boot: Boot,
        on_event: Callable[[Child, FromChild | Exited], None],
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
        self._write(encode(BootLine(boot, os.getpid(), main_thread)))
        self._readers = [
            threading.Thread(target=self._read_events, daemon=True, name=f"{name} stdout"),
            threading.Thread(target=self._read_stderr, daemon=True, name=f"{name} stderr"),
        ]
        for reader in self._readers:
            reader.start()
        threading.Thread(target=self._wait, daemon=True, name=f"{name} exit").start()

    def send(self, message: ToChild) -> None:
        """Send a control message; lost if the child has ended."""
        self._write(encode(message))

    def _write(self, line: bytes) -> None:
        with self._write_lock:
            try:
                self.process.stdin.write(line)  # type: ignore[union-attr]
                self.process.stdin.flush()  # type: ignore[union-attr]
            except (BrokenPipeError, ValueError):
                return  # its end is reported by `Exited`

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
            try:
                message = decode_from_child(line)
            except ControlError as error:
                message = Failed(f"{self.name} sent an {error.message}")
            if message is None:
                write_line(f"[{self.name}] {line.decode(errors='replace').rstrip()}")
                continue
            if isinstance(message, Failed):
                self._cause = message.message
            self._on_event(self, message)

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
        self._on_event(self, Exited(code, self._cause or ended + last))
