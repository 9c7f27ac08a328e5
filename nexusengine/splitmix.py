"""splitmix64 (Steele, Lea and Flood, OOPSLA 2014): 64 well-mixed bits of a counter, for draws without state.

Twice, for one number and for arrays: numpy takes microseconds for one, and Python for many.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: the step between the states of one stream."""
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK_64 = 2**64 - 1


def splitmix64(seed: int, counter: int) -> int:
    """The counter-th output, from 0, of the generator that starts at `seed`."""
    x = (seed + (counter + 1) * GOLDEN) & MASK_64
    x = ((x ^ (x >> 30)) * _FIRST) & MASK_64
    x = ((x ^ (x >> 27)) * _SECOND) & MASK_64
    return x ^ (x >> 31)


def splitmix64_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The next output at each state: `splitmix64(seed, counter)` is that at seed + counter * GOLDEN."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))
