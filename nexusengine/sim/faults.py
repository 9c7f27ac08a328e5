"""What goes wrong in a simulation, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nexusengine.errors import ConfigError

KINDS = ("slow", "crash", "join")
_RESTART_S = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a worker at `at_s`.

    It becomes `slowdown` times slower, crashes (and is ready again after `restart_s`), or joins late (down from the
    beginning until `at_s`).
    """

    at_s: float
    worker: int
    kind: str
    slowdown: float = 1.0
    restart_s: float = _RESTART_S


def parse_fault(text: str, workers: int) -> Fault:
    """Read `slow:WORKER:AT:FACTOR`, `crash:WORKER:AT[:RESTART_S]` or `join:WORKER:AT`.

    Workers are counted from 0, times are seconds. Raises ConfigError.
    """
    kind, *rest = text.split(":")
    usual = f"a fault is slow:WORKER:AT:FACTOR, crash:WORKER:AT[:RESTART_S] or join:WORKER:AT, got {text!r}"
    lengths = {"slow": (3,), "crash": (2, 3), "join": (2,)}
    if kind not in lengths or len(rest) not in lengths[kind]:
        raise ConfigError(usual, param="fault")
    try:
        worker, numbers = int(rest[0]), [float(word) for word in rest[1:]]
    except ValueError:
        raise ConfigError(usual, param="fault") from None
    if not all(math.isfinite(n) and n >= 0 for n in numbers):
        raise ConfigError(f"the numbers of a fault are finite and not negative, got {text!r}", param="fault")
    if not 0 <= worker < workers:
        raise ConfigError(f"fault {text!r}: there are workers 0 to {workers - 1}", param="fault")
    if kind == "slow":
        if numbers[1] == 0:
            raise ConfigError(f"fault {text!r}: the factor must be above 0", param="fault")
        return Fault(numbers[0], worker, kind, slowdown=numbers[1])
    if kind == "crash":
        return Fault(numbers[0], worker, kind, restart_s=numbers[1] if len(numbers) > 1 else _RESTART_S)
    return Fault(numbers[0], worker, kind)
