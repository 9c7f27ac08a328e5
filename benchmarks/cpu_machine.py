"""What the machine gives, for cpu_peer_worker.py: bandwidth of reading, rate of matrix products, and our attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

HEADS, KV_HEADS, DIM, BLOCK, ROWS = 9, 3, 64, 16, 16


def fastest_s(compute: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        began_s = time.perf_counter()
        compute()
        found.append(time.perf_counter() - began_s)
    return min(found)


class Machine:
    def __init__(self, work: dict[str, Any], variant: str) -> None:
        torch.set_num_threads(work["threads"])
        from nexusengine import native

        native.library().set_threads(work["threads"])
        self._memory = torch.ones(1 << 27)  # 512 MiB
        blocks = ROWS * 8192 // BLOCK + 1
        self._caches = [torch.randn(blocks, BLOCK, KV_HEADS, DIM) for _ in range(2)]

    def generate(self, prompts: list[list[int]], output: int) -> int:
        return 0

    def measured(self) -> dict[str, float]:
        read_s = fastest_s(self._memory.sum, 7)
        x, w = torch.randn(512, 1536), torch.randn(1536, 1536)
        gemm_s = fastest_s(lambda: x @ w, 15)
        long_s, half_s = self._attention_s(8192), self._attention_s(4096)
        read_bytes = ROWS * 8192 * KV_HEADS * DIM * 4 * 2
        return {
            "read_bytes_s": self._memory.nbytes / read_s,
            "gemm_flop_s": 2 * 512 * 1536 * 1536 / gemm_s,
            "attention_bytes_s": read_bytes / long_s,
            "attention_growth": long_s / (2 * half_s),
        }

    def _attention_s(self, tokens: int) -> float:
        from nexusengine.attention.base import AttentionMeta, AttentionSpec
        from nexusengine.attention.native_cpu import NativeCpuBackend

        cpu = torch.device("cpu")
        backend = NativeCpuBackend(AttentionSpec(HEADS, KV_HEADS, DIM, torch.float32, cpu, BLOCK, DIM**-0.5))
        lengths, each = [tokens] * ROWS, tokens // BLOCK
        table = 1 + torch.arange(ROWS * each, dtype=torch.int32).view(ROWS, each)
        meta = AttentionMeta(
            table,
            torch.tensor(lengths, dtype=torch.int32),
            torch.arange(ROWS + 1, dtype=torch.int32),
            torch.zeros(ROWS, dtype=torch.int64),
            lengths,
            [1] * ROWS,
            ROWS,
            tokens,
            1,
        )
        backend.plan(meta)
        q, out = torch.randn(ROWS, HEADS, DIM), torch.empty(ROWS, HEADS, DIM)
        keys, values = self._caches
        return fastest_s(lambda: backend.run(q, keys, values, meta, out), 7)
