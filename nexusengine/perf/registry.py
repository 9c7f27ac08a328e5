"""Step-time models by name, and predictors from snapshots."""

from __future__ import annotations

from nexusengine.errors import ConfigError
from nexusengine.perf import online
from nexusengine.perf.model import PerformanceModel, PerfSnapshot, Predictor
from nexusengine.perf.prior import GENERIC, Prior

MODELS = {"online": online.OnlineModel}


def make_model(name: str = "online", prior: Prior = GENERIC) -> PerformanceModel:
    """Raises ConfigError for a name that is not known."""
    if name not in MODELS:
        raise ConfigError(f"unknown performance model {name!r}; known: {', '.join(MODELS)}", param="performance_model")
    return MODELS[name](prior)


def rebuild(snapshot: PerfSnapshot) -> Predictor:
    """The predictor that the model had when the snapshot was taken. Raises ValueError for one that cannot be read."""
    if snapshot.kind == online.KIND:
        return online.rebuild_curve(snapshot.weights)
    raise ValueError(f"a snapshot of kind {snapshot.kind!r} is not known here; known: {online.KIND}")
