"""The base of all messages, and the limits of what may be in one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from nexusengine.errors import NexusError

PROTOCOL_VERSION = 4
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_PENDING_IN_REPORT = 64
MAX_DIGEST_BYTES = 32 * 2**10
MAX_STEPS_IN_REPLY = 512
MAX_CHANGES_IN_REPLY = 1024

Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
"""A duration; neither NaN nor infinite."""


class ProtocolError(NexusError):
    """A message that is not of this protocol."""

    code = "protocol_error"


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages; the class name is the tag."""
