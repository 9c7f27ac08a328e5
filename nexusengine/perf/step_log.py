"""Step logs: composition and duration of every step of an engine, one JSON object a line, gzip.

    {"t": 1.5, "q": [1, 512], "ctx": [700, 0], "waiting": 0, "running": 2, "ms": 61.2, "sched_ms": 0.3}

t: seconds of a monotonic clock at which the step was planned. q: tokens computed for each sequence; 1 is a decode, or
the last token of a prompt. ctx: tokens it had in the KV cache, in the same order. waiting, running: requests at that
moment. ms: how long the model ran; sched_ms: how long everything around it took.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

import msgspec
import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures

_GZIP = b"\x1f\x8b"
_LONGEST_LINE_BYTES = 8 * 2**20
Tokens = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Context = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class LoggedStep(msgspec.Struct, frozen=True):
    """One line of a step log."""

    t: float
    q: list[Tokens]
    ctx: list[Context]
    ms: Annotated[float, msgspec.Meta(gt=0.0)]
    waiting: Count = 0
    running: Count = 0
    sched_ms: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0

    @property
    def features(self) -> StepFeatures:
        return StepFeatures.of(np.array(self.q, np.int32), np.array(self.ctx, np.int32))


_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(LoggedStep)


def encode(step: LoggedStep) -> bytes:
    """A line of the log, with its end."""
    return _ENCODER.encode(step) + b"\n"


def read_steps(path: str | Path) -> Iterator[LoggedStep]:
    """The steps of a log, gzip or plain; those that computed nothing are left out.

    Raises:
        ConfigError: naming file and line of what cannot be read, is cut off or does not hold what it should.
    """
    number = 0
    try:
        with _open(Path(path)) as lines:
            while line := lines.readline(_LONGEST_LINE_BYTES):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.isspace():
                    continue
                step = _decode(line, f"{path}, line {number}")
                if step.q:
                    yield step
    except EOFError:
        raise ConfigError(f"{path}, after line {number}: the file is cut off here") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path}, after line {number}: damaged: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


def _decode(line: bytes, where: str) -> LoggedStep:
    try:
        step = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not line.endswith(b"\n"):
            raise ConfigError(f"{where}: the file is cut off here, or the line is too long") from None
        raise ConfigError(f"{where}: not a step: {error}") from None
    if len(step.q) != len(step.ctx):
        raise ConfigError(f"{where}: q has {len(step.q)} entries and ctx {len(step.ctx)}; one each is needed")
    return step
