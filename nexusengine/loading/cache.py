"""Where downloaded and compiled files are kept."""

from __future__ import annotations

import os
from pathlib import Path

from nexusengine.errors import ConfigError


def cache_dir() -> Path:
    """$NEXUSENGINE_CACHE, else nexusengine in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: the user has no home folder and neither variable is set.
    """
    try:
        if chosen := os.environ.get("NEXUSENGINE_CACHE"):
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nexusengine"
    except RuntimeError:
        raise ConfigError(
            "there is no home folder to keep downloaded and compiled files in; set NEXUSENGINE_CACHE to a folder that "
            "can be written"
        ) from None
