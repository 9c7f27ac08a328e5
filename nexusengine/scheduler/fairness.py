"""Fairness between tenants: who has had more than its share of the engine while others wait. PURE.

Each tenant has a counter of the service it got: tokens computed, output tokens counted twice more. While several
tenants have requests that wait, those whose counter is far above the least are over their share. One that had nothing
waiting comes back with the least counter of those that do, so that nobody saves up service.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024): the virtual token counter.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np

from nexusengine.arrays import F8, I4, Bools

OUTPUT_WEIGHT = 2.0
"""Times a prompt token, that an output token counts."""
GAP_S = 10.0
"""Default of TenantShares.gap_s: tenants that ask for equally much differ by less, by chance."""
_MAX_TENANTS = 4096
_RATE_MEMORY_S = 30.0


class TenantShares:
    """Service by tenant. A tenant has a number; 0 is that of requests without one.

    Args:
        gap_s: a counter is over its share if it is above the least by what an even share of the engine is in this time.
    """

    def __init__(self, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self._numbers: OrderedDict[str | None, int] = OrderedDict({None: 0})  # used last at the end
        self._service: F8 = np.zeros(1)
        self._waits: Bools = np.zeros(1, np.bool_)  # who had requests waiting at the last look
        self._rate_tokens, self._rate_s, self._looked_s = 0.0, 0.0, math.nan  # service of late, and in how long
        self._least = 0.0  # counter of those that waited when somebody did

    @property
    def tenants(self) -> int:
        """How many numbers are in use."""
        return len(self._service)

    @property
    def one_tenant(self) -> bool:
        """Whether there has been no more than one so far, so that nothing needs to be counted."""
        return self.tenants == 1

    def number_of(self, tenant: str | None) -> int:
        """The number of a tenant, new ones included."""
        number = self._numbers.get(tenant)
        if number is None:
            number = len(self._service)
            if number == _MAX_TENANTS:
                number = self._numbers.popitem(last=False)[1]
            else:
                self._service = np.append(self._service, 0.0)
                self._waits = np.append(self._waits, False)
            self._service[number], self._waits[number] = 0.0, False
        self._numbers[tenant] = number
        self._numbers.move_to_end(tenant)
        return number

    def served(self, tenants: I4, counts: I4 | F8, sampled: I4) -> None:
        """Count what a step computes.

        Args:
            tenants: `[R]`, number of each row's tenant.
            counts: `[R]`, tokens that the row computes.
            sampled: tenants of the rows that get an output token.
        """
        size = len(self._service)
        tokens = np.bincount(tenants, counts, size) + OUTPUT_WEIGHT * np.bincount(sampled, minlength=size)
        self._service += tokens
        self._rate_tokens += float(tokens.sum())

    def over_share(self, tenants: I4, waiting: I4, now: float) -> Bools | None:
        """Which tenants are over their share.

        Args:
            tenants: `[S]`, number of the tenant by slot.
            waiting: slots that wait.

        Returns:
            Bool by slot `[S]`; None if no tenant is.
        """
        waits = np.zeros(len(self._service), np.bool_)
        waits[tenants[waiting]] = True
        stayed, service = waits & self._waits, self._service
        if stayed.any():
            self._least = float(service[stayed].min())
        elif (left := self._waits & ~waits).any():
            self._least = max(self._least, float(service[left].min()))
        came = waits & ~self._waits
        service[came] = np.maximum(service[came], self._least)
        self._waits = waits
        gap = self._gap_s * self._rate(now) / max(int(np.count_nonzero(waits)), 1)
        if np.count_nonzero(waits) < 2:
            return None
        over = service > service[waits].min() + gap
        return over[tenants] if over[waits].any() else None

    def _rate(self, now: float) -> float:
        """Service of all, tokens a second."""
        if now > self._looked_s:
            keep = math.exp((self._looked_s - now) / _RATE_MEMORY_S)
            self._rate_tokens, self._rate_s = keep * self._rate_tokens, keep * (self._rate_s + now - self._looked_s)
        self._looked_s = now
        return self._rate_tokens / max(self._rate_s, 1e-3)
