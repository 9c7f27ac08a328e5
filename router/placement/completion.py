"""When a worker is done with a request that has no SLO: after all that was given to the worker, decode included. PURE.

What was given comes from the router's own ledger, which is never stale; only the speed comes from the worker's report.
So two equal workers look equal whatever the age of their reports.
"""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8
from nexusengine.router.placement.forecast import Estimates
from nexusengine.router.placement.policy import PlacementRequest

_UNKNOWN_OUTPUT = 256.0


def expected_output(request: PlacementRequest, mean_output: F8) -> float:
    """Output tokens that a request is expected to have.

    Args:
        mean_output: `[W]`, tokens of an answer by worker, 0 where none is known. The same mean is used for all workers:
            one that has not finished any request yet is not quicker for that.
    """
    known = mean_output[mean_output > 0.0]
    limit = float(request.max_tokens) or np.inf
    return min(float(known.mean()) if len(known) else min(limit, _UNKNOWN_OUTPUT), limit)


def completion_s(estimates: Estimates[F8], prompt_tokens: int, service_s: F8, output: float) -> F8:
    """Seconds `[W]` until each worker has served all that was given to it and one request more.

    Prompts that wait are computed one after the other, and all sequences decode side by side; where not all fit into a
    step or into the KV cache, in as many rounds as it takes.

    Args:
        prompt_tokens: of the request.
        service_s: `[W]`, seconds that its prompt keeps the worker busy.
        output: tokens of an answer.
    """
    e = estimates
    count = e.outstanding + 1.0
    mean_prompt = (e.prompt_tokens + prompt_tokens) / count
    fit = np.maximum(np.minimum(e.max_running, e.kv_capacity / (mean_prompt + output)), 1.0)
    at_once = np.minimum(count, fit)
    step_s = e.empty_step_s + at_once * (e.per_row_s + e.per_kv_s * (mean_prompt + 0.5 * output))
    done_s: F8 = e.waiting_s + service_s + output * step_s * (count / at_once)
    return done_s
