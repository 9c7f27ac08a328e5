"""A core's recent steps, and the history of one request, as they travel to whoever asks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nexusengine.core.history import Change, Life
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.stats import StepRecord
from nexusengine.slo.resolve import NONE
from nexusengine.wire import MAX_CHANGES_IN_ANSWER, MAX_STEPS_IN_ANSWER, RequestChange, RequestHistory, StepHistory


def step_histories(records: Sequence[StepRecord], last: int) -> tuple[StepHistory, ...]:
    """Of the newest `last` steps, oldest first."""
    wanted = min(last, MAX_STEPS_IN_ANSWER, len(records))
    return tuple(_step(r) for r in itertools.islice(records, len(records) - wanted, None))


def _step(r: StepRecord) -> StepHistory:
    f = r.features
    return StepHistory(
        step=r.step,
        started_s=r.started_s,
        tokens=f.tokens,
        sequences=f.sequences,
        prefills=f.prefills,
        prefill_attention=f.prefill_attention,
        decode_kv_tokens=f.decode_kv_tokens,
        predicted_s=r.predicted_s,
        upper_s=r.upper_s,
        device_s=r.device_s,
        scheduler_s=r.scheduler_s,
        running=r.running,
        waiting=r.waiting,
        preempted=r.preempted,
        reasons={reason.name.lower(): r.reasons[reason] for reason in Reason if reason and r.reasons[reason]},
        notes=r.notes,
    )


def request_history(life: Life, changes: Sequence[Change], records: Sequence[StepRecord], now: float) -> RequestHistory:
    """records: of successive steps. now: the instant of asking, on the clock of all others."""
    t, s, slo = life.timings, life.service, life.slo
    shown = changes[-MAX_CHANGES_IN_ANSWER:]
    first = records[0].step if records else 0
    numbers = sorted({c.step for c in shown if 0 <= c.step - first < len(records)})[-MAX_STEPS_IN_ANSWER:]
    return RequestHistory(
        request_id=life.request_id,
        worker_id=s.worker,
        slo_class=life.slo_class or NONE,
        ttft_s=None if slo is None else slo.ttft_s,
        tpot_s=None if slo is None else slo.tpot_s,
        e2e_s=None if slo is None else slo.e2e_s,
        priority=life.priority,
        prompt_tokens=life.prompt_tokens,
        cached_tokens=life.cached_tokens,
        output_tokens=t.output_tokens,
        preemptions=life.preemptions,
        predicted_ttft_s=s.predicted_ttft_s,
        unattainable=s.unattainable,
        strict=s.strict,
        arrival_s=t.arrival_s,
        scheduled_s=t.scheduled_s,
        first_token_s=t.first_token_s,
        finished_s=t.finished_s,
        now_s=now,
        finish_reason=life.finish_reason,
        error=life.error,
        changes=tuple(RequestChange(c.at_s, c.step, c.reason.name.lower(), c.tokens) for c in shown),
        changes_left_off=len(changes) - len(shown),
        steps=tuple(_step(records[number - first]) for number in numbers),
    )
