"""How fast a recorded device really was: its sampled steps against what its worker had learned by the end.

A model is right on average of late; over a recording the device may have been slower for a while, because others
used the same cores or because it was hot. So measured is compared with predicted, by kind and size of step for the
level, and window by window for what changed with time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I8, Bools
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import is_known, make_model, rebuild
from nexusengine.profiles.fit import quantiles
from nexusengine.profiles.learned import OCTAVES, octave
from nexusengine.recording.format import Step, Worker
from nexusengine.wire import PerfSnapshot

_FEWEST, _FEWEST_OF_KIND, _FEWEST_OF_WINDOW = 50, 20, 8
_WINDOW_S = 5.0
_MOST, _LEAST = 20.0, 0.05  # more or less of what was predicted is no step of this device


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured over predicted times of a device's steps.

    Attributes:
        scale: of decode-only and of mixed steps, by octave of tokens (profiles.learned.octave).
        scatter: quantiles of what is left of each of the two, without what changed from window to window.
        slowness: (timestamp, factor): from then on, against `scale`.
    """

    scale: tuple[tuple[float, ...], tuple[float, ...]]
    scatter: tuple[F8, F8]
    slowness: tuple[tuple[float, float], ...]


def snapshot_of(worker: Worker, steps: Sequence[Step]) -> PerfSnapshot | None:
    """What a worker learned; by another version's model, what ours learns of its sampled steps, None if too few."""
    if worker.learned is not None and is_known(worker.learned.snapshot):
        return worker.learned.snapshot if worker.learned.steps else None
    if len(steps) < _FEWEST:
        return None
    model = make_model()
    for step in steps:
        model.observe(_features(step), step.ms / 1e3)
    return model.snapshot()


def speed_of(worker: Worker, steps: Sequence[Step]) -> Speed | None:
    """From the sampled steps of a worker in order of time; None if they, or what it learned, are too few."""
    snapshot = snapshot_of(worker, steps)
    if snapshot is None or len(steps) < _FEWEST:
        return None
    predictor = rebuild(snapshot)
    predicted_s = np.array([predictor.predict(_features(s)).mean_s for s in steps])
    measured_s = np.array([s.ms / 1e3 for s in steps])
    at_s, mixed = np.array([s.at_s for s in steps]), np.array([s.prefills > 0 for s in steps])
    ratio = measured_s / predicted_s
    sane = (ratio > _LEAST) & (ratio < _MOST)
    if sane.sum() < _FEWEST:
        return None
    measured_s, predicted_s, at_s, mixed = (column[sane] for column in (measured_s, predicted_s, at_s, mixed))
    octaves = np.array([octave(s.tokens) for s in steps])[sane]

    def level(base_s: F8) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return _by_octave(octaves, measured_s, base_s, ~mixed), _by_octave(octaves, measured_s, base_s, mixed)

    def at_level(base_s: F8, scale: tuple[tuple[float, ...], tuple[float, ...]]) -> F8:
        scaled_s: F8 = base_s * np.where(mixed, np.array(scale[1])[octaves], np.array(scale[0])[octaves])
        return scaled_s

    slowness = _windows(at_s, measured_s / at_level(predicted_s, level(predicted_s)))
    local = np.array([_at(slowness, t) for t in at_s.tolist()])
    mean = float((predicted_s * local).sum() / predicted_s.sum())
    slowness, local = tuple((t, factor / mean) for t, factor in slowness), local / mean
    scale = level(predicted_s * local)
    rest = measured_s / at_level(predicted_s * local, scale)
    scatter = [quantiles(rest[kind] if kind.sum() >= _FEWEST_OF_KIND else rest) for kind in (~mixed, mixed)]
    return Speed(scale, (scatter[0], scatter[1]), slowness)


def _features(step: Step) -> StepFeatures:
    return StepFeatures(step.tokens, step.sequences, step.prefills, step.prefill_attention, step.decode_kv_tokens)


def _by_octave(octaves: I8, measured_s: F8, predicted_s: F8, kind: Bools) -> tuple[float, ...]:
    """Measured over predicted time of the steps of a kind, of each octave that has enough.

    Others have that of the nearest that has; a kind that has too few everywhere, that of all steps.
    """
    mine = kind if kind.sum() >= _FEWEST_OF_KIND else np.ones(len(kind), np.bool_)
    overall = float(measured_s[mine].sum() / predicted_s[mine].sum())
    known: dict[int, float] = {}
    for number in sorted(set(octaves[mine].tolist())):
        inside = mine & (octaves == number)
        if kind is mine and inside.sum() >= _FEWEST_OF_KIND:
            known[number] = float(measured_s[inside].sum() / predicted_s[inside].sum())
    if not known:
        return (overall,) * OCTAVES
    return tuple(known[min(known, key=lambda k: (abs(k - number), k))] for number in range(OCTAVES))


def _windows(at_s: F8, ratio: F8) -> tuple[tuple[float, float], ...]:
    """The median ratio of each window of five seconds, longer where steps are few.

    A median: one long step by chance is not the machine's slowness, and would be held against all that follow.
    """
    found: list[tuple[float, float]] = []
    first = 0
    for i in range(1, len(at_s) + 1):
        if i < len(at_s) and (at_s[i] - at_s[first] < _WINDOW_S or i - first < _FEWEST_OF_WINDOW):
            continue
        if i - first >= _FEWEST_OF_WINDOW or not found:
            found.append((float(at_s[first]), float(np.median(ratio[first:i]))))
        first = i
    return tuple(found)


def _at(slowness: Sequence[tuple[float, float]], at_s: float) -> float:
    factor = slowness[0][1]
    for begins_s, value in slowness:
        if begins_s > at_s:
            break
        factor = value
    return factor
