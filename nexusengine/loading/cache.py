"""Where downloaded files are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$NEXUSENGINE_CACHE, else nexusengine in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("NEXUSENGINE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexusengine"
