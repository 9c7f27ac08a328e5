"""Interpolation in measured tables: one axis, two axes, and the joint attention table. Times in, times out, one unit.

Everything is linear on linear axes between grid points and goes on with the slope of the last segment behind them:
against the points of the 1.5x grid that the tables were not interpolated from, this is right to 1.3 % in the median
and unbiased, where interpolation on log axes is 4 % too high (time is close to linear in tokens, so convex in its log).
Tables are nested lists of Python floats: a scalar look-up in them is several times faster than in a numpy array.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from nexusengine.profiles.base import F8

_TABULATED = 4096


class Curve:
    """A function of a whole number >= 0, measured at `xs` (increasing) as `ys`.

    Behind the last point it goes on with the mean slope of the last half of the axis: the last segment alone may hold
    nothing but the edge of a tile. Before the first point it is constant.
    """

    def __init__(self, xs: Sequence[float] | F8, ys: Sequence[float] | F8) -> None:
        x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
        self._last = float(x[-1])
        self._at_last = float(y[-1])
        half = float(np.interp(x[-1] / 2, x, y))
        self._slope = max((self._at_last - half) / (self._last / 2), 0.0) if len(x) > 1 else 0.0
        grid = np.arange(_TABULATED + 1, dtype=np.float64)
        inside = np.interp(grid, x, y)
        self._table: list[float] = np.where(
            grid > self._last, self._at_last + (grid - self._last) * self._slope, inside
        ).tolist()

    def __call__(self, x: int) -> float:
        if x <= _TABULATED:
            return self._table[x]
        return self._at_last + (x - self._last) * self._slope


class Surface:
    """A function of two numbers, bilinear in a full grid `[len(xs), len(ys)]`, extrapolated from the last segments."""

    def __init__(self, xs: Sequence[float] | F8, ys: Sequence[float] | F8, grid: F8) -> None:
        self._xs: list[float] = np.asarray(xs, np.float64).tolist()
        self._ys: list[float] = np.asarray(ys, np.float64).tolist()
        self._grid: list[list[float]] = np.asarray(grid, np.float64).tolist()
        self._rows: dict[float, F8] = {}
        far = self._ys[-1] * 64
        self._far_ys = np.array([*self._ys, far])

    def __call__(self, x: float, y: float) -> float:
        i, f = locate(self._xs, x)
        j, g = locate(self._ys, y)
        low, high = self._grid[i], self._grid[i + 1]
        a = low[j] + g * (low[j + 1] - low[j])
        return a + f * (high[j] + g * (high[j + 1] - high[j]) - a)

    def along(self, x: float, ys: F8) -> F8:
        """The values at one `x` and many `ys`."""
        row = self._rows.get(x)
        if row is None:
            row = np.array([self(x, y) for y in self._far_ys.tolist()])
            self._rows[x] = row
        return np.interp(ys, self._far_ys, row)


def locate(axis: list[float], x: float) -> tuple[int, float]:
    """The segment of `axis` that holds x, and where in it: below 0 never, above 1 behind the last point."""
    i = bisect_right(axis, x) - 1
    if i < 0:
        return 0, 0.0
    if i > len(axis) - 2:
        i = len(axis) - 2
    low = axis[i]
    return i, (x - low) / (axis[i + 1] - low)


class Quad:
    """A function of four numbers, linear in each, on a full grid; as Surface."""

    def __init__(self, axes: Sequence[Sequence[float] | F8], grid: F8) -> None:
        self._axes = [np.asarray(a, np.float64).tolist() for a in axes]
        self._grid: list[list[list[list[float]]]] = np.asarray(grid, np.float64).tolist()

    def __call__(self, a: float, b: float, c: float, d: float) -> float:
        axes = self._axes
        i, fi = locate(axes[0], a)
        j, fj = locate(axes[1], b)
        k, fk = locate(axes[2], c)
        m, fm = locate(axes[3], d)
        low, high = self._grid[i], self._grid[i + 1]
        x = _cell(low[j], low[j + 1], fj, k, fk, m, fm)
        return x + fi * (_cell(high[j], high[j + 1], fj, k, fk, m, fm) - x)


def _cell(low: list[list[float]], high: list[list[float]], fj: float, k: int, fk: float, m: int, fm: float) -> float:
    r, s, t, u = low[k], low[k + 1], high[k], high[k + 1]
    n = m + 1
    a = r[m] + fm * (r[n] - r[m])
    a += fk * (s[m] + fm * (s[n] - s[m]) - a)
    b = t[m] + fm * (t[n] - t[m])
    b += fk * (u[m] + fm * (u[n] - u[m]) - b)
    return a + fj * (b - a)
