"""Processes that render chat templates, from the side of their parent: started when needed, killed at a limit."""

from __future__ import annotations

import marshal
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nexusengine.errors import InternalError, InvalidRequest
from nexusengine.templates.render_process import MEMORY_LIMIT_BYTES, OUTPUT_LIMIT, REPLY, REQUEST, Status

CPU_LIMIT_S = 2.0
"""Processor time for one rendering: on a busy machine it may take longer."""
_GIVE_UP_S = 60.0
"""After which a process that does not answer is killed, if it is stopped or gets no processor at all."""
PROCESSES = max(2, min(4, os.cpu_count() or 2))
"""Most processes of one pool: while one runs into its time limit, others serve."""
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ", "LANG", "LC_ALL", "LC_TIME")
_CHUNK = 2**20
_REFUSES = "the chat template refuses these messages: "


class LimitMet(InvalidRequest):
    """A template took too long, too much memory, or wrote too much."""


class RenderPool:
    """Renders in processes of its own; any thread may call it, and waits for its turn.

    Its processes end with `close`, with the pool itself, and with the process that has it.
    """

    def __init__(self, cpu_limit_s: float = CPU_LIMIT_S) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._turn = threading.BoundedSemaphore(PROCESSES)
        self._idle: list[_Process] = []
        self._end = weakref.finalize(self, _end_all, self._idle)

    def render(self, source: str, variables: Mapping[str, Any], messages: Sequence[Any]) -> str:
        """The text that the template `source` makes of plain data.

        Raises:
            InvalidRequest: with what the template says is wrong with it.
            LimitMet: it took too much time or memory.
            InternalError: there can be no process.
        """
        try:
            payload = marshal.dumps((source, dict(variables), [marshal.dumps(m) for m in messages]))
        except ValueError:
            raise InvalidRequest("the messages are nested too deeply", param="messages") from None
        with self._turn:
            status, text = self._ask(payload)
        if status is Status.RENDERED:
            return text
        if status is Status.TOO_MUCH_MEMORY:
            raise _limit(f"it needed more than {MEMORY_LIMIT_BYTES // 2**20} MiB of memory")
        if status is Status.TOO_LONG:
            raise _limit(f"it wrote more than {OUTPUT_LIMIT} characters")
        raise InvalidRequest(_REFUSES + text, param="messages")

    def close(self) -> None:
        """End the idle processes. The pool remains usable: it starts new ones."""
        _end_all(self._idle)

    def _ask(self, payload: bytes) -> tuple[Status, str]:
        """Raises LimitMet or InternalError."""
        while True:
            was_idle, process = self._take()
            try:
                status, text = process.ask(payload, time.monotonic() + _GIVE_UP_S)
            except (EOFError, OSError) as error:
                cause = process.kill()
                if cause == -signal.SIGPROF or isinstance(error, TimeoutError):
                    raise _limit(f"it took more than {self._cpu_limit_s:g} s") from None
                if not was_idle:
                    raise _limit("it ended the process that rendered it") from None
                continue  # it may have died before, of something else
            except BaseException:  # Ctrl-C: its reply would be taken for the next one's
                process.kill()
                raise
            if status is Status.TOO_MUCH_MEMORY:  # what is left of its memory may be in pieces
                process.kill()
            else:
                self._idle.append(process)
            return status, text

    def _take(self) -> tuple[bool, _Process]:
        """A process, and whether it has been there before."""
        while self._idle:
            process = self._idle.pop()
            if process.usable():
                return True, process
        return False, _Process(self._cpu_limit_s)


def _limit(reason: str) -> LimitMet:
    return LimitMet(_REFUSES + reason, param="messages")


def _end_all(processes: list[_Process]) -> None:
    while processes:
        processes.pop().kill()


class _Process:
    """One process, which renders one template at a time. Without the secrets that the environment may hold."""

    def __init__(self, cpu_limit_s: float) -> None:
        here = str(Path(__file__).parents[1].parent)
        environ = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([here, *filter(None, sys.path)]))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nexusengine.templates.render_process", str(cpu_limit_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=environ,
                process_group=0,  # Ctrl-C is for the parent
            )
        except OSError as error:
            raise InternalError(f"the process that renders chat templates cannot be started: {error}") from None
        self._owner = os.getpid()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)

    def usable(self) -> bool:
        """Whether it runs, and is this process's own and not one that a fork left behind."""
        return self._owner == os.getpid() and self._process.poll() is None

    def kill(self) -> int | None:
        """End the process; returns its exit status, or None for a process inherited through a fork, which goes on."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()  # type: ignore[union-attr]
        return self._process.returncode

    def ask(self, payload: bytes, until_s: float) -> tuple[Status, str]:
        """Send a request and wait for the reply.

        Raises TimeoutError, and EOFError or another OSError if the process has ended.
        """
        for part in (REQUEST.pack(len(payload)), payload):
            self._write(part, until_s)
        status, length = REPLY.unpack(self._read(REPLY.size, until_s))
        return Status(status), self._read(length, until_s).decode("utf-8", "surrogatepass")

    def _write(self, content: bytes, until_s: float) -> None:
        view = memoryview(content)
        while view:
            _wait(self._in, select.POLLOUT, until_s)
            view = view[os.write(self._in, view[:_CHUNK]) :]

    def _read(self, length: int, until_s: float) -> bytes:
        content = bytearray()
        while len(content) < length:
            _wait(self._out, select.POLLIN, until_s)
            chunk = os.read(self._out, min(_CHUNK, length - len(content)))
            if not chunk:
                raise EOFError
            content += chunk
        return bytes(content)


def _wait(file: int, event: int, until_s: float) -> None:
    """Until it can be read or written. Raises TimeoutError."""
    poll = select.poll()
    poll.register(file, event)
    if not poll.poll(max(0.0, until_s - time.monotonic()) * 1000):
        raise TimeoutError
