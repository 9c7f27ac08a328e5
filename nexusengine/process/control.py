"""Messages between the supervisor and its processes: JSON lines on stdin and stdout, one tagged union a direction.

The first line to a process is its `Boot`; a `ToChild` or `FromChild` is any line after it.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import msgspec

from nexusengine.config import ServeConfig
from nexusengine.errors import NexusError


class ControlError(NexusError):
    """A line that is no message of its direction."""

    code: ClassVar[str] = "control_error"


def _tag(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class _Message(msgspec.Struct, frozen=True, tag_field="type", tag=_tag):
    """Base of all control messages. The tag, under "type", is the class name in snake case."""


# ---- the first line -------------------------------------------------------------------------------------------------


class WorkerIdentity(msgspec.Struct, frozen=True):
    """A worker process that the router may take.

    Attributes:
        worker_id: stable over restarts ("w0").
        device: as written in the settings.
        epoch: unique for each process.
    """

    worker_id: str
    device: str
    epoch: str


class RouterBoot(_Message, frozen=True):
    """How the router is started.

    Attributes:
        front, back: ZeroMQ endpoints to bind, for clients and for workers.
        hash_key: hexadecimal secret of the hashes of KV blocks, the same in all workers.
        workers: those that it may take.
    """

    config: ServeConfig
    front: str
    back: str
    hash_key: str
    workers: tuple[WorkerIdentity, ...]


class ServerBoot(_Message, frozen=True):
    """How the HTTP server is started. front: the router's endpoint for clients."""

    config: ServeConfig
    front: str


class WorkerBoot(_Message, frozen=True):
    """How a worker is started.

    Attributes:
        back: the router's endpoint for workers.
        hash_key: as the router's.
        cores: CPU cores that it may use; empty for all.
        model_path: where the model is; empty while it is looked for, a `Model` follows.
    """

    config: ServeConfig
    back: str
    hash_key: str
    identity: WorkerIdentity
    cores: tuple[int, ...] = ()
    model_path: str = ""


Boot = RouterBoot | ServerBoot | WorkerBoot


class BootLine(msgspec.Struct, frozen=True):
    """The first line. parent_death_signal: whether the kernel is to kill the process when its parent dies."""

    boot: Boot
    parent_pid: int
    parent_death_signal: bool


# ---- supervisor -> process ------------------------------------------------------------------------------------------


class Model(_Message, frozen=True):
    """The model was found.

    Attributes:
        path: its directory or file.
        name: what clients call it; for the server.
    """

    path: str
    name: str = ""


class Drain(_Message, frozen=True):
    """Take no new requests; the server answers with `Drained` once every reply is written."""


class WorkerExited(_Message, frozen=True):
    """A worker process has ended; for the router.

    Attributes:
        epoch, next_epoch: of the process that ended, and of the one that will be started in its place.
        restarts: within five minutes.
    """

    worker_id: str
    epoch: str
    next_epoch: str
    cause: str
    restarts: int


# ---- both -----------------------------------------------------------------------------------------------------------


class Phase(_Message, frozen=True):
    """The phase that start-up is in. fraction: of it done, 0..1."""

    phase: str
    fraction: float


# ---- process -> supervisor ------------------------------------------------------------------------------------------


class Listening(_Message, frozen=True):
    """It has bound its address. host, port: of the server."""

    host: str = ""
    port: int = 0


class Ready(_Message, frozen=True):
    """It serves from now on."""


class Failed(_Message, frozen=True):
    """It cannot go on, and ends by itself. message: for the user."""

    message: str


class Drained(_Message, frozen=True):
    """Every reply is written; see `Drain`."""


ToChild = Model | Drain | WorkerExited | Phase
FromChild = Listening | Ready | Phase | Failed | Drained


def encode(message: BootLine | ToChild | FromChild) -> bytes:
    """One line, with its end; ASCII, so that names of files that are not UTF-8 pass."""
    return json.dumps(msgspec.to_builtins(message)).encode() + b"\n"


def decode_boot(line: bytes) -> BootLine:
    """Raises ControlError."""
    found: BootLine = _convert(json.loads(line), BootLine)
    return found


def decode_to_child(line: bytes) -> ToChild:
    """Raises ControlError."""
    found: ToChild = _convert(json.loads(line), ToChild)
    return found


def decode_from_child(line: bytes) -> FromChild | None:
    """None for a line that is no message, as a library may print one to stdout.

    Raises:
        ControlError: it is one, but unknown or malformed.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _convert(found, FromChild) if isinstance(found, dict) and isinstance(found.get("type"), str) else None


def _convert(found: object, union: Any) -> Any:
    try:
        return msgspec.convert(found, union)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ControlError(f"unknown control message {str(found)[:200]}: {error}") from None
