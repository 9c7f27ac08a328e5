"""Least squares with non-negative weights, from the normal equations."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8

_ROUNDS = 64
_CONDITION = 1e-9
_SMALLEST_GAIN = 1e-9


def solve(gram: F8, moment: F8, start: F8) -> F8:
    """The w >= 0 that minimises w·gram·w / 2 - moment·w.

    By the active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23), begun with the
    positive weights of `start`. Where rounding keeps it from an end it returns the best it has after 64 rounds; it
    never returns a negative or non-finite weight.

    Args:
        gram: `[n, n]` with a positive diagonal.
        moment: `[n]`.
        start: `[n]`, >= 0.
    """
    g, scale = _scaled(gram)
    m = moment * scale
    x = start / scale
    passive = x > 0.0
    for _ in range(_ROUNDS):
        chosen = np.nonzero(passive)[0]
        if len(chosen):
            wanted = np.linalg.solve(g[chosen[:, None], chosen], m[chosen])
            if wanted.min() <= 0.0:  # walk towards it until the first weight becomes zero, and fix that one there
                here = x[chosen]
                falling = wanted <= 0.0
                part = (here[falling] / np.maximum(here[falling] - wanted[falling], 1e-300)).min()
                here = here + part * (wanted - here)
                here[falling & (here <= 1e-12 * here.max())] = 0.0
                if here.min() > 0.0:
                    here[np.argmin(np.where(falling, here, np.inf))] = 0.0
                x[chosen] = here
                passive[chosen[here <= 0.0]] = False
                continue
            x[:] = 0.0
            x[chosen] = wanted
        gain = m - g @ x
        gain[passive] = 0.0
        best = int(gain.argmax())
        if gain[best] <= _SMALLEST_GAIN * max(abs(m[best]), 1e-300):
            break
        passive[best] = True
    weights: F8 = np.maximum(x, 0.0) * scale
    return weights if np.isfinite(weights).all() else start


def leverage(gram: F8, row: F8) -> float:
    """row · gram^-1 · row: the share that one more observation `row` has in its own prediction, if it is small."""
    g, scale = _scaled(gram)
    r = row * scale
    return float(r @ np.linalg.solve(g, r))


def _scaled(gram: F8) -> tuple[F8, F8]:
    """With a diagonal of ones, a little more of it than there was, and what rows and columns were multiplied with."""
    scale = 1.0 / np.sqrt(np.diagonal(gram))
    g = gram * scale[:, None] * scale
    g.flat[:: len(g) + 1] += _CONDITION
    return g, scale
