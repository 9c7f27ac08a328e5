"""A profile recorded on the user's own device, as a JSON file; docs/profiles.md documents its keys."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from nexusengine.errors import ConfigError
from nexusengine.profiles.fit import FEATURES, Fit

VERSION = 1
FOLDER_VARIABLE = "NEXUSENGINE_PROFILES"
_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)]
_Factor = Annotated[float, msgspec.Meta(gt=0.0, le=1000.0)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
_Quantiles = Annotated[list[_Factor], msgspec.Meta(min_length=2, max_length=10_001)]


class NoiseFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Observed over fitted time at evenly spaced quantiles from 0 to 1, not decreasing."""

    decode: _Quantiles
    mixed: _Quantiles


class ProfileFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The content of a profile file.

    Attributes:
        nexusengine_profile: 1.
        weights_s: of profiles.fit's formula, in its order, seconds.
    """

    nexusengine_profile: int
    device: _Name
    model: _Name
    weights_s: Annotated[list[_Seconds], msgspec.Meta(min_length=FEATURES, max_length=FEATURES)]
    kv_capacity_tokens: Annotated[int, msgspec.Meta(ge=16, lt=2**40)]
    weights_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    noise: NoiseFile | None = None
    source: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    median_error: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    longest_step_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0


_DECODER = msgspec.json.Decoder(ProfileFile)


@dataclass(frozen=True, slots=True)
class UserProfile:
    """A profile file, and the path it was read from."""

    path: Path
    file: ProfileFile


def read_profile(path: str | Path) -> UserProfile:
    """Read a profile file.

    Raises:
        ConfigError: naming the file and the key that is wrong.
    """
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror or error}", param="devices") from None
    try:
        file = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a profile: {error}", param="devices") from None
    if file.nexusengine_profile != VERSION:
        raise ConfigError(
            f"{path} is a profile of version {file.nexusengine_profile}; this version reads {VERSION}", param="devices"
        )
    for kind in ("decode", "mixed") if file.noise else ():
        quantiles = getattr(file.noise, kind)
        if any(b < a for a, b in pairwise(quantiles)):
            raise ConfigError(f"{path}: noise.{kind} decreases; quantiles do not", param="devices")
    if not any(file.weights_s):
        raise ConfigError(f"{path}: all weights_s are zero, so every step would take no time", param="devices")
    return UserProfile(path, file)


def folder_profiles(environ: Mapping[str, str] | None = None) -> list[UserProfile]:
    """The profiles in the folder that NEXUSENGINE_PROFILES names; none where it names none.

    Raises:
        ConfigError: the folder is not there, or a file in it is no profile.
    """
    folder = (os.environ if environ is None else environ).get(FOLDER_VARIABLE)
    if not folder:
        return []
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{FOLDER_VARIABLE} is {folder!r}, which is not a folder", param="devices")
    return [read_profile(p) for p in sorted(path.glob("*.json"))]


def entry_of(user: UserProfile) -> dict[str, Any]:
    """As in the index of the profiles that come with the package."""
    f = user.file
    return {
        "device": f.device,
        "model": f.model,
        "kind": "fitted",
        "confidence": "resampled",
        "source": f.source or str(user.path),
        "licence": "",
        "kv_capacity_tokens": f.kv_capacity_tokens,
        "weights_bytes": f.weights_bytes,
        "weights_s": f.weights_s,
        "noise": "pooled" if f.noise is None else f"{f.device}/{f.model}",
    }


def write_profile(
    path: str | Path,
    *,
    device: str,
    model: str,
    fit: Fit,
    kv_capacity_tokens: int,
    weights_bytes: int,
    source: str,
) -> ProfileFile:
    """Write what `fit` found, and read it back as a check.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {
        "nexusengine_profile": VERSION,
        "device": device,
        "model": model,
        "source": source,
        "kv_capacity_tokens": kv_capacity_tokens,
        "weights_bytes": weights_bytes,
        "weights_s": [float(f"{w:.6g}") for w in fit.weights_s],
        "noise": {
            "decode": [round(q, 4) for q in fit.decode_noise],
            "mixed": [round(q, 4) for q in fit.mixed_noise],
        },
        "steps": fit.steps,
        "median_error": round(fit.median_error, 5),
        "longest_step_tokens": fit.longest_step_tokens,
    }
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}", param="output") from None
    return read_profile(path).file
