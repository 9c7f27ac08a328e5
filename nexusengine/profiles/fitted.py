"""A profile that is a formula: fitted to measured steps, or recorded by a user (see profiles.fit)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.profiles.base import ProfileIdentity
from nexusengine.profiles.fit import FEATURES, KNEES
from nexusengine.profiles.noise import Noise


class FittedProfile:
    """A profile that is the formula of profiles.fit.

    Args:
        identity: of the profile.
        weights_s: of profiles.fit's features, in seconds.
        noise: scatter of steps.

    Attributes:
        sequence_s, pair_s, kv_s: seconds for each sequence, query-key pair of a chunk, and KV token that decodes read.
    """

    def __init__(self, identity: ProfileIdentity, *, weights_s: Sequence[float], noise: Noise) -> None:
        if len(weights_s) != FEATURES:
            raise ValueError(f"{len(weights_s)} weights were given, the formula has {FEATURES}")
        self.identity = identity
        w = [float(v) for v in weights_s]
        self._base, self._mixed, self._token = w[0], w[1], w[2] / 100
        self._knees = [(knee, value / 100) for knee, value in zip(KNEES, w[3:], strict=False)]
        n, prefills, pairs, kv, mixed_kv = w[3 + len(KNEES) :]
        self.sequence_s, self._prefill, self.pair_s = n / 100, prefills, pairs / 1e6
        self.kv_s, self._mixed_kv = kv / 1e4, mixed_kv / 1e4
        self._noise = noise

    def step_s(self, counts: I4, contexts: I4) -> float:
        tokens, rows = int(np.add.reduce(counts)), len(counts)
        kv = int(np.add.reduce(contexts)) + rows
        total = self.dense_s(tokens, rows)
        if tokens == rows:
            return total + self.kv_s * kv
        at = np.flatnonzero(counts > 1)
        pairs = 0.0
        for q, ctx in zip(counts[at].tolist(), contexts[at].tolist(), strict=True):
            pairs += q * (ctx + 0.5 * q)
            kv -= ctx + 1
        total += self._mixed + self._prefill * len(at) + self.pair_s * pairs
        return total + (self.kv_s + self._mixed_kv) * kv

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        rows = len(contexts)
        kv = int(np.add.reduce(contexts)) + rows * np.arange(1, steps + 1, dtype=np.float64)
        run: F8 = self.dense_s(rows, rows) + self.kv_s * kv
        return run

    def noise(self, u: F8, mixed: bool) -> F8:
        return self._noise(u, mixed)

    def dense_s(self, tokens: int, rows: int) -> float:
        """Seconds of a step without its attention and what chunks cost."""
        total = self._base + self._token * tokens + self.sequence_s * rows
        for knee, slope in self._knees:
            if tokens <= knee:
                break
            total += slope * (tokens - knee)
        return total
