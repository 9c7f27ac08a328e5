"""A child of the supervisor that says what the variable STUB_EVENTS holds, and then waits until it is told to end.

With STUB_HANGS it waits for ever.
"""

from __future__ import annotations

import json
import os
import threading

from nexusengine.process import child


def main() -> None:
    child.read_config()
    for event in json.loads(os.environ["STUB_EVENTS"]):
        child.emit(event)
    if "STUB_HANGS" not in os.environ:
        child.listen(lambda message: None)
    threading.Event().wait()


if __name__ == "__main__":
    main()
