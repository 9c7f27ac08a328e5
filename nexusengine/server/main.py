"""The server process.

It takes its port before it imports anything heavy, so that clients can connect from the start and are answered as soon
as the application is there.
"""

from __future__ import annotations

import errno
import socket
import sys

from nexusengine.errors import ConfigError
from nexusengine.obs.logs import setup
from nexusengine.process import child
from nexusengine.process.control import Failed, Listening, ServerBoot

_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
    except OSError as error:
        hint = (
            "; choose another --port, or 0 for a free one"
            if error.errno == errno.EADDRINUSE
            else "; check --host and --port"
        )
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}{hint}", param="port") from None
    return made


def main() -> None:
    boot = child.read_boot(ServerBoot)
    config = boot.config
    setup(config.log_level)
    try:
        recorder = None
        if config.record_trace is not None:
            from nexusengine.server.recorder import Recorder

            recorder = Recorder(config)
        listening = bind(config.host, config.port)
    except ConfigError as error:
        child.send(Failed(error.message))
        sys.exit(1)
    child.send(Listening(config.host, listening.getsockname()[1]))

    from nexusengine.server.process import run

    run(config, boot.front, listening, recorder)


if __name__ == "__main__":
    main()
