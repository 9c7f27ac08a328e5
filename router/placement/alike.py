"""What is believed of a worker whose performance model has seen few steps: that it is as fast as others alike. PURE."""

from __future__ import annotations

from collections.abc import Sequence

from nexusengine.router.placement.policy import WorkerView
from nexusengine.wire import PerfSnapshot

TRUSTED_STEPS = 10
_LEAST_ERROR, _MOST_ERROR = 0.025, 0.4

Kind = tuple[str, str, str, str]


def models_of(workers: Sequence[WorkerView]) -> list[PerfSnapshot | None]:
    """The performance model to predict each worker's steps with.

    Its own once that has learned from TRUSTED_STEPS steps. Before, of all workers on the same kind of device that serve
    the same model, the one that has learned from most: a new worker is neither avoided nor preferred for what its prior
    errs by. None where nobody has reported one.
    """
    own = [w.load.perf if w.load is not None else None for w in workers]
    if all(perf is not None and perf.steps >= TRUSTED_STEPS for perf in own):
        return own
    most: dict[Kind, PerfSnapshot] = {}
    for worker, perf in zip(workers, own, strict=True):
        if perf is not None and ((known := most.get(kind_of(worker))) is None or perf.steps > known.steps):
            most[kind_of(worker)] = perf
    return [
        perf if perf is not None and perf.steps >= TRUSTED_STEPS else most.get(kind_of(worker))
        for worker, perf in zip(workers, own, strict=True)
    ]


def error_of(perf: PerfSnapshot | None) -> float:
    """The share by which completions predicted with a model may be off: the scatter it has seen, within bounds."""
    if perf is None or perf.steps < TRUSTED_STEPS:
        return _MOST_ERROR
    return min(max(perf.quantile - 1.0, _LEAST_ERROR), _MOST_ERROR)


def kind_of(worker: WorkerView) -> Kind:
    """Workers of one kind are expected to be equally fast."""
    info = worker.info
    return info.device, info.model, info.dtype, info.attention_backend
