"""How long a layer of experts takes: measured by tokens and by experts that got any, read at the expected number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.profiles.base import F8
from nexusengine.profiles.curves import Surface
from nexusengine.profiles.geometry import Geometry


def expected_experts(tokens: F8, experts: int, per_token: int) -> F8:
    """How many of `experts` get at least one of `tokens` that each choose `per_token` of them evenly. Trained gates
    are less even: they reach up to a tenth fewer."""
    out: F8 = experts * (1.0 - (1.0 - per_token / experts) ** tokens)
    return out


def expert_curve(tables: Mapping[str, npt.NDArray[Any]], tokens: F8, geometry: Geometry, shards: int = 1) -> F8:
    """Microseconds of one layer's experts for `tokens [N]`.

    shards: devices that each hold an equal part of the experts and get all tokens' work for them: the tokens' load on
    one is then tokens / shards, and the experts it reads that part of all.
    """
    surface = Surface(tables["moe_tokens"], tables["moe_experts"], tables["moe_us"])
    active = expected_experts(tokens, geometry.experts, geometry.experts_per_token) / shards
    return np.array([surface(t, e) for t, e in zip((tokens / shards).tolist(), active.tolist(), strict=True)])
