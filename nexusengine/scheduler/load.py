"""The picture of an engine core that the router and the server see."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import I4
from nexusengine.scheduler.stats import CoreStats
from nexusengine.scheduler.view import RequestColumns
from nexusengine.slo.due import first_tokens_due_s
from nexusengine.wire import MAX_PENDING_IN_REPORT, PendingPrefill, PerfSnapshot, WorkerLoad


def worker_load(
    columns: RequestColumns,
    running: I4,
    waiting: I4,
    *,
    last_dispatch_seq: int,
    stats: CoreStats,
    perf: PerfSnapshot,
    mean_output_tokens: float,
) -> WorkerLoad:
    """running, waiting: slots as in EngineView. Nothing in the answer refers to the columns."""
    c = columns
    left = c.known_tokens[running] - c.computed_tokens[running]
    decodes = running[left == 1]
    pending = np.concatenate([running[left > 1], waiting])
    pending_left = c.known_tokens[pending] - c.computed_tokens[pending]
    deadlines_s = first_tokens_due_s(c.arrival_s[pending], c.ttft_s[pending])
    relegated = c.relegated[pending]
    first = np.lexsort((deadlines_s, relegated))[:MAX_PENDING_IN_REPORT]
    tpot_s = c.tpot_s[decodes]
    return WorkerLoad(
        last_dispatch_seq=last_dispatch_seq,
        running=len(running),
        waiting=len(waiting),
        kv_used_blocks=stats.kv_used_blocks,
        kv_total_blocks=stats.kv_total_blocks,
        step=stats.steps,
        decodes=len(decodes),
        decode_kv_tokens=int(c.computed_tokens[decodes].sum()),
        tightest_tpot_s=float(np.fmin.reduce(tpot_s, initial=np.nan)),
        pending=tuple(
            map(
                PendingPrefill,
                deadlines_s[first].tolist(),
                pending_left[first].tolist(),
                c.computed_tokens[pending[first]].tolist(),
                c.tpot_s[pending[first]].tolist(),
                relegated[first].tolist(),
            )
        ),
        pending_tokens=int(pending_left.sum()),
        mean_output_tokens=mean_output_tokens,
        perf=perf,
        counters=stats.counters(),
        relegated=int(relegated.sum()),
        relegated_tokens=int(pending_left[relegated].sum()),
    )
