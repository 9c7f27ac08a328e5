"""Looking at a ZeroMQ socket without the price of an exception."""

from __future__ import annotations

import zmq

_READABLE = int(zmq.POLLIN)  # an operation on the enum's member takes longer than the look itself


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether there is a message to receive."""
    return bool(int(socket.get(zmq.EVENTS)) & _READABLE)
