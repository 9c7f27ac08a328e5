"""Types of numpy arrays; shapes are in the docstrings of what has them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F8 = npt.NDArray[np.float64]
I4 = npt.NDArray[np.int32]
I8 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
