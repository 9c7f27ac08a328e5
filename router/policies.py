"""Placement policies by the name used on the command line; imported when chosen."""

from __future__ import annotations

import importlib

from nexusengine.errors import ConfigError
from nexusengine.router.policy import PlacementPolicy

POLICIES: dict[str, str] = {
    "least-outstanding": "nexusengine.router.least_outstanding:LeastOutstanding",
    "round-robin": "nexusengine.router.least_outstanding:RoundRobin",
}


def make_policy(name: str) -> PlacementPolicy:
    """Raises ConfigError listing what is known."""
    if name not in POLICIES:
        raise ConfigError(f"unknown placement policy {name!r}; known: {', '.join(sorted(POLICIES))}", param="router")
    module, _, attribute = POLICIES[name].partition(":")
    policy: PlacementPolicy = getattr(importlib.import_module(module), attribute)()
    return policy
