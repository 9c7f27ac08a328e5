"""What devices cost where nothing better is said: dollars an hour, and watts. Indicative. PURE.

Prices are those of RunPod's serverless "active" workers (docs.runpod.io/serverless/pricing), dollars a second times
3600, as of early 2026. One price list, so that devices compare; what you pay differs.

Watts, November 2026. Busy: the power limit of the board by NVIDIA's data sheets (SXM where there are several), which a
device that computes steps all the time comes near but does not exceed. Idle, with a model loaded: a tenth of that
limit, and what an open CUDA context adds: 26 to 50 W on A100 and H100, 66 W on L40S (measured, arXiv 2605.23918),
another twentieth to tenth of the limit elsewhere (an estimate). Measure your own with `nvidia-smi
--query-gpu=power.draw --format=csv -l 1`.

What you know better comes from a TOML file, of `nexusengine plan --prices FILE` or of the environment variable
NEXUSENGINE_DEVICE_COSTS, which the router's policy reads too:

    h100 = 2.49                  # dollars an hour
    [l4]
    price = 0.4
    idle_w = 14
    busy_w = 68
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nexusengine.errors import ConfigError

FILE_VARIABLE = "NEXUSENGINE_DEVICE_COSTS"
_MOST = 1e6
_KEYS = {"price": "price_per_hour", "idle_w": "idle_w", "busy_w": "busy_w"}


@dataclass(frozen=True, slots=True)
class DeviceCost:
    """What a device costs; None where it is not known.

    Attributes:
        price_per_hour: US dollars.
        idle_w: watts while a model is loaded and no step runs.
        busy_w: watts while steps run.
    """

    price_per_hour: float | None = None
    idle_w: float | None = None
    busy_w: float | None = None

    def times(self, count: int) -> DeviceCost:
        """Of several such devices."""
        values = (self.price_per_hour, self.idle_w, self.busy_w)
        return DeviceCost(*(None if v is None else count * v for v in values))


DEVICE_COSTS: Mapping[str, DeviceCost] = MappingProxyType(
    {
        "b200": DeviceCost(0.00190 * 3600, 150.0, 1000.0),
        "h200": DeviceCost(0.00124 * 3600, 120.0, 700.0),
        "h100": DeviceCost(0.00093 * 3600, 120.0, 700.0),
        "a100": DeviceCost(0.00060 * 3600, 66.0, 400.0),
        "l40s": DeviceCost(0.00037 * 3600, 101.0, 350.0),
        "a6000": DeviceCost(0.00024 * 3600, 45.0, 300.0),
        "rtx4090": DeviceCost(0.00021 * 3600, 68.0, 450.0),
        "rtxpro6000": DeviceCost(None, 90.0, 600.0),
        "a10": DeviceCost(None, 30.0, 150.0),
        "l4": DeviceCost(0.00013 * 3600, 14.0, 72.0),
        "t4": DeviceCost(None, 14.0, 70.0),
    }
)


def cost_of(device: str, costs: Mapping[str, DeviceCost]) -> DeviceCost:
    """The entry of a device, by the name of its profile or by that which the driver gives it.

    `h100`, `h100/qwen3-32b`, `emulated:h100` and `NVIDIA H100 80GB HBM3` are one; `rtxpro6000-tp2` is two of them. An
    entry of just that name comes first (`cuda:0`).
    """
    if device in costs:
        return costs[device]
    name, _, shards = device.removeprefix("emulated:").partition("/")[0].partition("-tp")
    if name not in costs:
        squeezed = re.sub(r"[^a-z0-9]", "", name.lower())
        words = re.findall(r"[a-z0-9]+", name.lower())
        known = [n for n in costs if n in words or (len(n) > 4 and n in squeezed)]
        if not known:
            return DeviceCost()
        name = max(known, key=len)
    return costs[name].times(int(shards) if shards.isdigit() else 1)


def read_costs(text: str | None) -> dict[str, DeviceCost]:
    """The list above, with what a user says over it.

    Args:
        text: `h100=2.49,l4=0.4` in dollars an hour, or the path of a TOML file (*.toml).

    Raises:
        ConfigError: naming what is wrong.
    """
    if not text:
        return dict(DEVICE_COSTS)
    if not text.endswith(".toml"):
        return _merged(dict(item.partition("=")[::2] for item in text.split(",") if item.strip()))
    try:
        given: dict[str, Any] = tomllib.loads(Path(text).expanduser().read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {text}: {error.strerror}", param="prices") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text} is not TOML: {error}", param="prices") from None
    return _merged(given)


@cache
def usual_costs() -> Mapping[str, DeviceCost]:
    """The list, with what the file named by NEXUSENGINE_DEVICE_COSTS says over it.

    Raises:
        ConfigError: naming what is wrong with that file.
    """
    path = os.environ.get(FILE_VARIABLE)
    if path and not path.endswith(".toml"):
        raise ConfigError(f"{FILE_VARIABLE} is {path!r}, which is not a .toml file", param="prices")
    return MappingProxyType(read_costs(path))


def _merged(given: Mapping[str, Any]) -> dict[str, DeviceCost]:
    costs = dict(DEVICE_COSTS)
    for name, value in given.items():
        fields = value if isinstance(value, dict) else {"price": value}
        unknown = fields.keys() - _KEYS.keys()
        if unknown:
            raise ConfigError(
                f"{name}: {', '.join(sorted(unknown))} is not known; known: {', '.join(_KEYS)}", param="prices"
            )
        device = name.strip()
        known = {_KEYS[key]: _number(device, key, v) for key, v in fields.items()}
        costs[device] = replace(costs.get(device, DeviceCost()), **known)
        cost = costs[device]
        if cost.idle_w is not None and cost.busy_w is not None and cost.idle_w > cost.busy_w:
            raise ConfigError(f"{device}: idle_w, {cost.idle_w:g}, is above busy_w, {cost.busy_w:g}", param="prices")
    return costs


def _number(device: str, key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"the {key} of {device} must be a number, got {value!r}", param="prices") from None
    if not 0.0 <= number < _MOST:
        raise ConfigError(f"the {key} of {device} must be 0 or more, got {value!r}", param="prices")
    return number
