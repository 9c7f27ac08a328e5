"""What is to be sent and when: the simulator's workloads, as a client sends them."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.errors import ConfigError
from nexusengine.sim.job import TraceBlocks
from nexusengine.sim.workload.build import Workload
from nexusengine.types import SLO


@dataclass(frozen=True, slots=True)
class WorkItem:
    """send_at_s: from the beginning of the run. The answer is exactly output_tokens long.

    slo_class, slo: what is asked for, and by what the client judges. blocks: prompts whose first block ids are equal
    begin with the same tokens. tenant: sent as `user`.
    """

    send_at_s: float
    prompt_tokens: int
    output_tokens: int
    slo: SLO | None = None
    slo_class: str | None = None
    blocks: TraceBlocks | None = None
    tenant: str | None = None


def items_of(workload: Workload) -> list[WorkItem]:
    """In order of sending. Raises ConfigError for closed loops: what they send next depends on answers."""
    if any(job.then is not None for job in workload.jobs):
        raise ConfigError("a trace of sessions is a closed loop, and this client sends at fixed times", param="trace")
    return [
        WorkItem(
            job.request.arrival_s,
            job.prompt_tokens,
            job.output_tokens,
            job.request.slo,
            job.request.slo_class,
            job.blocks,
            job.request.tenant,
        )
        for job in workload.jobs
    ]
