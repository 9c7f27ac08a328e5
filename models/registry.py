"""From the name of an architecture to the class that implements it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nexusengine.errors import ModelLoadError
from nexusengine.loading.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from nexusengine.models.base import Model


def model_class(architecture: str) -> type[Model]:
    """Import the family's file.

    Raises:
        ModelLoadError: listing the architectures that are known.
    """
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"architecture {architecture!r} is not supported; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    module, _, attribute = ARCHITECTURES[architecture].partition(":")
    found: type[Model] = getattr(importlib.import_module(module), attribute)
    return found
