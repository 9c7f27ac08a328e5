"""Classes of service level objectives by name, built in or read from a file. Standard library only."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from nexusengine.errors import ConfigError, InvalidRequest
from nexusengine.types import SLO


@dataclass(frozen=True, slots=True)
class SLOClass:
    """A promise by name. The TTFT bound grows by `ttft_per_token_s` with each prompt token. patience: see SLO."""

    name: str
    ttft_s: float
    tpot_s: float
    ttft_per_token_s: float = 0.0
    e2e_s: float | None = None
    patience: float = math.inf

    def slo(self, prompt_tokens: int) -> SLO:
        """For a prompt of this length. Raises InvalidRequest naming the bound that is absurd."""
        return SLO(self.ttft_s + self.ttft_per_token_s * prompt_tokens, self.tpot_s, self.e2e_s, self.patience)


CLASSES: Mapping[str, SLOClass] = MappingProxyType(
    {
        c.name: c
        for c in (
            SLOClass("interactive", 0.5, 0.05, 0.001, patience=1.5),
            SLOClass("standard", 2.0, 0.1, 0.002, patience=1.5),
            SLOClass("batch", 30.0, 0.5, 0.004, patience=1.5),
        )
    }
)
MIXED: Mapping[str, float] = MappingProxyType({"interactive": 0.6, "standard": 0.25, "batch": 0.15})
"""Shares of the classes in the workload `mixed`."""


_KEYS = {"ttft_s", "tpot_s", "ttft_per_token_s", "e2e_s", "patience", "share"}


def load_classes(path: str | Path) -> tuple[dict[str, SLOClass], dict[str, float]]:
    """Read classes and their shares of a workload from a TOML file with one table a class.

        [interactive]
        ttft_s = 0.5
        ttft_per_token_s = 0.001
        tpot_s = 0.05
        share = 0.6          # of the requests, for simulations; 0 by default

    Raises ConfigError naming the file, the class and the key.
    """
    try:
        tables = tomllib.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="slo_classes") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", param="slo_classes") from None
    if not tables:
        raise ConfigError(f"{path} has no class in it", param="slo_classes")
    classes: dict[str, SLOClass] = {}
    shares: dict[str, float] = {}
    for name, table in tables.items():
        where = f"{path}, class {name}"
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: a class is a table, [{name}]", param="slo_classes")
        unknown = sorted(set(table) - _KEYS)
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
        for key in ("ttft_s", "tpot_s"):
            if key not in table:
                raise ConfigError(f"{where}: {key} is missing", param="slo_classes")
        for key, value in table.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"{where}: {key} must be a number >= 0, got {value!r}", param="slo_classes")
        shares[name] = float(table.pop("share", 0.0))
        classes[name] = SLOClass(name, **{key: float(value) for key, value in table.items()})
        try:
            classes[name].slo(1)
        except InvalidRequest as error:
            raise ConfigError(f"{where}: {error.message}", param="slo_classes") from None
    return classes, shares
