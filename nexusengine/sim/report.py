"""What a simulation says about itself: the keys of `nexusengine sim ... --json`.

Every offered request counts in attainment; one that was refused, failed or did not finish has missed. Latencies are
those of requests that got that far: TTFT of all with a first token, TPOT and end-to-end of all that completed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from nexusengine.arrays import F8
from nexusengine.sim.cluster import Cluster, Outcome
from nexusengine.sim.verdicts import Table, longest_tenth, tabulate
from nexusengine.sim.worker import SimWorker

_DIGITS = 6


def report(cluster: Cluster, outcomes: Sequence[Outcome], duration_s: float) -> dict[str, Any]:
    """Rounded to six significant digits; None where there is nothing to say."""
    table = tabulate(outcomes, cluster.now)
    n = len(outcomes)
    completed = ~np.isnan(table.last_s)
    weights = (table.prompt_tokens + table.output_tokens).astype(np.float64)
    planning_s = np.concatenate([np.asarray(e.planning_s) for w in cluster.workers for e in w.engines])
    placing_s = np.asarray(cluster.placing_s)
    end_s = float(np.max(table.last_s[completed])) if completed.any() else math.nan
    busy_s = end_s - float(table.arrival_s[0])
    engines = [e for w in cluster.workers for e in w.engines]
    prompt_tokens = sum(e.stats.prompt_tokens for e in engines)
    result = {
        "offered": n,
        "completed": int(completed.sum()),
        "attainment": table.met.mean(),
        "attainment_strict": table.strict.mean(),
        "attainment_by_class": _by_class(table, table.met),
        "attainment_strict_by_class": _by_class(table, table.strict),
        "attainment_longest_decile": table.met[longest_tenth(table.prompt_tokens)].mean(),
        "attainment_token_weighted": float((table.met * weights).sum() / weights.sum()),
        "attainment_by_prompt_decile": _by_decile(table),
        "missed": dict(Counter(m for m in table.missed if m)),
        "ttft_ms": _percentiles(table.ttft_s),
        "tpot_ms": _percentiles(table.tpot_s),
        "e2e_ms": _percentiles(table.e2e_s),
        "output_tokens_per_s": float(table.output_tokens[completed].sum()) / busy_s if busy_s > 0 else None,
        "goodput_tokens_per_s": float(table.output_tokens[table.met].sum()) / busy_s if busy_s > 0 else None,
        "offered_rps": n / duration_s if duration_s > 0 else None,
        "worst_wait_s": table.waited_s.max(),
        "worst_wait_s_relegated": table.waited_s[table.relegated].max(initial=0.0),
        "preemptions": int(table.preemptions.sum()),
        "relegated": int(table.relegated.sum()),
        "refused": table.missed.count("refused"),
        "prefix_hit_rate": sum(e.stats.cached_tokens for e in engines) / max(prompt_tokens, 1),
        "scheduler_ms_p50": 1e3 * np.median(planning_s) if len(planning_s) else None,
        "scheduler_ms_p99": 1e3 * np.percentile(planning_s, 99) if len(planning_s) else None,
        "router_ms_p50": 1e3 * np.median(placing_s) if len(placing_s) else None,
        "router_ms_p99": 1e3 * np.percentile(placing_s, 99) if len(placing_s) else None,
        "simulated_s": cluster.now,
        "steps": sum(e.stats.steps for e in engines),
        "plans": len(planning_s),
        "workers": [_worker(w, outcomes, cluster.now) for w in cluster.workers],
        "stopped_early": cluster.stopped_early,
    }
    rounded: dict[str, Any] = rounded_numbers(result)
    return rounded


def rounded_numbers(value: Any) -> Any:
    """Floats to six significant digits, NaN to None, numpy numbers to Python's; containers inside out."""
    if isinstance(value, dict):
        return {key: rounded_numbers(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded_numbers(v) for v in value]
    if isinstance(value, float | np.floating):
        number = float(value)
        return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def _percentiles(seconds: F8) -> dict[str, float]:
    """Milliseconds."""
    seconds = seconds[~np.isnan(seconds)]
    if not len(seconds):
        return dict.fromkeys(("mean", "p50", "p90", "p99"), math.nan)
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99))
    return {"mean": 1e3 * seconds.mean(), "p50": 1e3 * p50, "p90": 1e3 * p90, "p99": 1e3 * p99}


def _by_class(table: Table, met: np.ndarray) -> dict[str, float]:
    names = np.array(table.slo_class)
    return {name: float(met[names == name].mean()) for name in sorted(set(table.slo_class))}


def _by_decile(table: Table) -> list[float]:
    """Attainment of each tenth of the requests by prompt length, the shortest first."""
    order = np.argsort(table.prompt_tokens, kind="stable")
    return [float(part.mean()) if len(part) else math.nan for part in np.array_split(table.met[order], 10)]


def _worker(worker: SimWorker, outcomes: Sequence[Outcome], end_s: float) -> dict[str, Any]:
    served = sum(o.worker == worker.info.worker_id and o.error is None for o in outcomes)
    stats = [e.stats for e in worker.engines]
    blocks = worker.engine.kv.total_blocks
    return {
        "worker": worker.info.worker_id,
        "device": worker.info.device,
        "completed": served,
        "share": served / max(len(outcomes), 1),
        "busy": sum(s.device_s for s in stats) / end_s if end_s > 0 else 0.0,
        "steps": sum(s.steps for s in stats),
        "computed_tokens": sum(s.computed_tokens for s in stats),
        "generated_tokens": sum(s.generated_tokens for s in stats),
        "preemptions": sum(s.preemptions for s in stats),
        "kv_peak": max(e.kv_peak_blocks for e in worker.engines) / blocks,
        "kv_capacity_tokens": blocks * worker.engine.kv.block_size,
        "prediction_error": stats[-1].prediction_error,
        "coverage": stats[-1].coverage,
        "restarts": worker.restarts,
    }
