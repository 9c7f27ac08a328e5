"""A trace file as a source: its own arrivals scaled in time, or its lengths alone."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import I8
from nexusengine.errors import ConfigError
from nexusengine.sim.workload.arrivals import check_count
from nexusengine.sim.workload.draw import Drawn, Stream, rng_for
from nexusengine.sim.workload.entries import Trace
from nexusengine.sim.workload.recording import Recording


class Recorded:
    """Source of single requests.

    Lengths alone come in an order shuffled by seed, each request once before any comes again; where requests share
    prefixes, the order is kept from a start chosen by seed, because reuse depends on what came shortly before.
    Arrivals: the window of `duration_s` begins at the trace's beginning for seed 0, elsewhere for other seeds; if the
    trace is shorter it is repeated.
    """

    def __init__(self, trace: Trace, recording: Recording | None = None) -> None:
        """recording: where a server of ours recorded it."""
        self.name, self.recording = trace.name, recording
        self._trace = trace
        entries = trace.entries
        self._inputs = np.array([e.input_tokens for e in entries], np.int64)
        self._outputs = np.array([e.output_tokens for e in entries], np.int64)
        self._shares_prefixes = any(e.block_ids for e in entries)
        self.rate_rps = len(entries) / trace.length_s if trace.length_s > 0 else None

    def lengths(self, count: int, seed: int) -> Drawn:
        rng, n = rng_for(seed, Stream.LENGTHS), len(self._inputs)
        if self._shares_prefixes:
            picked = (int(rng.integers(n)) + np.arange(count)) % n
        else:
            picked = np.concatenate([rng.permutation(n) for _ in range(-(-count // n))] or [np.zeros(0, np.int64)])
        return self._pick(picked[:count].astype(np.int64), np.zeros(count))

    def with_arrivals(self, rate_rps: float | None, duration_s: float | None, seed: int) -> Drawn:
        if not self._trace.timed:
            raise ConfigError(
                f"{self.name} has no arrival times: give --arrivals poisson or gamma:CV", param="arrivals"
            )
        if self.rate_rps is None:
            if rate_rps is None and duration_s is None:
                return self._pick(np.arange(len(self._inputs)), np.zeros(len(self._inputs)))
            raise ConfigError(f"all requests of {self.name} arrive at the same time: they have no rate", param="rate")
        scale = 1.0 if rate_rps is None else self.rate_rps / rate_rps
        timestamps = np.array([e.arrival_s for e in self._trace.entries], np.float64) * scale
        length_s = self._trace.length_s * scale
        if duration_s is None:
            return self._pick(np.arange(len(timestamps)), timestamps)
        start_s = 0.0
        if seed and duration_s < length_s:
            start_s = float(rng_for(seed, Stream.ARRIVALS).uniform(0.0, length_s - duration_s))
        turns = int(np.ceil((start_s + duration_s) / length_s))
        check_count(turns * len(timestamps), len(timestamps) / length_s, duration_s)
        all_timestamps = (timestamps[None, :] + length_s * np.arange(turns)[:, None]).ravel() - start_s
        inside = np.nonzero((all_timestamps >= 0.0) & (all_timestamps < duration_s))[0]
        return self._pick(inside % len(timestamps), all_timestamps[inside])

    def _pick(self, picked: I8, arrival_s: np.ndarray) -> Drawn:
        blocks, entries = None, self._trace.entries
        if self._shares_prefixes:
            blocks = [entries[i].block_ids for i in picked.tolist()]
        block_tokens = max((e.block_tokens for e in entries), default=0)
        recorded = None if self.recording is None else [entries[i] for i in picked.tolist()]
        return Drawn(arrival_s, self._inputs[picked], self._outputs[picked], blocks, block_tokens, recorded)
