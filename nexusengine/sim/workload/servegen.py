"""ServeGen client models as a source: arrivals and lengths of many clients, each with its own rates and habits.

A client has windows of ten minutes with a rate, a coefficient of variation and a family of gaps, and windows of some
hours with quantiles of its lengths (arXiv 2505.09999). Windows with a cv over 10 have
next to no requests and are dropped, as are clients without lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.arrays import F8, I8
from nexusengine.errors import ConfigError
from nexusengine.sim.workload.arrivals import check_count
from nexusengine.sim.workload.draw import Drawn, Stream, rng_for
from nexusengine.sim.workload.entries import json_rows

WINDOW_S = 600.0
HIGHEST_CV = 10.0
_PROBABILITIES = np.array([0.0, 0.01, *np.arange(0.05, 0.951, 0.05), 0.975, 0.99, 0.999, 1.0])
_BATCH = 256


@dataclass(frozen=True, slots=True)
class _Client:
    """rates, cvs, families by window of WINDOW_S; lengths: (start_s, input quantiles, output quantiles)."""

    number: int
    rates: F8
    cvs: F8
    weibull_shapes: F8  # NaN where gaps are Gamma
    lengths: tuple[tuple[float, F8, F8], ...]


def is_servegen(row: dict[str, Any]) -> bool:
    return "rate_windows" in row


class ServeGen:
    """Source of requests of all clients of a file, over a stretch of the wanted length.

    The stretch is drawn by seed from the busier half. A wanted rate multiplies every client's rate by the same factor,
    so that the mixture and its burstiness in requests stay. Gaps and lengths of a client are drawn from its own
    streams: the same for every rate.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError naming file and line."""
        path = Path(path)
        self.name = path.name
        self.dropped_windows = self.dropped_clients = 0
        clients = []
        for line, row in json_rows(path):
            try:
                client = self._client(row)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {line}: not a client model: {error!r}", param="trace") from None
            if client is None:
                self.dropped_clients += 1
            else:
                clients.append(client)
        if not clients:
            raise ConfigError(f"{path} has no client with lengths in it", param="trace")
        windows = max(len(c.rates) for c in clients)
        self._clients = clients
        self._total = np.sum([np.pad(c.rates, (0, windows - len(c.rates))) for c in clients], axis=0)
        self.rate_rps: float | None = float(self._total.mean())

    def _client(self, row: dict[str, Any]) -> _Client | None:
        lengths = []
        for start_s, fields in row["dataset_windows"].items():
            # where a window has no request there is the text "{}" in place of the quantiles
            quantiles = [fields.get(k) for k in ("input_tokens", "output_tokens")] if isinstance(fields, dict) else []
            if quantiles and all(isinstance(q, list) and q for q in quantiles):
                inputs, outputs = (np.asarray(q, np.float64) for q in quantiles)
                if not (np.isfinite(inputs).all() and np.isfinite(outputs).all()):
                    raise ValueError("a quantile is not a finite number")
                if len(inputs) != len(_PROBABILITIES) or len(outputs) != len(_PROBABILITIES):
                    raise ValueError(f"{len(inputs)} quantiles, expected {len(_PROBABILITIES)}")
                lengths.append((float(start_s), inputs, outputs))
        if not lengths:
            return None
        windows = row["rate_windows"]
        rates = np.array([w[1] for w in windows], np.float64)
        cvs = np.array([w[2] for w in windows], np.float64)
        shapes = np.array([w[4] if w[3] == "Weibull" else math.nan for w in windows], np.float64)
        if not (np.isfinite(rates).all() and (rates >= 0).all()):
            raise ValueError("a rate is not a finite number >= 0")
        wild = (cvs > HIGHEST_CV) | ((rates > 0) & (cvs <= 0)) | (shapes <= 0)
        self.dropped_windows += int(wild.sum())
        return _Client(int(row["client"]), np.where(wild, 0.0, rates), cvs, shapes, tuple(sorted(lengths)))

    def lengths(self, count: int, seed: int) -> Drawn:
        """Clients by their share of the whole file's requests."""
        shares = np.array([c.rates.sum() for c in self._clients])
        rng = rng_for(seed, Stream.LENGTHS)
        picked = rng.choice(len(shares), count, p=shares / shares.sum())
        inputs, outputs = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for i, client in enumerate(self._clients):
            mine = np.nonzero(picked == i)[0]
            busiest_s = float(np.argmax(client.rates)) * WINDOW_S
            own = rng_for(seed, Stream.LENGTHS, 1 + client.number)
            inputs[mine], outputs[mine] = _lengths(client, np.full(len(mine), busiest_s), own)
        return Drawn(np.zeros(count), inputs, outputs)

    def with_arrivals(self, rate_rps: float | None, duration_s: float | None, seed: int) -> Drawn:
        duration_s = WINDOW_S if duration_s is None else duration_s
        count = min(max(math.ceil(duration_s / WINDOW_S), 1), len(self._total))
        sums = np.convolve(self._total, np.ones(count), "valid")
        busier = np.nonzero((sums >= np.median(sums)) & (sums > 0))[0]
        if not len(busier):
            raise ConfigError(f"{self.name}: no client has a rate above 0", param="trace")
        first = int(rng_for(seed, Stream.ARRIVALS).choice(busier))
        factor = 1.0 if rate_rps is None else rate_rps * count / float(sums[first])
        check_count(factor * float(sums[first]) * WINDOW_S, factor * float(sums[first]) / count, duration_s)
        parts = [self._requests_of(c, first, count, factor, duration_s, seed) for c in self._clients]
        arrivals = np.concatenate([p[0] for p in parts])
        order = np.argsort(arrivals, kind="stable")
        inputs, outputs = (np.concatenate([p[k] for p in parts])[order] for k in (1, 2))
        return Drawn(arrivals[order], inputs, outputs)

    def _requests_of(
        self, client: _Client, first: int, count: int, factor: float, duration_s: float, seed: int
    ) -> tuple[F8, I8, I8]:
        timestamps = []
        for i in range(first, min(first + count, len(client.rates))):
            rate_rps = float(client.rates[i]) * factor
            if rate_rps > 0:
                rng = rng_for(seed, Stream.ARRIVALS, client.number, i)
                gaps = _unit_gaps(float(client.cvs[i]), float(client.weibull_shapes[i]), rng)
                timestamps.append((i - first) * WINDOW_S + _in_window(gaps, rate_rps))
        arrivals = np.concatenate(timestamps) if timestamps else np.zeros(0)
        arrivals = arrivals[arrivals < duration_s]
        rng = rng_for(seed, Stream.LENGTHS, client.number)
        inputs, outputs = _lengths(client, first * WINDOW_S + arrivals, rng)
        return arrivals, inputs, outputs


