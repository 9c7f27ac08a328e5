"""Step-time models for simulated engines: the one that learns online, one that knows, and one that errs."""

from __future__ import annotations

import math

import numpy as np

from nexusengine.arrays import F8
from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures, duration
from nexusengine.perf.kinds import RecentError, RecentErrors, stratum
from nexusengine.perf.model import PerformanceModel, StepTime
from nexusengine.perf.prior import probes
from nexusengine.perf.registry import MODELS, make_model, scaled
from nexusengine.profiles.base import DeviceProfile
from nexusengine.wire import PerfSnapshot

_QUANTILE = 0.95
_LESSONS, _MOST_DECODES, _CONTEXTS, _LONGEST_CHUNK = 2000, 256, (1, 4096), 8192


def make_sim_model(spec: str, profile: DeviceProfile) -> PerformanceModel:
    """A performance model by its name (see perf.registry).

    `oracle` answers the profile's own mean; `scaled:F` is the online one, wrong by the factor F. Raises ConfigError.
    """
    if spec in MODELS:
        return make_ready(spec, profile)
    if spec == "oracle":
        return Oracle(profile)
    kind, _, value = spec.partition(":")
    try:
        factor = float(value) if kind == "scaled" else math.nan
    except ValueError:
        factor = math.nan
    if not 0.01 <= factor <= 100:
        raise ConfigError(
            f"perf is {', '.join(MODELS)}, oracle or scaled:F with F from 0.01 to 100, got {spec!r}", param="perf"
        )
    return Scaled(make_ready("online", profile), factor)


def make_ready(name: str, profile: DeviceProfile) -> PerformanceModel:
    """As a worker has it when it is ready: taught by some steps of the device at start-up, here without scatter."""
    model, oracle = make_model(name), Oracle(profile)
    for features in probes():
        model.observe(features, oracle.predict(features).mean_s)
    return model


class Oracle:
    """Answers the mean that the profile gives for a step with these features, learning nothing.

    Features do not say how tokens are spread over rows: equal chunks and equal contexts are assumed, which is exact for
    a profile that is linear in the sums. The upper bound is the mean and the measured scatter's 95 % quantile. What it
    shows to the router is an online model that was taught by it.
    """

    def __init__(self, profile: DeviceProfile) -> None:
        self._profile = profile
        self._factor = {mixed: float(profile.noise(np.array([_QUANTILE]), mixed)[0]) for mixed in (False, True)}
        self._taught: PerfSnapshot | None = None

    def predict(self, features: StepFeatures) -> StepTime:
        mean_s = self._mean(
            features.tokens,
            features.sequences,
            features.prefills,
            features.prefill_attention,
            features.decode_kv_tokens,
        )
        return StepTime(mean_s, mean_s * self._factor[features.prefills > 0])

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        columns = np.broadcast_arrays(tokens, sequences, prefills, prefill_attention, decode_kv_tokens)
        rows = zip(*(np.asarray(c, np.float64).ravel().tolist() for c in columns), strict=True)
        return np.array([self._mean(*row) for row in rows]).reshape(columns[0].shape)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        del features, seconds

    observe_cold = observe

    def expect_change(self) -> None:
        """It knows what there is to know."""

    def recent_error(self, features: StepFeatures) -> RecentError:
        del features
        return RecentError(_LESSONS, 0.0)

    def snapshot(self) -> PerfSnapshot:
        if self._taught is None:
            self._taught = _taught_by(self).snapshot()
        return self._taught

    def _mean(self, tokens: float, sequences: float, prefills: float, attention: float, kv_tokens: float) -> float:
        decodes = max(round(sequences - prefills), 0)
        chunks = max(round(prefills), 0)
        rows = max(decodes + chunks, 1)  # a step of nothing costs what one token costs: the weights are read
        counts, contexts = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        if decodes:
            contexts[:decodes] = max(kv_tokens / decodes - 1.0, 0.0)
        if chunks:
            size = max((tokens - decodes) / chunks, 1.0)
            counts[decodes:] = np.diff(np.rint(np.arange(chunks + 1) * size)).astype(np.int32)
            contexts[decodes:] = max(attention / chunks / size - 0.5 * size, 0.0)
        return self._profile.step_s(counts, contexts)


class Scaled:
    """A model whose every answer is `factor` times what it should be."""

    def __init__(self, model: PerformanceModel, factor: float) -> None:
        self._model, self._factor = model, factor
        self._errors = RecentErrors()

    def predict(self, features: StepFeatures) -> StepTime:
        time = self._model.predict(features)
        return StepTime(time.mean_s * self._factor, time.upper_s * self._factor)

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        return self._factor * self._model.mean_s(tokens, sequences, prefills, prefill_attention, decode_kv_tokens)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        took_s = duration(seconds)
        if took_s is not None:
            self._errors.learn(stratum(features), math.log(took_s / self.predict(features).mean_s))
        self._model.observe(features, seconds)

    def observe_cold(self, features: StepFeatures, seconds: float) -> None:
        self._model.observe_cold(features, seconds)

    def expect_change(self) -> None:
        self._model.expect_change()

    def recent_error(self, features: StepFeatures) -> RecentError:
        return self._errors.of(features)

    def snapshot(self) -> PerfSnapshot:
        return scaled(self._model.snapshot(), self._factor)


def _taught_by(oracle: Oracle) -> PerformanceModel:
    """An online model that has seen many kinds of steps, each with the oracle's own time: the same ones each time."""
    model, rng = make_model(), np.random.default_rng(0)
    for f in probes():
        model.observe(f, oracle.predict(f).mean_s)
    for _ in range(_LESSONS):
        decodes = int(np.exp(rng.uniform(0.0, np.log(_MOST_DECODES))))
        kv_tokens = decodes * int(rng.integers(*_CONTEXTS))
        features = StepFeatures(decodes, decodes, 0, 0.0, kv_tokens)
        if rng.random() < 0.5:
            q, context = int(np.exp(rng.uniform(1.0, np.log(_LONGEST_CHUNK)))), int(rng.integers(*_CONTEXTS))
            features = StepFeatures(decodes + q, decodes + 1, 1, q * (context + 0.5 * q), kv_tokens)
        model.observe(features, oracle.predict(features).mean_s)
    return model
