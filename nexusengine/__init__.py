"""nexusengine: LLM serving on devices of different kinds, scheduled by predicted step times.

Importing this package costs nothing: the names below are loaded when first used, and torch only by the part that
computes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nexusengine.engine.engine import AsyncEngine, Engine
    from nexusengine.types import SLO, RequestOutput, SamplingParams

_EXPORTS = {
    "Engine": "nexusengine.engine.engine",
    "AsyncEngine": "nexusengine.engine.engine",
    "SamplingParams": "nexusengine.types",
    "SLO": "nexusengine.types",
    "RequestOutput": "nexusengine.types",
}
__all__ = ["SLO", "AsyncEngine", "Engine", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nexusengine' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
