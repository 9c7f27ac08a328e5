"""Profiles by name: those that come with the package, scaled ones, and files of the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.errors import ConfigError
from nexusengine.profiles.assemble import SAME, assemble, scale_between
from nexusengine.profiles.base import Confidence, DeviceProfile, ProfileIdentity
from nexusengine.profiles.fitted import FittedProfile
from nexusengine.profiles.geometry import DEFAULT_MODEL, MODELS, kv_capacity_tokens
from nexusengine.profiles.noise import Noise
from nexusengine.profiles.user_file import UserProfile, entry_of, folder_profiles, read_profile

_DATA = Path(__file__).parent / "data"
_REFERENCE = {
    "decode_1": ((1,), (1024,)),
    "decode_32": ((1,) * 32, (1024,) * 32),
    "decode_128": ((1,) * 128, (1024,) * 128),
    "prefill_2048": ((2048,), (0,)),
    "mixed": ((1,) * 128 + (1024,), (1024,) * 129),
}


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """A profile in a list.

    Attributes:
        step_ms: mean step times of reference batches: 1, 32 and 128 decodes of 1,024 tokens of context, a prompt of
            2,048 tokens, and a chunk of 1,024 tokens (1,024 cached) beside 128 decodes.
        noise: where the scatter of steps was measured: on this device, or pooled over others.
    """

    identity: ProfileIdentity
    licence: str
    noise: str
    step_ms: dict[str, float]


def load_profile(spec: str, model: str = DEFAULT_MODEL) -> DeviceProfile:
    """Load a profile.

    A model that was not measured on the device is scaled from one of similar shape that was. Profiles in the folder
    that NEXUSENGINE_PROFILES names come before those of the package.

    Args:
        spec: a device ("h100"), "DEVICE/MODEL", or the path of a profile file (*.json).
        model: where `spec` is a device alone.

    Raises:
        ConfigError: naming what is known.
    """
    if spec.endswith(".json"):
        return _of_user(read_profile(spec))
    device, slash, named = spec.partition("/")
    model = named if slash else model
    for user in folder_profiles():
        if (user.file.device, user.file.model) == (device, model):
            return _of_user(user)
    entry = _entries().get((device, model))
    return _make(entry) if entry is not None else _scale(device, model)


def list_profiles() -> list[ProfileInfo]:
    """Those of the user's folder first."""
    own = [_info(entry_of(user), _of_user(user)) for user in folder_profiles()]
    return own + [_info(entry, _make(entry)) for entry in _entries().values()]


def file_info(path: str | Path) -> ProfileInfo:
    """The list entry of a profile file.

    Raises:
        ConfigError: naming what is wrong with it.
    """
    user = read_profile(path)
    return _info(entry_of(user), _of_user(user))


@cache
def _index() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((_DATA / "index.json").read_text())
    return data


@cache
def _entries() -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["device"], e["model"]): e for e in _index()["profiles"]}


def _info(entry: Mapping[str, Any], profile: DeviceProfile) -> ProfileInfo:
    steps = {
        name: 1e3 * profile.step_s(np.array(counts, np.int32), np.array(contexts, np.int32))
        for name, (counts, contexts) in _REFERENCE.items()
    }
    return ProfileInfo(profile.identity, entry["licence"], entry["noise"], steps)


def _make(entry: Mapping[str, Any]) -> DeviceProfile:
    return assemble(_identity(entry), entry, _tables(entry), MODELS[entry["model"]], SAME, _noise(entry["noise"]))


def _of_user(user: UserProfile) -> DeviceProfile:
    entry, given = entry_of(user), user.file.noise
    noise = _noise("pooled") if given is None else Noise(given.decode, given.mixed)
    return FittedProfile(_identity(entry), weights_s=entry["weights_s"], noise=noise)


def _scale(device: str, model: str) -> DeviceProfile:
    """From the profile of the device that is most like what is asked for."""
    of_device = [e for (d, _), e in _entries().items() if d == device]
    known = f"known: {', '.join('/'.join(k) for k in _entries())}"
    if not of_device:
        raise ConfigError(f"no profile of a device {device!r}; {known}", param="devices")
    if model not in MODELS:
        raise ConfigError(
            f"no profile of {model!r} on {device!r}, and its shape is not known; {known}; shapes are known of "
            f"{', '.join(MODELS)}",
            param="devices",
        )
    target, reasons = MODELS[model], []
    best: tuple[float, Mapping[str, Any]] | None = None
    for entry in of_device:
        try:
            scale = scale_between(MODELS[entry["model"]], target)
        except ConfigError as error:
            reasons.append(f"{device}/{entry['model']}: {error.message}")
            continue
        unlike = abs(np.log(scale.layer)) + abs(np.log(scale.queries)) + abs(np.log(scale.kv))
        if best is None or unlike < best[0]:
            best = unlike, entry
    if best is None:
        raise ConfigError(
            f"{model!r} is too unlike what was measured on {device!r} ({'; '.join(reasons)}); {known}", param="devices"
        )
    nearest = best[1]
    capacity = kv_capacity_tokens(device, target)
    if capacity < 16:
        raise ConfigError(f"the weights of {model!r} do not fit the memory of {device!r}", param="devices")
    confidence: Confidence = "composed" if nearest["confidence"] == "measured" else nearest["confidence"]
    identity = replace(
        _identity(nearest),
        model=model,
        source=f"scaled by geometry from {device}/{nearest['model']}: {nearest['source']}",
        confidence=confidence,
        kv_capacity_tokens=capacity,
        weights_bytes=target.weights_bytes,
    )
    scale = scale_between(MODELS[nearest["model"]], target)
    return assemble(identity, nearest, _tables(nearest), target, scale, _noise(nearest["noise"]))


def _identity(entry: Mapping[str, Any]) -> ProfileIdentity:
    return ProfileIdentity(
        entry["device"],
        entry["model"],
        entry["source"],
        entry["confidence"],
        entry["kv_capacity_tokens"],
        entry["weights_bytes"],
    )


def _tables(entry: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    return _read_tables(entry["tables"]) if "tables" in entry else {}


@cache
def _read_tables(name: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(_DATA / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@cache
def _noise(name: str) -> Noise:
    factors = _index()["noise"][name]
    return Noise(factors["decode"], factors["mixed"])