def _unit_gaps(cv: float, weibull_shape: float, rng: np.random.Generator) -> Iterable[F8]:
    """Batches of gaps of mean 1; before them one that is uniform, so that clients do not begin in step."""
    yield rng.random(1)
    while True:
        if math.isnan(weibull_shape):
            yield rng.gamma(1.0 / cv**2, cv**2, _BATCH)
        else:
            yield rng.weibull(weibull_shape, _BATCH) / math.gamma(1.0 + 1.0 / weibull_shape)


def _in_window(gaps: Iterable[F8], rate_rps: float) -> F8:
    timestamps: list[F8] = []
    end = 0.0
    for batch in gaps:
        cumulated = end + np.cumsum(batch)
        timestamps.append(cumulated)
        end = float(cumulated[-1])
        if end > WINDOW_S * rate_rps:
            break
    seconds = np.concatenate(timestamps) / rate_rps
    kept: F8 = seconds[seconds < WINDOW_S]
    return kept


def _lengths(client: _Client, at_s: F8, rng: np.random.Generator) -> tuple[I8, I8]:
    """Input and output tokens of requests at these timestamps of the file, drawn independently of each other."""
    starts = np.array([start_s for start_s, _, _ in client.lengths])
    window = np.maximum(np.searchsorted(starts, at_s, side="right") - 1, 0)
    u = rng.random((len(at_s), 2))
    drawn = np.zeros((len(at_s), 2))
    for w, (_, inputs, outputs) in enumerate(client.lengths):
        mine = window == w
        for k, quantiles in enumerate((inputs, outputs)):
            drawn[mine, k] = np.interp(u[mine, k], _PROBABILITIES, quantiles)
    whole = np.clip(np.rint(drawn), 1, 10**9).astype(np.int64)
    return whole[:, 0], whole[:, 1]
