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
    c = scheduler.columns
    order = np.argsort(scheduled.counts > 1, kind="stable")
    slots, counts = scheduled.slots[order], scheduled.counts[order]
    starts = c.computed_tokens[slots]
    ends = starts + counts
    sampled = ends == c.known_tokens[slots]
    offsets = np.cumsum(counts) - counts
    token_ids = np.empty(int(counts.sum()), np.int32)
    decodes = sampled & (counts == 1)
    token_ids[offsets[decodes]] = last_token[slots[decodes]]
    for i in np.nonzero(~decodes)[0].tolist():
        state = scheduler.requests[int(slots[i])]
        tokens = state.tokens[starts[i] : min(ends[i], state.known)]
        token_ids[offsets[i] : offsets[i] + len(tokens)] = tokens
        token_ids[offsets[i] + len(tokens) : offsets[i] + counts[i]] = PENDING
    kv = scheduler.kv
    return StepBatch(slots, starts, counts, sampled, token_ids, kv.block_tables, sampling, kv.releases)
