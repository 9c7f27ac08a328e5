"""Least device time of requests: prices of prompt tokens, decodes and KV reads that no step takes less than. PURE.

A step's time is not a sum over its rows: the weights are read once for all of them. It is bounded from below by one
here. For every step, within `StepLimits`, of Q prompt tokens with A query-key pairs, and of decodes that read K KV
tokens, of which N are paid for (at most `StepLimits.paying`: there may be others that nobody counts),

    step_s >= token_s * Q + pair_s * A + row_s * N + kv_s * K

So what a request's tokens add up to is the least time it keeps the device busy, in whatever company it is served.

How it is made sure of: step_s = dense(Q + N) + head(rows) + attention. dense and head lie above lines. Attention is
made of tables that are linear in every argument between grid points (profiles.attention.Parts), so that the difference
of the two sides is too, but for -pair_s * q^2 / 2, which is concave: it is not negative in a cell where it is not at
the corners. Where a step takes the longer of two tables or lies above the higher of two lines, one mixture or one line
has to do so at all corners of a cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8
from nexusengine.profiles.attention import LONGEST_CHUNK, Parts
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.fitted import FittedProfile

_FEWEST_TOKENS = 2  # a row of one token counts as a decode, see DeviceProfile.step_s
_TANGENTS = (1, 64, 128, 256, 512, 1024, 2048, 8192)
_FINE = 1.3
"""Ratio between points that are added to the axes of sequences and of KV tokens."""
_MIXTURES = (0.0, 0.5, 1.0)
_PAIR_SHARES = (1.0, 0.5, 0.0)
_KV_SHARES = (1.0, 0.9, 0.75, 0.6, 0.45, 0.3, 0.0)
_ROW_SHARES = (1.0, 0.9, 0.75, 0.5)
_SPARE = 0.003
"""Share of a token's dense time that pays for the attention of chunks that are measured to take none beside others."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What no step exceeds.

    Attributes:
        max_batch_tokens: tokens of a step.
        max_running: rows of a step.
        kv_tokens: KV tokens that all rows of a step hold together.
        longest_prompt, longest: tokens of a prompt, and of a prompt and its output.
        paying: of a step's decodes, as many are paid for at most.
    """

    max_batch_tokens: int
    max_running: int
    kv_tokens: int
    longest_prompt: int
    longest: int
    paying: int


@dataclass(frozen=True, slots=True)
class StepPrices:
    """Prices in seconds, see the module.

    Attributes:
        floor_s, read_s: a step in which a decode reads n KV tokens takes at least floor_s + n * read_s.
    """

    token_s: float
    pair_s: float
    row_s: float
    kv_s: float
    floor_s: float
    read_s: float

    def prefill_s(self, prompt_tokens: F8) -> F8:
        """Least seconds of device time `[N]` that computing prompts of so many tokens takes."""
        work_s: F8 = prompt_tokens * (self.token_s + 0.5 * self.pair_s * prompt_tokens)
        return work_s

    def decodes_s(self, prompt_tokens: F8, output_tokens: F8) -> F8:
        """Least seconds of device time `[N]` of all output tokens after the first."""
        after = np.maximum(output_tokens - 1, 0)
        work_s: F8 = after * self.row_s + self.kv_s * _kv_read(prompt_tokens, after)
        return work_s

    def decodes_alone_s(self, prompt_tokens: F8, output_tokens: F8) -> F8:
        """Least seconds `[N]` between the first token and the last: each of the others needs a step of its own."""
        after = np.maximum(output_tokens - 1, 0)
        alone_s: F8 = after * self.floor_s + self.read_s * _kv_read(prompt_tokens, after)
        return alone_s


def _kv_read(prompt_tokens: F8, after: F8) -> F8:
    """KV tokens read by the steps after the first token: P + 1, P + 2, ..."""
    read: F8 = after * prompt_tokens + 0.5 * after * (after + 1)
    return read


def step_prices(profile: DeviceProfile, limits: StepLimits) -> list[StepPrices]:
    """Prices that hold for a profile, several: which of them bound a load best depends on its mix.

    Raises:
        ValueError: it is not known how the profile is made up.
    """
    tokens = np.arange(1, limits.max_batch_tokens + 1)
    rows = np.arange(1, limits.max_running + 1)
    if isinstance(profile, ComposedProfile):
        dense_s = np.array([profile.by_tokens(int(t)) for t in tokens])
        head_s = np.array([profile.head(int(r)) for r in rows])
        parts, layers = profile.attention.parts(), profile.layers
    elif isinstance(profile, FittedProfile):
        dense_s = np.array([profile.dense_s(int(t), 0) for t in tokens])
        head_s = profile.sequence_s * rows
        parts, layers = _formula(profile, limits), 1
    else:
        raise ValueError(f"the least time of a step is not known of a {type(profile).__name__}")
    return list(_Steps(dense_s, head_s, parts, layers, limits).prices())


def _formula(profile: FittedProfile, limits: StepLimits) -> Parts:
    """The attention of profiles.fit's formula: linear, without what chunks add to the reads of decodes."""
    chunks = [float(_FEWEST_TOKENS), *(float(2**i) for i in range(2, 12))]
    ends = [0.0, float(limits.longest_prompt)]
    return Parts(
        chunks,
        ends,
        [1.0, float(limits.max_running)],
        [1.0, float(limits.longest)],
        lambda q, ctx: profile.pair_s * q * (ctx + 0.5 * q),
        0.0,
        lambda n, kv: profile.kv_s * n * kv,
        None,
    )


