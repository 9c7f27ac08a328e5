"""Typed access to the keys of a JSON object, with errors that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.shown import short

_MISSING = object()


class Reader:
    """Reads keys of `values`; a key that is null is taken as missing.

    Its methods raise ModelLoadError for a value that is not what they read.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def fail(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.where}: {what}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise self.fail(f"{key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(f"{key} is {short(value)}, which is not of the right type")
        return value

    def size(self, key: str, default: Any = _MISSING) -> int:
        """A whole number from 1."""
        value: int = self.get(key, int, default)
        if not 1 <= value < 2**31:
            raise self.fail(f"{key} is {short(value)}, which is not a size")
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A finite number above 0, or `default`."""
        value = self.get(key, (int, float), default)
        if value is None or value is default:
            return value
        if not 0 < value < math.inf or value > 1e300:
            raise self.fail(f"{key} is {short(value)}; a finite number above 0 is needed")
        return float(value)
