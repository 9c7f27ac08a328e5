"""Scheduler policies by the name used on the command line; a module is imported only when its policy is chosen."""

from __future__ import annotations

from nexusengine import policy_spec
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


def make_policy(spec: str) -> SchedulerPolicy:
    """The policy of a spec, `name` or `name:key=value,key=value`; values are numbers.

    Raises:
        ConfigError: the name or an option is not known.
    """
    policy: SchedulerPolicy = policy_spec.make_policy(spec, POLICIES, kind="engine policy", param="scheduler")
    return policy
