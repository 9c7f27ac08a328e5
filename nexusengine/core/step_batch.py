"""From what the scheduler decided to what the executor computes."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import I4
from nexusengine.core.request import RequestState
from nexusengine.execute.batch import PENDING, StepBatch
from nexusengine.sampling.table import SamplingTable
from nexusengine.scheduler.scheduler import Scheduled, Scheduler


def step_batch(
    scheduler: Scheduler[RequestState], scheduled: Scheduled[RequestState], last_token: I4, sampling: SamplingTable
) -> StepBatch:
    """The flat batch of a step, rows that compute one token first.

    Args:
        last_token: `[S]`, the token that each slot sampled last, or PENDING.
        sampling: parameters by slot.
    """
    c, kv, slots, counts = scheduler.columns, scheduler.kv, scheduled.slots, scheduled.counts
    if np.count_nonzero(counts > 1):
        order = np.argsort(counts > 1, kind="stable")
        slots, counts = slots[order], counts[order]
    starts = c.computed_tokens[slots]
    ends = starts + counts
    sampled = ends == c.known_tokens[slots]
    decodes = sampled & (counts == 1)
    if np.count_nonzero(decodes) == len(decodes):
        return StepBatch(slots, starts, counts, sampled, last_token[slots], kv.block_tables, sampling, kv.releases)
    offsets = counts.cumsum() - counts
    token_ids = np.empty(int(counts.sum()), np.int32)
    token_ids[offsets[decodes]] = last_token[slots[decodes]]
    for i in (~decodes).nonzero()[0].tolist():
        tokens = scheduler.requests[int(slots[i])].tokens[starts[i] : ends[i]]
        known = offsets[i] + len(tokens)
        token_ids[offsets[i] : known] = tokens
        token_ids[known : offsets[i] + counts[i]] = PENDING
    return StepBatch(slots, starts, counts, sampled, token_ids, kv.block_tables, sampling, kv.releases)
