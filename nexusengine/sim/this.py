"""`this` among the devices of a simulation: those of the server that recorded the trace.

`this` are all its workers, `this:w0` is one of them, `this-w1` all but one; `2xthis:w0` are two like w0. An emulated
device is its profile. Any other is what its worker had learned of it by the end of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from nexusengine.config import parse_device
from nexusengine.errors import ConfigError
from nexusengine.profiles.base import DeviceProfile, ProfileIdentity
from nexusengine.profiles.geometry import DEFAULT_MODEL
from nexusengine.profiles.learned import OCTAVES, LearnedProfile
from nexusengine.profiles.noise import Noise
from nexusengine.recording.format import Worker
from nexusengine.sim.speed import snapshot_of, speed_of
from nexusengine.sim.workload.recording import Recording

_THIS, _ONE = "this", "this:"
_FEWEST_STEPS = 100  # before measured over predicted time says something
_MOST_HOST_S = 1.0
_NOT_A_PROFILE = ("instant",)
_SHORTEST_QUEUE = 2.0  # percentile of the time to the first step at which nobody waits for another's step


def expand(devices: Sequence[str], recording: Recording | None) -> list[str]:
    """The names of devices with `this` replaced by `this:WORKER` of each worker that is meant. Raises ConfigError."""
    expanded: list[str] = []
    for name in devices:
        if name != _THIS and not name.startswith((_ONE, f"{_THIS}-")):
            expanded.append(name)
            continue
        if recording is None:
            raise ConfigError(
                f"{name!r} names devices of a recorded trace, and this trace was not recorded by nexusengine serve",
                param="devices",
            )
        known = [w.worker for w in recording.workers]
        if not known:
            raise ConfigError(f"{recording.name} does not say which workers served", param="devices")
        named = [name.removeprefix(_ONE)] if name.startswith(_ONE) else name.split("-")[1:]
        wrong = next((n for n in named if n not in known), None)
        if wrong is not None:
            raise ConfigError(f"{name!r}: there is no worker {wrong!r}; recorded: {', '.join(known)}", param="devices")
        meant = named if name.startswith(_ONE) else [n for n in known if n not in named]
        expanded += [_ONE + n for n in meant]
    if not expanded:
        raise ConfigError("no device is left", param="devices")
    return expanded


def device_of(name: str, recording: Recording | None) -> str:
    """The device behind a name, by which it has a price: h100 of this:w0."""
    if recording is None or not name.startswith(_ONE):
        return name
    device = _worker(name, recording).device
    return device.removeprefix("emulated:")


def profile_of(name: str, recording: Recording, load: Callable[[str, str], DeviceProfile]) -> DeviceProfile:
    """The profile of `this:WORKER`. Raises ConfigError."""
    worker = _worker(name, recording)
    emulated = _emulated(worker)
    if emulated is not None:
        return _Holding(load(emulated, DEFAULT_MODEL), worker.kv_tokens)
    steps = recording.steps.get(worker.worker, ())
    snapshot = snapshot_of(worker, steps)
    if snapshot is None:
        raise ConfigError(
            f"{recording.name}: worker {worker.worker} on {worker.device} has learned nothing of its step times that "
            "this version can read; record a load of some minutes, or name other devices",
            param="devices",
        )
    identity = ProfileIdentity(
        worker.device, recording.server.model, recording.name, "resampled", worker.kv_tokens, weights_bytes=0
    )
    fit = speed_of(worker, steps)
    if fit is None:
        whole = worker.device_s / worker.predicted_s if worker.steps >= _FEWEST_STEPS and worker.predicted_s else 1.0
        level = (min(max(whole, 0.5), 2.0),) * OCTAVES
        return LearnedProfile(identity, snapshot, scale=(level, level))
    return LearnedProfile(identity, snapshot, scale=fit.scale, noise=Noise(*fit.scatter))


def changes_of_speed(names: Sequence[str], recording: Recording) -> tuple[str, ...]:
    """What made recorded devices faster and slower over time, as faults of the devices of these names.

    An emulated device is always as fast as its profile.
    """
    faults: list[str] = []
    for i, name in enumerate(names):
        if not name.startswith(_ONE) or _emulated(worker := _worker(name, recording)) is not None:
            continue
        speed = speed_of(worker, recording.steps.get(worker.worker, ()))
        faults += [f"slow:{i}:{max(at_s, 0.0):.3f}:{factor:.6g}" for at_s, factor in speed.slowness] if speed else []
    return tuple(faults)


def _emulated(worker: Worker) -> str | None:
    """The name of the profile of an emulated device that can be loaded by its name."""
    device = parse_device(worker.device)
    name = device.profile or ""
    return None if device.kind != "emulated" or name in _NOT_A_PROFILE or name.endswith(".json") else name


def host_s(recording: Recording) -> float:
    """Mean seconds between steps of the recorded workers."""
    steps = sum(w.steps for w in recording.workers)
    return min(sum(w.host_s for w in recording.workers) / steps, _MOST_HOST_S) if steps else 0.0


def link_delay_s(recording: Recording, hops: int) -> float:
    """Seconds of each of `hops` messages from arrival to a worker: what requests took to a first step that was free."""
    queue_ms = [r.queue_ms for r in recording.requests if r.queue_ms is not None]
    if not queue_ms:
        return 0.0005
    return min(float(np.percentile(queue_ms, _SHORTEST_QUEUE)) / 1e3, 0.1) / hops


def _worker(name: str, recording: Recording) -> Worker:
    wanted = name.removeprefix(_ONE)
    return next(w for w in recording.workers if w.worker == wanted)


class _Holding:
    """A profile with another KV capacity."""

    def __init__(self, profile: DeviceProfile, kv_tokens: int) -> None:
        self.identity = replace(profile.identity, kv_capacity_tokens=kv_tokens)
        self.step_s, self.decode_run_s, self.noise = profile.step_s, profile.decode_run_s, profile.noise
