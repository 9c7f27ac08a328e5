"""Placement policies by the name used on the command line; imported when chosen."""

from __future__ import annotations

import importlib

from nexusengine.errors import ConfigError
from nexusengine.router.placement.policy import PlacementPolicy

_BASELINES = "nexusengine.router.placement.baselines"

POLICIES: dict[str, str] = {
    "round-robin": f"{_BASELINES}:RoundRobin",
    "rr-veto": f"{_BASELINES}:RoundRobinVeto",
    "least-requests": f"{_BASELINES}:LeastRequests",
    "least-outstanding": f"{_BASELINES}:LeastRequests",
    "least-tokens": f"{_BASELINES}:LeastTokens",
    "p2c": f"{_BASELINES}:PowerOfTwo",
    "capacity-weighted": f"{_BASELINES}:CapacityWeighted",
    "cache-aware": "nexusengine.router.placement.affinity:CacheAware",
    "lmetric": "nexusengine.router.placement.affinity:LMetric",
    "paper-prism": "nexusengine.router.placement.nexussched:PaperPrism",
    "prism": "nexusengine.router.placement.prism:Prism",
}


def make_policy(spec: str) -> PlacementPolicy:
    """`name` or `name:key=value,key=value`; values are numbers. Raises ConfigError naming what is unknown."""
    name, _, rest = spec.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown placement policy {name!r}; known: {', '.join(sorted(POLICIES))}", param="router")
    options: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, sep, value = item.partition("=")
        try:
            if not sep:
                raise ValueError
            options[key.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"policy option {item!r} is not of the form key=number in {spec!r}", param="router"
            ) from None
    module, _, attribute = POLICIES[name].partition(":")
    try:
        policy: PlacementPolicy = getattr(importlib.import_module(module), attribute)(**options)
    except TypeError as error:
        raise ConfigError(f"policy {name!r} does not take these options: {error}", param="router") from None
    return policy
