"""A device profile by formula, for tests that are about the simulator and not about devices."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.profiles.base import ProfileIdentity


class FormulaProfile:
    """5 ms + 20 us a token + 40 ns a KV token read + 1 ns a token pair; no scatter."""

    def __init__(self, kv_capacity_tokens: int = 100_000, speed: float = 1.0) -> None:
        device = f"formula at {speed:g}"
        self.identity = ProfileIdentity(device, "any", "made up", "roofline", kv_capacity_tokens, weights_bytes=0)
        self.speed = speed

    def step_s(self, counts: I4, contexts: I4) -> float:
        q, ctx = counts.astype(np.float64), contexts.astype(np.float64)
        one = q == 1
        pairs = (q * (ctx + 0.5 * q))[~one].sum()
        return float(0.005 + 20e-6 * q.sum() + 40e-9 * ctx[one].sum() + 1e-9 * pairs) / self.speed

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        n = len(contexts)
        read = contexts.astype(np.float64).sum() + n * np.arange(steps)
        seconds: F8 = (0.005 + 20e-6 * n + 40e-9 * read) / self.speed
        return seconds

    def noise(self, u: F8, mixed: bool) -> F8:
        return 1.0 + 0.1 * (u - 0.5)