class _Steps:
    """All steps within the limits, by cells.

    Args:
        dense_s: `[T]`, seconds of 1, 2 .. tokens.
        head_s: `[R]`, of 1, 2 .. rows.
        parts: of one layer's attention; of `layers`.
    """

    def __init__(self, dense_s: F8, head_s: F8, parts: Parts, layers: int, limits: StepLimits) -> None:
        rows = np.arange(1.0, len(head_s) + 1)
        head = max(_lines(rows, head_s), key=lambda line: line[0] + line[1] * 0.5 * len(rows))
        self._lines = [(a + head[0], b, head[1]) for a, b in _lines(np.arange(1.0, len(dense_s) + 1), dense_s)]
        self._per_token_s = float((dense_s / np.arange(1, len(dense_s) + 1)).min())
        self._floor_s = float(dense_s.min() + head_s.min())
        self._layers, self._parts = layers, parts
        paying = min(limits.paying, limits.max_running)
        self._n = _axis([*parts.decodes, *_between(1, limits.max_running), paying], 1, limits.max_running)
        self._paying = np.minimum(self._n, paying)[:, None]
        self._kv = _axis([*parts.read, *_between(1, limits.longest)], 1, limits.longest)
        self._q = _axis(_between(_FEWEST_TOKENS, limits.max_batch_tokens), _FEWEST_TOKENS, limits.max_batch_tokens)
        self._chunks = _axis(parts.chunks, _FEWEST_TOKENS, min(LONGEST_CHUNK, limits.longest_prompt))
        self._cached = _axis(parts.cached, 0, limits.longest_prompt)
        self._read = self._n[:, None] * self._kv
        low = self._n[:-1, None] * self._kv[:-1]
        self._reached = low <= limits.kv_tokens  # cells [n, kv] that a step can be in
        self._prefill_s = layers * _table(parts.prefill_s, self._chunks, self._cached)
        self._decodes_s = layers * _table(parts.decodes_s, self._n, self._kv)
        self._beside_s = None
        if parts.beside_s is not None:
            self._beside_s = layers * _table(parts.beside_s, self._chunks, self._cached, self._n, self._kv)

    def prices(self) -> Iterator[StepPrices]:
        """Of many mixtures, those that hold."""
        read_s = float((self._decodes_s / self._read).min())
        alone = [a + (b + h) * self._n[:, None] + self._decodes_s for a, b, h in self._lines]
        most_kv_s = self._least_decodes([step / self._read for step in alone])
        seen: set[float] = set()
        for pair_share in _PAIR_SHARES:
            spare_s = _SPARE * self._per_token_s if pair_share else 0.0
            pair_s = min(pair_share * self._most_pair_s(spare_s), read_s)
            if pair_s < 0.0 or pair_s in seen:
                continue
            seen.add(pair_s)
            beside_s = self._decodes_beside_s(pair_s, spare_s)
            for kv_share in _KV_SHARES:
                kv_s = max(kv_share * most_kv_s, pair_s)
                most_row_s = self._least_decodes([(step - kv_s * self._read) / self._paying for step in alone])
                for row_share in _ROW_SHARES if most_row_s > 0.0 else ():
                    row_s = row_share * most_row_s
                    token_s = min(self._most_token_s(row_s, kv_s, beside_s) - spare_s, row_s)
                    if token_s > 0.0:
                        yield StepPrices(token_s, pair_s, row_s, kv_s, self._floor_s, read_s)

    def _least_decodes(self, by_line: Sequence[F8]) -> float:
        """The least over cells `[n, kv]` of the best line's least corner."""
        best = np.max([_least_corner(grid) for grid in by_line], axis=0)
        return float(best[self._reached].min())

    def _most_pair_s(self, spare_s: float) -> float:
        """Most seconds for each pair that every chunk takes beyond a launch, if spare_s more for each token is paid."""
        q = self._chunks[:, None]
        return float(((self._prefill_s - self._launch_s + spare_s * q) / self._pairs).min())

    @property
    def _launch_s(self) -> float:
        return self._layers * self._parts.launch_s

    @property
    def _pairs(self) -> F8:
        q = self._chunks[:, None]
        pairs: F8 = q * (self._cached + 0.5 * q)
        return pairs

    def _decodes_beside_s(self, pair_s: float, spare_s: float) -> F8:
        """Seconds `[n, kv]` that attention takes at least beside any chunk, beyond what its pairs pay.

        Between the grid points it is not less than what lies on them.
        """
        if self._beside_s is None:
            return self._decodes_s
        paid_s = (pair_s * self._pairs - spare_s * self._chunks[:, None])[:, :, None, None]
        together_s = self._prefill_s[:, :, None, None] + self._beside_s - paid_s
        alone_s = self._decodes_s - paid_s
        cells = [share * together_s + (1.0 - share) * alone_s for share in _MIXTURES]
        best = np.argmax([_mean_corner(grid) for grid in cells], axis=0)
        least = np.full(self._decodes_s.shape, np.inf)
        for corner in itertools.product((0, 1), repeat=4):
            at = tuple(slice(c, c - 1 or None) for c in corner)
            values = np.choose(best, [grid[at] for grid in cells]).min(axis=(0, 1))
            there = least[at[2:]]
            np.minimum(there, values, out=there)
        return least

    def _most_token_s(self, row_s: float, kv_s: float, beside_s: F8) -> float:
        """Most seconds for each prompt token that steps with chunks take beyond the rest."""
        q = self._q
        alone = np.max([_least_corner((a + h + b * q) / q) for a, b, h in self._lines], axis=0)
        rest_s = beside_s - row_s * self._paying - kv_s * self._read
        best = np.full([len(q) - 1, *self._reached.shape], -np.inf)
        for a, b, h in self._lines:
            step_s = a + h + (b + h) * self._n[:, None] + rest_s
            grid = step_s[None] / q[:, None, None] + b
            best = np.maximum(best, _least_corner(grid))
        return min(float(alone.min()), float(best[:, self._reached].min()))


