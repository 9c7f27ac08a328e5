"""How long a layer of experts takes: measured by tokens and by experts that got any, read at the expected number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8
from nexusengine.profiles.curves import Curve, Surface
from nexusengine.profiles.geometry import Geometry


def expected_experts(tokens: F8, experts: int, per_token: int) -> F8:
    """Number of `experts` that get at least one of `tokens` that each choose `per_token` of them evenly.

    Trained gates are less even: they reach up to a tenth fewer.
    """
    out: F8 = experts * (1.0 - (1.0 - per_token / experts) ** tokens)
    return out


class Experts:
    """The experts of all layers."""

    def __init__(self, tables: Mapping[str, npt.NDArray[Any]], geometry: Geometry) -> None:
        self._geometry = geometry
        self._tokens = tables["moe_tokens"].astype(np.float64)
        us = tables["moe_us"].astype(np.float64)
        self._layer_s = Surface(tables["moe_tokens"], tables["moe_experts"], us * 1e-6)
        self._curves: dict[int, Curve] = {}

    def seconds(self, shards: int = 1) -> Curve:
        """Seconds of all layers' experts, by tokens.

        Args:
            shards: devices that each hold an equal part of the experts and do the work of all devices' tokens for them:
                on one, the tokens' load is then tokens / shards, and it reads that part of the experts.
        """
        if shards not in self._curves:
            g, last = self._geometry, float(self._tokens[-1]) * shards
            tokens = np.unique(np.concatenate([np.arange(1.0, 257.0), np.linspace(256.0, last, 113)]))
            active = expected_experts(tokens, g.experts, g.experts_per_token) / shards
            points = zip((tokens / shards).tolist(), active.tolist(), strict=True)
            self._curves[shards] = Curve(tokens, g.layers * np.array([self._layer_s(t, e) for t, e in points]))
        return self._curves[shards]
