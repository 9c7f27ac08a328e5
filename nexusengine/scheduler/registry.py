"""Scheduler policies by the name used on the command line; a module is imported only when its policy is chosen."""

from __future__ import annotations

import importlib

from nexusengine.errors import ConfigError
from nexusengine.scheduler.plan import SchedulerPolicy

POLICIES: dict[str, str] = {
    "fcfs": "nexusengine.scheduler.baselines.fcfs:FCFS",
    "vllm": "nexusengine.scheduler.baselines.vllm:Vllm",
    "sarathi": "nexusengine.scheduler.baselines.ordered:Sarathi",
    "prefill-first": "nexusengine.scheduler.baselines.prefill_first:PrefillFirst",
    "edf": "nexusengine.scheduler.baselines.ordered:EDF",
    "srpt": "nexusengine.scheduler.baselines.ordered:SRPT",
    "paper-lens": "nexusengine.scheduler.baselines.nexussched:PaperLens",
    "lens": "nexusengine.scheduler.lens.policy:Lens",
}


OFFLINE = {"lens": "lens:cap_ms=500"}
"""Specs for an engine in its caller's thread, by what is asked for: few come while it computes a step, so that none is
kept short for newcomers."""


def make_policy(spec: str) -> SchedulerPolicy:
    """`name` or `name:key=value,key=value`; values are numbers. Raises ConfigError naming what is unknown."""
    name, _, rest = spec.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown engine policy {name!r}; known: {', '.join(sorted(POLICIES))}", param="scheduler")
    options: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, sep, value = item.partition("=")
        try:
            if not sep:
                raise ValueError
            options[key.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"policy option {item!r} is not of the form key=number in {spec!r}", param="scheduler"
            ) from None
    module, _, attribute = POLICIES[name].partition(":")
    try:
        policy: SchedulerPolicy = getattr(importlib.import_module(module), attribute)(**options)
    except TypeError as error:
        raise ConfigError(f"policy {name!r} does not take these options: {error}", param="scheduler") from None
    return policy
