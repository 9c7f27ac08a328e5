"""A child of the supervisor that prints the lines in the variable STUB_EVENTS, and then waits until it is told to end.

With STUB_HANGS it waits for ever.
"""

from __future__ import annotations

import json
import os
import threading

from nexusengine.process import child
from nexusengine.process.control import decode_boot


def main() -> None:
    boot = b""
    while not boot.endswith(b"\n"):
        boot += os.read(0, 1)
    decode_boot(boot)
    for line in json.loads(os.environ["STUB_EVENTS"]):
        print(line, flush=True)
    if "STUB_HANGS" not in os.environ:
        child.listen(lambda message: None)
    threading.Event().wait()


if __name__ == "__main__":
    main()
