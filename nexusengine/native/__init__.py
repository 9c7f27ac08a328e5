"""The CPU kernels: plain C++ in `src`, compiled in the wheel or on first use, called through ctypes.

`probe` says whether they can be used here and why not; `library` loads them. Needs no torch.
"""

from __future__ import annotations

from nexusengine.native import structs
from nexusengine.native.build import NativeError
from nexusengine.native.library import Calls, Library, Prepared, library, loaded, prepare, probe

__all__ = ["Calls", "Library", "NativeError", "Prepared", "library", "loaded", "prepare", "probe", "structs"]
