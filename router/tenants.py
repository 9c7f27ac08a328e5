"""Which tenants have had more than their share of all workers while others wait. PURE.

Each engine keeps tenants apart by itself; but it cannot send away what it was given, and all its queue is in the way of
what the router predicts for the others. So the router counts too, what it gives to workers.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nexusengine.arrays import I4, Bools
from nexusengine.router.ledger import Entry, Stage
from nexusengine.scheduler.fairness import OUTPUT_WEIGHT, TenantShares

_GAP_S = 20.0
"""As scheduler.fairness.GAP_S, but longer: who is over its share here is not served last, but refused."""
_NOBODY: I4 = np.zeros(0, np.int32)


class ClusterShares:
    """Service by tenant over all workers, counted when a request is placed, with the answer that is expected."""

    def __init__(self) -> None:
        self._shares = TenantShares(_GAP_S)
        self._arrived: set[int] = set()  # since the last look
        self._over: Bools | None = None  # by number

    @property
    def several(self) -> bool:
        """Whether there has been more than one tenant, so that service is counted."""
        return not self._shares.one_tenant

    def arrived(self, tenant: str | None) -> None:
        """A request came; its tenant counts as waiting at the next look, however soon it is served."""
        if tenant is not None or self.several:
            self._arrived.add(self._shares.number_of(tenant))

    def placed(self, tenant: str | None, prompt_tokens: int, output_tokens: float) -> None:
        """A request was given to a worker. output_tokens: expected of its answer."""
        number = np.array([self._shares.number_of(tenant)], np.int32)
        self._shares.served(number, np.array([prompt_tokens + OUTPUT_WEIGHT * output_tokens]), _NOBODY)

    def look(self, entries: Iterable[Entry], now: float) -> None:
        """Find anew who is over its share. entries: all that are in flight."""
        if not self.several:
            return
        waiting = self._arrived | {
            self._shares.number_of(e.request.tenant) for e in entries if e.stage is not Stage.STREAMING
        }
        self._arrived = set()
        every = np.arange(self._shares.tenants, dtype=np.int32)
        self._over = self._shares.over_share(every, np.array(sorted(waiting), np.int32), now)

    def over(self, tenant: str | None) -> bool:
        """Whether a tenant had more than its share at the last look."""
        if self._over is None:
            return False
        number = self._shares.number_of(tenant)
        return number < len(self._over) and bool(self._over[number])
