"""Profiles by name: those that come with the package, scaled ones, and files of the user."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.errors import ConfigError
from nexusengine.profiles.attention import JointAttention, Skew
from nexusengine.profiles.base import Confidence, DeviceProfile
from nexusengine.profiles.composed import ComposedProfile, ProfileIdentity
from nexusengine.profiles.curves import Curve, Quad, Surface
from nexusengine.profiles.geometry import MODELS
from nexusengine.profiles.moe import expert_curve
from nexusengine.profiles.noise import Noise

DEFAULT_MODEL = "llama-3.1-8b"
_DATA = Path(__file__).parent / "data"
_US = 1e-6
_REFERENCE = {
    "decode_1_ms": ((1,), (1024,)),
    "decode_32_ms": ((1,) * 32, (1024,) * 32),
    "decode_128_ms": ((1,) * 128, (1024,) * 128),
    "prefill_2048_ms": ((2048,), (0,)),
    "mixed_ms": ((1,) * 128 + (1024,), (1024,) * 129),
}
"""Batches whose step times `list_profiles` shows: (counts, contexts)."""

Tables = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """A profile in a list. step_ms: mean step times of reference batches: 1, 32 and 128 decodes of 1,024 tokens of
    context, a prompt of 2,048 tokens, and a chunk of 1,024 (1,024 cached) beside 128 decodes."""

    device: str
    model: str
    confidence: Confidence
    source: str
    licence: str
    kv_capacity_tokens: int
    step_ms: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.device}/{self.model}"


def load_profile(spec: str, model: str = DEFAULT_MODEL) -> DeviceProfile:
    """`spec` is a device ("h100"), "DEVICE/MODEL", or the path of a profile file (*.json).

    Raises ConfigError naming what is known.
    """
    device, slash, named = spec.partition("/")
    model = named if slash else model
    entry = _entries().get((device, model))
    if entry is None:
        raise ConfigError(
            f"no profile of {model!r} on {device!r}; known: {', '.join('/'.join(k) for k in _entries())}",
            param="devices",
        )
    return _make(entry)


def list_profiles() -> list[ProfileInfo]:
    return [_info(entry) for entry in _entries().values()]


@cache
def _index() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((_DATA / "index.json").read_text())
    return data


@cache
def _entries() -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["device"], e["model"]): e for e in _index()["profiles"]}


def _info(entry: dict[str, Any]) -> ProfileInfo:
    profile = _make(entry)
    steps = {
        name: 1e3 * profile.step_s(np.array(counts, np.int32), np.array(contexts, np.int32))
        for name, (counts, contexts) in _REFERENCE.items()
    }
    return ProfileInfo(
        entry["device"],
        entry["model"],
        entry["confidence"],
        entry["source"],
        entry["licence"],
        entry["kv_capacity_tokens"],
        steps,
    )


def _make(entry: dict[str, Any]) -> DeviceProfile:
    identity = ProfileIdentity(
        entry["device"],
        entry["model"],
        entry["source"],
        entry["confidence"],
        entry["kv_capacity_tokens"],
        entry["weights_bytes"],
    )
    return _joint(identity, _tables(entry["tables"]), _noise(entry["noise"]))


@cache
def _tables(name: str) -> Tables:
    with np.load(_DATA / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@cache
def _noise(name: str) -> Noise:
    factors = _index()["noise"][name]
    return Noise(factors["decode"], factors["mixed"])


def _joint(identity: ProfileIdentity, t: Tables, noise: Noise) -> ComposedProfile:
    """From tables measured jointly: see scripts/build_profiles.py for what they hold."""
    geometry = MODELS[identity.model]
    layer_s = t["layer_us"].astype(np.float64) * _US
    tokens = t["tokens"].astype(np.float64)
    if geometry.experts:
        layer_s = layer_s + expert_curve(t, tokens, geometry) * _US
    attention = JointAttention(
        Surface(t["decodes"], t["decode_kv"], t["decode_us"] * _US),
        Surface(t["chunks"], t["cached"], t["prefill_us"] * _US),
        Quad(
            [t["beside_chunks"], t["beside_cached"], t["beside_decodes"], t["beside_kv"]],
            t["beside_us"].astype(np.float64) * _US,
        ),
        Skew(t["skew_decodes"], t["skew_chunks"], t["skew_spreads"].astype(np.float64), t["skew_alpha"]),
        int(t["chunks"][0]),
    )
    return ComposedProfile(
        identity,
        layers=geometry.layers,
        dense=Curve(tokens, geometry.layers * layer_s + t["once_us"] * _US),
        attention=attention,
        head=Curve(t["sequences"], t["head_us"] * _US),
        noise=noise,
    )
