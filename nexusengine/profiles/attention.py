"""How long one layer's attention takes, for any mix of prompt chunks and decodes.

Sources differ in what was measured together. `JointAttention`: prompt chunk and decodes in one kernel call, as an
engine without separate phases runs them; decodes beside a chunk take up to 2.4 times as long as alone.
`SplitAttention`: chunks and decodes measured apart and added.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nexusengine.arrays import F8
from nexusengine.profiles.curves import Quad, Surface

Chunk = tuple[int, int]
"""(tokens computed, tokens in the KV cache before them)."""

LONGEST_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Parts:
    """The functions that attention is put together from, each linear in every argument between points of the axes.

    Attributes:
        chunks, cached, decodes, read: the axes, not sorted: tokens of a chunk, tokens cached before it, number of
            decodes, KV tokens that each of them reads.
        prefill_s: seconds of a chunk by (chunk, cached).
        launch_s: of these, what a step pays once.
        decodes_s: seconds of decodes alone by (decodes, read).
        beside_s: what decodes add to a chunk by (chunk, cached, decodes, read); the step takes no less than prefill_s
            or decodes_s. None: at least decodes_s.
    """

    chunks: Sequence[float]
    cached: Sequence[float]
    decodes: Sequence[float]
    read: Sequence[float]
    prefill_s: Callable[[float, float], float]
    launch_s: float
    decodes_s: Callable[[float, float], float]
    beside_s: Callable[[float, float, float, float], float] | None


class Attention(Protocol):
    """Seconds of one layer."""

    def parts(self) -> Parts:
        """What it is put together from."""
        ...

    def decodes_s(self, n: int, mean_kv: float, longest_kv: float) -> float:
        """`n` sequences that compute one token each, over that many KV tokens."""
        ...

    def decode_run_s(self, n: int, mean_kv: F8, longest_kv: F8) -> F8:
        """`decodes_s` for many contexts of the same `n`."""
        ...

    def mixed_s(self, chunks: Sequence[Chunk], n: int, mean_kv: float, longest_kv: float) -> float:
        """At least one chunk, and `n` decodes, which may be 0."""
        ...


def pieces(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks with those beyond the measured length cut, the longest first.

    A long chunk is a shorter one followed by one that has more in its cache.
    """
    out: list[Chunk] = []
    for q, ctx in chunks:
        while q > LONGEST_CHUNK:
            out.append((LONGEST_CHUNK, ctx))
            q, ctx = q - LONGEST_CHUNK, ctx + LONGEST_CHUNK
        out.append((q, ctx))
    out.sort(reverse=True)
    return out


class Skew:
    """The cost of unequal contexts over their mean: t = t_mean + alpha * (t_max - t_mean).

    alpha `[n, chunk class, spread]`: medians of measured ones, by decodes, by tokens of the chunk beside them, and by
    the spread (t_max - t_mean) / t_mean; the nearest n on a log scale is taken.
    """

    def __init__(self, ns: Sequence[float] | F8, chunk_edges: Sequence[float] | F8, spreads: F8, alpha: F8) -> None:
        n = np.asarray(ns, np.float64)
        self._n_edges: list[float] = np.sqrt(n[:-1] * n[1:]).tolist()
        self._chunk_edges: list[float] = np.asarray(chunk_edges, np.float64).tolist()
        self._spreads: list[float] = np.asarray(spreads, np.float64).tolist()
        self._alpha: list[list[list[float]]] = np.asarray(alpha, np.float64).tolist()
        self._arrays = np.asarray(spreads, np.float64), np.asarray(alpha, np.float64)

    def __call__(self, n: int, chunk: int, at_mean: float, at_longest: float) -> float:
        """Seconds to add to `at_mean`."""
        gap = at_longest - at_mean
        if n < 2 or gap <= 0.0 or at_mean <= 0.0:
            return 0.0
        row = self._alpha[bisect_right(self._n_edges, n)][bisect_right(self._chunk_edges, chunk)]
        return gap * row[bisect_right(self._spreads, gap / at_mean)]

    def along(self, n: int, at_mean: F8, at_longest: F8) -> F8:
        """For many decode-only steps."""
        if n < 2:
            return np.zeros_like(at_mean)
        spreads, alpha = self._arrays
        gap = np.maximum(at_longest - at_mean, 0.0)
        row = alpha[bisect_right(self._n_edges, n), 0]
        out: F8 = gap * row[np.searchsorted(spreads, gap / np.maximum(at_mean, 1e-12), side="right")]
        return out


