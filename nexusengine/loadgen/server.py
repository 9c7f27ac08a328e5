"""A `nexusengine serve` of one's own: started, waited for, and ended with whoever started it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from nexusengine.errors import ConfigError, Unavailable
from nexusengine.process.parent_death import set_parent_death_signal

_URL = re.compile(rb" at (http://\S+) \(ready after")
_END_S = 45.0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself. None: it does not say."""

    model: str | None
    max_model_len: int | None
    vocab_size: int | None


@contextmanager
def own_server(options: Sequence[str], *, ready_s: float = 900.0) -> Iterator[str]:
    """Start `nexusengine serve OPTIONS` on a free port, its log on our stderr.

    Returns:
        Its URL.

    Raises:
        Unavailable: it ends, or is not ready in time.
    """
    command = [sys.executable, "-m", "nexusengine.cli.main", "serve", "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, preexec_fn=partial(set_parent_death_signal, signal.SIGTERM)
    )
    found: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout:  # type: ignore[union-attr]
            if match := _URL.search(line):
                found.append(match.group(1).decode())
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True, name="serve stdout").start()
    try:
        if not ready.wait(ready_s) or not found:
            raise Unavailable(f"nexusengine serve {' '.join(options)} did not become ready")
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(url: str, api_key: str | None = None, *, wait_s: float = 60.0) -> ServerInfo:
    """Wait until the server is ready and ask what it serves. Raises Unavailable or ConfigError."""
    until_s = time.monotonic() + wait_s
    while not _ready(url):
        if time.monotonic() > until_s:
            raise Unavailable(f"no server that is ready at {url} after {wait_s:g} s")
        time.sleep(0.2)
    try:
        model = _get(f"{url}/v1/models", api_key)["data"][0]
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} answers {error.code}: {error.read()[:500].decode(errors='replace')}") from None
    except (OSError, ValueError, LookupError) as error:
        raise Unavailable(f"{url} does not say what it serves: {error!r}") from None
    return ServerInfo(model.get("id"), model.get("max_model_len"), model.get("vocab_size"))


def _ready(url: str) -> bool:
    """Servers that know no /readyz are ready when they answer at all."""
    try:
        _get(f"{url}/readyz", None)
    except urllib.error.HTTPError as error:
        return error.code == 404
    except (OSError, ValueError):
        return False
    return True


def _get(url: str, api_key: str | None) -> Any:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as reply:
        return json.load(reply)
