"""The events that a supervisor handles, and those that it passes to its caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nexusengine.errors import NexusError
from nexusengine.process.control import Listening, Phase, Ready

if TYPE_CHECKING:  # the command line needs the events of its supervisor, and is to start quickly
    from nexusengine.loading.resolve import ModelFiles

__all__ = ["Draining", "Event", "Listening", "Phase", "ProcessEnded", "Ready"]


@dataclass(frozen=True, slots=True)
class Draining:
    """No new requests are taken; those that run have `limit_s` seconds."""

    limit_s: float


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A process has ended, and is perhaps started again."""

    name: str
    cause: str


Event = Phase | Listening | Ready | Draining | ProcessEnded
"""To the caller. Ready: once all processes are."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """End now."""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Finish what runs, then end. at_s: timestamp of the call."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Compiling:
    """How far the compilation of the CPU kernels is."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Resolved:
    """The model was found."""

    files: ModelFiles


@dataclass(frozen=True, slots=True)
class ResolveFailed:
    """There is no such model, or it cannot be had."""

    error: NexusError


OwnEvent = StopRequested | DrainRequested | Phase | Compiling | Resolved | ResolveFailed
