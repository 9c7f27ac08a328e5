"""From the name of an architecture to the class that implements it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nexusengine.errors import ModelLoadError
from nexusengine.loading.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from nexusengine.models.llama import LlamaForCausalLM


def model_class(architecture: str) -> type[LlamaForCausalLM]:
    """Imports the family's file. Raises ModelLoadError listing what is known."""
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"architecture {architecture!r} is not supported; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    module, _, attribute = ARCHITECTURES[architecture].partition(":")
    found: type[LlamaForCausalLM] = getattr(importlib.import_module(module), attribute)
    return found
