"""The files of a recording: appended to, rotated by size, and never more than so many.

`load.jsonl` is the newest. When it is full it becomes `load.000001.jsonl`, the next one `load.000002.jsonl`; beyond the
number of files that are kept, the oldest is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from nexusengine.errors import ConfigError

_DIGITS = 6


class TraceFiles:
    """Writes whole lines. Not thread-safe.

    Args:
        path: of the newest file. One that is there from before is rotated away, not written over.
        most_bytes: of a file.
        most_files: with the newest.
        header: makes the first line of the file with a number, from 0.

    Raises:
        ConfigError: it cannot be written, or another server writes it.
    """

    def __init__(self, path: str | Path, most_bytes: int, most_files: int, header: Callable[[int], bytes]) -> None:
        self.path = Path(path)
        self._most_bytes, self._most_files, self._header = most_bytes, most_files, header
        self._part = self._size = self._empty_size = 0
        self._file = -1
        try:
            self._file = _open_locked(self.path)
            if os.fstat(self._file).st_size:
                self._rotate()
            else:
                self._write(header(0))
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot write the trace {path}: {_reason(error)}", param="record_trace") from None

    @property
    def rotated(self) -> list[Path]:
        """The older files, oldest first."""
        pattern = re.compile(re.escape(self.path.stem) + rf"\.\d{{{_DIGITS}}}" + re.escape(self.path.suffix))
        return sorted(p for p in self.path.parent.glob("*") if pattern.fullmatch(p.name))

    def is_full(self, more: int) -> bool:
        """Whether `more` bytes do not fit into the newest file."""
        return self._size + more > self._most_bytes and self._size > self._empty_size

    def next_file(self) -> None:
        """Begin another file. Raises OSError; the newest one is then still there to be written to."""
        self._part += 1
        self._rotate()

    def write(self, data: bytes) -> None:
        """Append lines, all of them or none. Raises OSError."""
        self._write(data)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _rotate(self) -> None:
        older = self.rotated
        number = int(older[-1].stem.rpartition(".")[2]) + 1 if older else 1
        with contextlib.suppress(FileNotFoundError):  # somebody moved it
            os.rename(self.path, self.path.with_name(f"{self.path.stem}.{number:0{_DIGITS}}{self.path.suffix}"))
        opened = _open_locked(self.path)
        self.close()
        self._file = opened
        self._write(self._header(self._part))
        for old in self.rotated[: 1 - self._most_files or None]:
            old.unlink()

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, memoryview(data)[done:])
        except OSError:
            if done:
                os.ftruncate(self._file, size)
            raise
        if not size:
            self._empty_size = len(data)
        self._size = size + len(data)


def _open_locked(path: Path) -> int:
    """A descriptor that appends. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    opened = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(0, "it is not a plain file")
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(opened)
        raise
    return opened


def _reason(error: OSError) -> str:
    return "another server writes it" if isinstance(error, BlockingIOError) else error.strerror or str(error)
