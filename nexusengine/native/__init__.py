"""The CPU kernels: plain C++ in `src`, built on first use into the cache folder and called through ctypes.

`probe` says whether they can be used here and why not; `library` loads them. Needs no torch.
"""

from __future__ import annotations

from nexusengine.native import structs
from nexusengine.native.build import NativeError
from nexusengine.native.library import Calls, Library, Prepared, library, loaded, probe

__all__ = ["Calls", "Library", "NativeError", "Prepared", "library", "loaded", "probe", "structs"]
