"""How long answers are, learned while they end: by class and tenant, as quantiles given how long an answer is already.

A bound on the whole response (`SLO.e2e_s`) can only be kept by reckoning with a length that nobody knows yet. PURE.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from nexusengine.arrays import F8
from nexusengine.scheduler.request import SchedulerRequest
from nexusengine.scheduler.view import RequestColumns

QUANTILE = 0.9
"""Of the lengths, that is reckoned with: one in ten answers is longer."""

E2E_QUANTILE = 0.5
"""Of the lengths, by which deadlines of whole responses are set."""
_BINS_AN_OCTAVE = 8
_BINS = 20 * _BINS_AN_OCTAVE  # up to a million tokens
_MEMORY_ANSWERS = 500.0
_LEAST_ANSWERS = 20.0  # below so many remembered answers, those of a wider group count
_MAX_GROUPS = 512
_RENEWED_EVERY_TOKENS = 16  # of output, the expected length of an answer

_EDGES = 2.0 ** (np.arange(_BINS + 1) / _BINS_AN_OCTAVE)


class OutputLengths:
    """Lengths of the answers that have ended.

    They are kept for each tenant of a class, each class, and all together; a question is answered by the narrowest of
    these groups in which enough have ended. Groups unused for longest are forgotten.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, _Lengths] = OrderedDict()

    def observe(self, slo_class: str | None, tenant: str | None, tokens: int) -> None:
        """An answer of so many tokens has ended by itself, or at its longest."""
        for group in _groups_of(slo_class, tenant):
            self._groups.setdefault(group, _Lengths()).observe(tokens)
            self._groups.move_to_end(group)
        while len(self._groups) > _MAX_GROUPS:
            self._groups.popitem(last=False)

    def quantile(self, slo_class: str | None, tenant: str | None, generated: int, share: float = QUANTILE) -> float:
        """The length that a share of those answers stays within that are longer than `generated` tokens.

        Returns:
            Tokens; NaN as long as too few answers have ended.
        """
        for group in _groups_of(slo_class, tenant):
            lengths = self._groups.get(group)
            if lengths is not None and (tokens := lengths.quantile(generated, share)) is not None:
                return tokens
        return math.nan


def _groups_of(slo_class: str | None, tenant: str | None) -> tuple[Hashable, ...]:
    """From the narrowest to the widest."""
    by_class: tuple[Hashable, ...] = (("class", slo_class), "all")
    return by_class if tenant is None else (("tenant", slo_class, tenant), *by_class)


class ExpectedLengths:
    """Says how long answers are expected to be, and keeps the column `expected_tokens` of those with an e2e bound.

    Args:
        columns: of the scheduler.
    """

    def __init__(self, columns: RequestColumns) -> None:
        self._columns, self._lengths = columns, OutputLengths()
        self._with_e2e: dict[int, SchedulerRequest] = {}

    def arrived(self, request: SchedulerRequest) -> None:
        """Say what its length is expected to be; its row has been written."""
        request.expected_tokens = self._expected(request, 0, QUANTILE)
        if not math.isnan(self._columns.e2e_s[request.slot]):
            self._columns.expected_tokens[request.slot] = self._expected(request, 0, E2E_QUANTILE)
            self._with_e2e[request.slot] = request

    def advanced(self, steps: int) -> None:
        """Rows have been moved on by so many steps."""
        if not self._with_e2e:
            return
        slots = np.fromiter(self._with_e2e, np.int32, len(self._with_e2e))
        generated = self._columns.generated_tokens[slots]
        due = generated // _RENEWED_EVERY_TOKENS != (generated - steps) // _RENEWED_EVERY_TOKENS
        for slot in slots[due & (generated > 0)].tolist():
            tokens = self._expected(self._with_e2e[slot], int(self._columns.generated_tokens[slot]), E2E_QUANTILE)
            if not math.isnan(tokens):
                self._columns.expected_tokens[slot] = tokens

    def ended(self, request: SchedulerRequest, output_tokens: int | None) -> None:
        """A request has left. output_tokens: of its whole answer; None if it did not come to its end."""
        self._with_e2e.pop(request.slot, None)
        if output_tokens is not None:
            self._lengths.observe(request.request.slo_class, request.request.tenant, output_tokens)

    def _expected(self, request: SchedulerRequest, generated: int, share: float) -> float:
        r, sampling = request.request, request.request.sampling
        if sampling.ignore_eos and sampling.max_tokens and not (sampling.stop or sampling.stop_token_ids):
            return float(request.max_tokens)
        return min(self._lengths.quantile(r.slo_class, r.tenant, generated, share), float(request.max_tokens))


class _Lengths:
    """A histogram with bins of equal ratio and an exponential memory."""

    def __init__(self) -> None:
        self._counts: F8 = np.zeros(_BINS)

    def observe(self, tokens: int) -> None:
        self._counts *= 1.0 - 1.0 / _MEMORY_ANSWERS
        self._counts[_bin(tokens)] += 1.0

    def quantile(self, generated: int, share: float) -> float | None:
        """None if too few of the remembered answers are longer than `generated`."""
        first = _bin(generated + 1)
        counts = self._counts[first:].copy()
        low, high = _EDGES[first], _EDGES[first + 1]
        counts[0] *= (high - max(generated + 1, low)) / (high - low)  # of the bin that it is in, what is beyond it
        total = float(counts.sum())
        if total < (_LEAST_ANSWERS if not generated else 1.0):
            return None
        reached = counts.cumsum()
        at = int(reached.searchsorted(share * total))
        before = float(reached[at - 1]) if at else 0.0
        low = max(math.ceil(_EDGES[first + at]), generated + 1)
        lengths = max(math.ceil(_EDGES[first + at + 1]) - low, 1)  # that the bin stands for
        within = (share * total - before) / float(counts[at])
        return float(low - 1 + math.ceil(within * lengths))


def _bin(tokens: int) -> int:
    return min(int(_BINS_AN_OCTAVE * math.log2(max(tokens, 1))), _BINS - 1)
