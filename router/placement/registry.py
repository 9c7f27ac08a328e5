"""Placement policies by the name used on the command line; imported when chosen."""

from __future__ import annotations

from nexusengine import policy_spec
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
    """The policy of a spec, `name` or `name:key=value,key=value`; values are numbers.

    Raises:
        ConfigError: the name or an option is not known.
    """
    policy: PlacementPolicy = policy_spec.make_policy(spec, POLICIES, kind="placement policy", param="router")
    return policy
