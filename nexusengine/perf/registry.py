"""Step-time models by name, and predictors from snapshots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from nexusengine.errors import ConfigError
from nexusengine.perf.line import KIND as LINE_KIND
from nexusengine.perf.line import LineModel, rebuild_line
from nexusengine.perf.model import PerformanceModel, PerfSnapshot, Predictor
from nexusengine.perf.online import KIND as ONLINE_KIND
from nexusengine.perf.online import OnlineModel, rebuild_curve
from nexusengine.perf.prior import GENERIC, Prior
from nexusengine.perf.surface import KIND as SURFACE_KIND
from nexusengine.perf.surface import SurfaceModel, rebuild_surface

MODELS: dict[str, Callable[[Prior], PerformanceModel]] = {
    "online": OnlineModel,
    "paper-surface": SurfaceModel,
    "line": LineModel,
    "line2": partial(LineModel, by_sequences=True),
}
_PREDICTORS: dict[str, Callable[[Sequence[float]], Predictor]] = {
    ONLINE_KIND: rebuild_curve,
    SURFACE_KIND: rebuild_surface,
    LINE_KIND: rebuild_line,
}


def make_model(name: str = "online", prior: Prior = GENERIC) -> PerformanceModel:
    """Raises ConfigError for a name that is not known."""
    if name not in MODELS:
        raise ConfigError(f"unknown performance model {name!r}; known: {', '.join(MODELS)}", param="performance_model")
    return MODELS[name](prior)


def rebuild(snapshot: PerfSnapshot) -> Predictor:
    """The predictor that the model was when the snapshot was taken. Raises ValueError for one that cannot be read."""
    if snapshot.kind not in _PREDICTORS:
        raise ValueError(f"a snapshot of kind {snapshot.kind!r} is not known here; known: {', '.join(_PREDICTORS)}")
    return _PREDICTORS[snapshot.kind](snapshot.weights)
