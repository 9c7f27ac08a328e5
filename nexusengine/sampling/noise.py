"""Random numbers that depend on (seed, position, token id) and on nothing else.

A counter-based generator: no state, so a request draws the same numbers whatever else is in its batch, after a
preemption, and on another worker. Two rounds of the 32-bit murmur3 finaliser over the counter, keyed twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from nexusengine.splitmix import GOLDEN, splitmix64_array


def row_keys(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int32]) -> torch.Tensor:
    """Two 32-bit keys for each row, i4 `[N, 2]`: splitmix64 of seed and position."""
    with np.errstate(over="ignore"):
        streams = splitmix64_array(seeds.astype(np.uint64))
        keys = splitmix64_array(streams + positions.astype(np.uint64) * np.uint64(GOLDEN))
    return torch.from_numpy(keys.view(np.int32).reshape(-1, 2).copy())


def exponential(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard exponential variates, float32 `[N, K]`, never 0: keys i4 `[N, 2]`, token ids i4 `[N, K]` or `[K]`."""
    x = _mix(ids * _signed(0x9E3779B9) ^ keys[:, :1])
    x = _mix(x + keys[:, 1:])
    uniform = ((_shift(x, 8)).float() + 0.5) * 2.0**-24
    return -torch.log1p(-uniform)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shift(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shift(x, 16)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int32, which torch has only as an arithmetic one."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x
