"""Stand-ins for libraries that need a GPU: their signatures and what they insist on, over the answers of `oracle`.

Signatures and checks are those of flash-attn 2.8 (flash_attn_interface.py, flash_api.cpp), flash-attn 3 (the folder
hopper, the same two files), flash-attn-4 4.0.0b36 (cute/interface.py), torch 2.13 (nn/attention/varlen.py) and
flashinfer-python 0.7.2 (prefill.py, decode.py), without that tensors lie on a GPU. A call that these let pass may still
be slow, or wrong in a way they do not know.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from tests.support.attention_standins.flash_attn import (
    flash2_varlen,
    flash2_with_kvcache,
    flash3_with_kvcache,
    flash4_varlen,
    torch_varlen_out,
)
from tests.support.attention_standins.flashinfer import Decode, Prefill


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    return made


MODULES: dict[str, dict[str, types.ModuleType]] = {
    "flash2": {
        "flash_attn": _module(
            "flash_attn", flash_attn_varlen_func=flash2_varlen, flash_attn_with_kvcache=flash2_with_kvcache
        )
    },
    "flash3": {
        "flash_attn_interface": _module("flash_attn_interface", flash_attn_with_kvcache=flash3_with_kvcache),
    },
    "flash4": {
        "flash_attn": _module("flash_attn"),
        "flash_attn.cute": _module("flash_attn.cute", flash_attn_varlen_func=flash4_varlen),
    },
    "torch-varlen": {
        "torch.nn.attention.varlen": _module("torch.nn.attention.varlen", varlen_attn_out=torch_varlen_out),
    },
    "flashinfer": {
        "flashinfer": _module(
            "flashinfer", BatchPrefillWithPagedKVCacheWrapper=Prefill, BatchDecodeWithPagedKVCacheWrapper=Decode
        ),
    },
}
"""What `import` finds for each backend."""
CAPABILITY = {"flash2": (8, 0), "flash3": (9, 0), "flash4": (10, 0), "torch-varlen": (9, 0), "flashinfer": (8, 9)}


def install(name: str, patch: pytest.MonkeyPatch) -> None:
    """Lets a backend find its stand-in, and take this machine for a GPU that it likes."""
    for module, stand_in in MODULES[name].items():
        patch.setitem(sys.modules, module, stand_in)
    patch.setattr("nexusengine.attention.external.capability", lambda device: CAPABILITY[name])