def _lines(xs: F8, ys: F8) -> list[tuple[float, float]]:
    """Lines (a, b), a + b * x, that lie below a curve and near it at some of _TANGENTS; a and b at least 0."""
    lines: set[tuple[float, float]] = set()
    for at in (t for t in _TANGENTS if t <= len(xs)):
        x, y = float(xs[at - 1]), float(ys[at - 1])
        least = float(((y - ys[: at - 1]) / (x - xs[: at - 1])).max(initial=0.0))
        most = float(((ys[at:] - y) / (xs[at:] - x)).min(initial=y / x))
        for slope in (least, most) if least <= most else (0.5 * (least + most),):
            b = max(min(slope, y / x), 0.0)
            a = float((ys - b * xs).min())
            lines.add((a, b) if a >= 0.0 else (0.0, float((ys / xs).min())))
    return sorted(lines)


def _least_corner(grid: F8) -> F8:
    """The least of each cell's corners."""
    for axis in range(grid.ndim):
        last = grid.shape[axis] - 1
        grid = np.minimum(np.take(grid, range(last), axis), np.take(grid, range(1, last + 1), axis))
    return grid


def _mean_corner(grid: F8) -> F8:
    for axis in range(grid.ndim):
        last = grid.shape[axis] - 1
        grid = 0.5 * (np.take(grid, range(last), axis) + np.take(grid, range(1, last + 1), axis))
    return grid


def _table(function: Callable[..., float], *axes: F8) -> F8:
    """Its values on the grid of the axes."""
    values = [function(*point) for point in itertools.product(*(axis.tolist() for axis in axes))]
    return np.array(values).reshape([len(axis) for axis in axes])


def _between(low: float, high: float) -> list[float]:
    """Whole numbers from low to high, each _FINE times the one before or one more."""
    points = [float(low)]
    while points[-1] < high:
        points.append(float(max(round(points[-1] * _FINE), points[-1] + 1)))
    return points


def _axis(points: Sequence[float], low: float, high: float) -> F8:
    """The points between the two ends, and the ends."""
    high = max(high, low + 1)
    return np.array([low, *sorted({p for p in points if low < p < high}), high])
