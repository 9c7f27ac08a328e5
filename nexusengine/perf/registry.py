"""Step-time models by name, and predictors from snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from nexusengine.errors import ConfigError
from nexusengine.perf.line import KIND as LINE_KIND
from nexusengine.perf.line import LineModel, rebuild_line
from nexusengine.perf.model import PerformanceModel, Predictor
from nexusengine.perf.online import KIND as ONLINE_KIND
from nexusengine.perf.online import SECONDS, OnlineModel, rebuild_curve
from nexusengine.perf.prior import GENERIC, Prior
from nexusengine.perf.surface import KIND as SURFACE_KIND
from nexusengine.perf.surface import SurfaceModel, rebuild_surface
from nexusengine.wire import PerfSnapshot

MODELS: dict[str, Callable[[Prior], PerformanceModel]] = {
    "online": OnlineModel,
    "paper-surface": SurfaceModel,
    "line": LineModel,
    "line2": partial(LineModel, by_sequences=True),
}
_TIMES = {  # which of a snapshot's weights are seconds
    ONLINE_KIND: SECONDS,
    SURFACE_KIND: range(5),
    LINE_KIND: range(3),
}
_PREDICTORS: dict[str, Callable[[Sequence[float]], Predictor]] = {
    ONLINE_KIND: rebuild_curve,
    SURFACE_KIND: rebuild_surface,
    LINE_KIND: rebuild_line,
}


def make_model(name: str = "online", prior: Prior = GENERIC) -> PerformanceModel:
    """A model by its name.

    Raises:
        ConfigError: the name is not known.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown performance model {name!r}; known: {', '.join(MODELS)}", param="performance_model")
    return MODELS[name](prior)


def rebuild(snapshot: PerfSnapshot) -> Predictor:
    """The predictor that the model was when the snapshot was taken.

    Raises:
        ValueError: it cannot be read.
    """
    _check_kind(snapshot)
    return _PREDICTORS[snapshot.kind](snapshot.weights)


def is_known(snapshot: PerfSnapshot) -> bool:
    """Whether this version has the model that the snapshot is of."""
    return snapshot.kind in _PREDICTORS


def scaled(snapshot: PerfSnapshot, factor: float) -> PerfSnapshot:
    """The snapshot of a device on which every step takes `factor` times as long.

    Raises:
        ValueError: as `rebuild`.
    """
    _check_kind(snapshot)
    weights = list(snapshot.weights)
    for i in _TIMES[snapshot.kind]:
        weights[i] *= factor
    return msgspec.structs.replace(snapshot, weights=tuple(weights))


def _check_kind(snapshot: PerfSnapshot) -> None:
    if snapshot.kind not in _PREDICTORS:
        raise ValueError(f"a snapshot of kind {snapshot.kind!r} is not known here; known: {', '.join(_PREDICTORS)}")
