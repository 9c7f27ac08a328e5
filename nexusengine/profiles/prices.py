"""What an hour of a device costs, where nothing better is said: indicative, in US dollars. PURE.

RunPod's documentation of serverless "active" workers (docs.runpod.io/serverless/pricing), dollars a second times 3600,
as of early 2026. One price list, so that devices compare; what you pay differs: `nexusengine plan --prices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PRICES_PER_HOUR: Mapping[str, float] = MappingProxyType(
    {
        "b200": 0.00190 * 3600,
        "h200": 0.00124 * 3600,
        "h100": 0.00093 * 3600,
        "a100": 0.00060 * 3600,
        "l40s": 0.00037 * 3600,
        "a6000": 0.00024 * 3600,
        "rtx4090": 0.00021 * 3600,
        "l4": 0.00013 * 3600,
    }
)
