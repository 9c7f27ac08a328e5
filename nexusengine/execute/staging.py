"""Copies between host and device without waiting.

A step's inputs go up through pinned buffers that are allocated once, its results come down in one asynchronous copy
each, behind one event. On the CPU a copy is a copy, and an event has always happened.
"""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch

from nexusengine.sampling.sampler import DeviceLogprobs
from nexusengine.sampling.table import SampledLogprobs

_ALIGNED_BYTES = 16
_SMALLEST_BYTES = 2**16
_RING = 2


class Mark(Protocol):
    """A place in the device's work."""

    def record(self) -> None: ...

    def synchronize(self) -> None:
        """Wait until the device has got there."""
        ...


class _Passed:
    """A mark where everything is done at once."""

    def record(self) -> None:
        return

    def synchronize(self) -> None:
        return


class Timer:
    """Seconds of a step on the device, and of its idleness before it.

    On CUDA from two events, read once the step is known to be over: `begin` is called just before the step's work is
    launched, so that an idle device's wait for the host, which builds the inputs, is no part of the step. On a CPU the
    host is the device, and the step begins where it is made.

    Args:
        device: that computes.
        before: the timer of the step before; None: there was none.
    """

    def __init__(self, device: torch.device, before: Timer | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._before = before
        self._began_s = self._ended_s = time.perf_counter()
        if self._cuda:
            self._began = torch.Event("cuda", enable_timing=True)
            self._ended = torch.Event("cuda", enable_timing=True)

    def begin(self) -> None:
        if self._cuda:
            self._began.record()

    def stop(self) -> None:
        self._ended_s = time.perf_counter()
        if self._cuda:
            self._ended.record()

    def seconds(self) -> tuple[float, float]:
        """(of the step, of the device's idleness before it). Waits for the device; to be called once."""
        before, self._before = self._before, None
        if not self._cuda:
            return self._ended_s - self._began_s, max(self._began_s - before._ended_s, 0.0) if before else 0.0
        self._ended.synchronize()
        idle_ms = before._ended.elapsed_time(self._began) if before else 0.0
        return self._began.elapsed_time(self._ended) / 1000, max(idle_ms, 0.0) / 1000


def views(buffer: torch.Tensor, arrays: dict[str, np.ndarray]) -> tuple[dict[str, torch.Tensor], int]:
    """Lay arrays one after the other into a buffer of bytes.

    The same arrays, by order, types and shapes, always lie at the same places.

    Returns:
        A view of the buffer for each array, and how many bytes they take.
    """
    found, at = {}, 0
    for name, array in arrays.items():
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        found[name] = buffer[at : at + array.nbytes].view(dtype).view(array.shape)
        at += bytes_of(array)
    return found, at


def bytes_of(array: np.ndarray) -> int:
    """Bytes that an array takes in a buffer beside others."""
    return -(-array.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


class Staging:
    """A ring of host buffers and their places on the device. Arrays given together travel in one copy.

    A host buffer is filled again only when its last copy is over; its place on the device is written by a copy that the
    device does after all work on what was there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._host: list[torch.Tensor] = []
        self._there: list[torch.Tensor] = []
        self._copied: list[Mark] = []
        self._next = 0

    def upload(self, arrays: dict[str, np.ndarray], there: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Copy arrays of any types to the device.

        Args:
            arrays: by name.
            there: a buffer of the caller's to be written, where they hold until it is given again; None: they hold
                until the second call from now.
        """
        total = sum(map(bytes_of, arrays.values()))
        if not self._host or self._host[0].numel() < total:
            self._grow(total)
        at, self._next = self._next, (self._next + 1) % _RING
        host, copied = self._host[at], self._copied[at]
        there = self._there[at] if there is None else there
        copied.synchronize()
        filled, _ = views(host, arrays)
        for name, array in arrays.items():
            filled[name].numpy()[...] = array
        there[:total].copy_(host[:total], non_blocking=self._pinned)
        copied.record()
        return views(there, arrays)[0]

    def _grow(self, needed_bytes: int) -> None:
        for copied in self._copied:
            copied.synchronize()
        size = max(_SMALLEST_BYTES, 2 ** (needed_bytes - 1).bit_length())
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(_RING)]
        self._there = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(_RING)]
        self._copied = [torch.Event("cuda") if self._pinned else _Passed() for _ in range(_RING)]


class ReadBack:
    """A step's sampled tokens, on their way to the host since they were made."""

    def __init__(self, tokens: torch.Tensor | None, logprobs: DeviceLogprobs | None) -> None:
        self._tokens = None if tokens is None else _down(tokens.int())
        self._logprobs = logprobs and DeviceLogprobs(
            _down(logprobs.chosen), _down(logprobs.top_ids), _down(logprobs.top)
        )

    def get(self) -> tuple[np.ndarray, SampledLogprobs | None]:
        """Only once the device has got past it; waits for nothing."""
        ids = np.empty(0, np.int32) if self._tokens is None else self._tokens.numpy()
        return ids, None if self._logprobs is None else self._logprobs.fetch()


def _down(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned memory comes from torch's own cache of it, where it returns once nobody holds the result."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
