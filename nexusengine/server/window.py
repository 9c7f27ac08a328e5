"""Shares over the last minutes, in bounded memory: one row of counts a few seconds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 300.0
_ROW_S = 5.0


@dataclass(slots=True)
class Counts:
    """Requests with an SLO that ended, and how many met it by each contract."""

    ended: int = 0
    met: int = 0
    strict_met: int = 0


@dataclass(slots=True)
class SlidingWindow:
    """Counts by class of what ended in the last WINDOW_S, to within 5 s. Instants may not go back."""

    began_s: float
    _rows: deque[tuple[float, dict[str, Counts]]] = field(default_factory=deque)

    def add(self, slo_class: str, met: bool, strict_met: bool, now: float) -> None:
        if not self._rows or now - self._rows[-1][0] >= _ROW_S:
            self._rows.append((now, {}))
        counts = self._rows[-1][1].setdefault(slo_class, Counts())
        counts.ended += 1
        counts.met += met
        counts.strict_met += strict_met
        self._forget(now)

    def __len__(self) -> int:
        """The rows that it holds."""
        return len(self._rows)

    def totals(self, now: float) -> dict[str, Counts]:
        """By class, of those classes of which something ended."""
        self._forget(now)
        found: dict[str, Counts] = {}
        for _, row in self._rows:
            for name, counts in row.items():
                total = found.setdefault(name, Counts())
                total.ended += counts.ended
                total.met += counts.met
                total.strict_met += counts.strict_met
        return found

    def length_s(self, now: float) -> float:
        """Seconds that the totals cover: fewer while there are not enough yet."""
        return min(max(now - self.began_s, 1.0), WINDOW_S)

    def _forget(self, now: float) -> None:
        while self._rows and self._rows[0][0] < now - WINDOW_S:
            self._rows.popleft()