class JointAttention:
    """Attention measured with decodes and prefills in one call.

    Args:
        decodes: surface over (n, KV tokens).
        prefill: surface over (chunk, cached).
        beside: what n decodes of some context add to a chunk, over (chunk, cached, n, KV tokens).
        skew: the cost of unequal contexts.
        shortest_chunk: in tokens; its time is taken for a launch.
    """

    def __init__(self, decodes: Surface, prefill: Surface, beside: Quad, skew: Skew, shortest_chunk: int) -> None:
        self._decodes, self._prefill, self._beside, self._skew = decodes, prefill, beside, skew
        self._floor_s = prefill(shortest_chunk, 0)
        self._longest_cached = beside.last_b

    def parts(self) -> Parts:
        """See Parts."""
        q, ctx, n, kv = self._beside.axes

        def beside(chunk: float, cached: float, decodes: float, mean_kv: float) -> float:
            return self._beside(chunk, min(cached, self._longest_cached), decodes, mean_kv, mean_kv)[0]

        (chunks, cached), (decodes, read) = self._prefill.axes, self._decodes.axes
        axes = [*chunks, *q], [*cached, *ctx], [*decodes, *n], [*read, *kv]
        return Parts(*axes, self._prefill, self._floor_s, self._decodes, beside)

    def decodes_s(self, n: int, mean_kv: float, longest_kv: float) -> float:
        decodes = self._decodes
        row = decodes.row(n)
        at_mean = decodes.in_row(row, mean_kv)
        return at_mean + self._skew(n, 0, at_mean, decodes.in_row(row, longest_kv))

    def decode_run_s(self, n: int, mean_kv: F8, longest_kv: F8) -> F8:
        at_mean = self._decodes.along(n, mean_kv)
        return at_mean + self._skew.along(n, at_mean, self._decodes.along(n, longest_kv))

    def mixed_s(self, chunks: Sequence[Chunk], n: int, mean_kv: float, longest_kv: float) -> float:
        """The longest chunk as it was measured with the decodes; of the others what they take beyond a launch.

        A call takes no less than its chunk or its decodes alone: what decodes add falls as the chunk's own context
        grows, and is not carried on below that behind the longest context measured.
        """
        cut = pieces(chunks) if len(chunks) > 1 or chunks[0][0] > LONGEST_CHUNK else chunks
        q, ctx = cut[0]
        total = self._prefill(q, ctx)
        if n:
            mean_s, longest_s = self._beside(q, min(ctx, self._longest_cached), n, mean_kv, longest_kv)
            at_mean = max(total + mean_s, total, self.decodes_s(n, mean_kv, mean_kv))
            total = at_mean + self._skew(n, q, at_mean, total + longest_s)
        for q, ctx in cut[1:]:
            total += max(self._prefill(q, ctx) - self._floor_s, 0.0)
        return total


class SplitAttention:
    """Attention of decodes and of prefills, measured apart; no cost of unequal contexts.

    Args:
        decodes: surface over (n, KV tokens).
        prefill: surface over (chunk, cached).
        shortest_chunk: in tokens; its time is taken for a launch.
        beside: how many times as long decodes take in one kernel call with a chunk.
    """

    def __init__(self, decodes: Surface, prefill: Surface, shortest_chunk: int, beside: float) -> None:
        self._decodes, self._prefill, self._beside = decodes, prefill, beside
        self._floor_s = prefill(shortest_chunk, 0)

    def parts(self) -> Parts:
        """See Parts."""
        return Parts(*self._prefill.axes, *self._decodes.axes, self._prefill, self._floor_s, self._decodes, None)

    def decodes_s(self, n: int, mean_kv: float, longest_kv: float) -> float:
        del longest_kv
        return self._decodes.in_row(self._decodes.row(n), mean_kv)

    def decode_run_s(self, n: int, mean_kv: F8, longest_kv: F8) -> F8:
        del longest_kv
        return self._decodes.along(n, mean_kv)

    def mixed_s(self, chunks: Sequence[Chunk], n: int, mean_kv: float, longest_kv: float) -> float:
        cut = pieces(chunks)
        total = self._prefill(*cut[0]) + (self._beside * self.decodes_s(n, mean_kv, longest_kv) if n else 0.0)
        for q, ctx in cut[1:]:
            total += max(self._prefill(q, ctx) - self._floor_s, 0.0)
        return total
