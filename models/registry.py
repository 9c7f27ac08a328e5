"""Which file implements an architecture, by the name in config.json."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nexusengine.errors import ModelLoadError

if TYPE_CHECKING:
    from nexusengine.models.llama import LlamaForCausalLM

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "nexusengine.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "nexusengine.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "nexusengine.models.llama:LlamaForCausalLM",
}


def model_class(architecture: str) -> type[LlamaForCausalLM]:
    """Imports the family's file. Raises ModelLoadError listing what is known."""
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"architecture {architecture!r} is not supported; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    module, _, attribute = ARCHITECTURES[architecture].partition(":")
    found: type[LlamaForCausalLM] = getattr(importlib.import_module(module), attribute)
    return found
