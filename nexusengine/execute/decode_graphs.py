"""Decode steps as CUDA graphs: inputs at fixed places of one buffer, rows of padding, and the capture itself.

Tests run it on the CPU, with a device that computes where a graph would be replayed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.execute.graphs import Captured, GraphDevice, GraphShape, GraphTable, row_buckets
from nexusengine.execute.staging import bytes_of, views
from nexusengine.obs.logs import get_logger

log = get_logger("graphs")
Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMeta], torch.Tensor]
"""(token_ids, positions, meta) -> hidden `[T, C]`."""


class CudaGraphDevice:
    """One stream that captures and one memory pool for all graphs of a device; they run one at a time and may share it.

    A new stream for each capture would cost a workspace of cuBLAS each, about 32 MiB.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, compute: Callable[[], torch.Tensor]) -> Captured[torch.Tensor]:
        """Whatever happens, the stream that was current before is current afterwards."""
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            compute()
            self.give_back()  # what the run took: the capture has a pool of its own, and its size is to be known
            graph = torch.cuda.CUDAGraph()
            try:
                graph.capture_begin(pool=self._pool)
                output = compute()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        usual.wait_stream(self._stream)
        return Captured(graph.replay, output)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. Before torch 2.12 `capture_end` then leaves the allocator in the graphs' pool."""
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        for end in (graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(index, self._pool)):
            with contextlib.suppress(RuntimeError):  # that it failed, or that it had ended, is known
                end()

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def give_back(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class DecodeGraphs:
    """Graphs of one executor's decode steps.

    All inputs of a step lie in one buffer, `inputs`, at places that its shape determines, so that one copy brings them
    there; a step's are those of its rows and of rows of padding. A row of padding has one token in the null block,
    writes to slot -1, which is skipped, and nobody reads its output. Block tables are no part of them: the step's rows
    are picked on the device.

    Args:
        graph_device: captures the graphs.
        attention: the backend.
        forward: the model's, with its KV cache and backend.
        device: where the inputs lie.
        block_size: tokens a KV block.
        max_rows: most rows of a step.
        max_tokens: longest row.
        budget_bytes: for all graphs together.
    """

    def __init__(
        self,
        graph_device: GraphDevice[torch.Tensor],
        attention: AttentionBackend,
        forward: Forward,
        *,
        device: torch.device,
        block_size: int,
        max_rows: int,
        max_tokens: int,
        budget_bytes: int,
    ) -> None:
        self.table: GraphTable[torch.Tensor] = GraphTable(graph_device, max_rows, max_tokens, budget_bytes)
        self._attention, self._forward, self._block_size = attention, forward, block_size
        largest = self.padded(GraphShape(row_buckets(max_rows)[-1], max_tokens), {})
        size = sum(map(bytes_of, largest.values()))
        self.inputs = torch.zeros(size, dtype=torch.uint8, device=device)
        entries = largest["token_ids"].size * -(-max_tokens // block_size)
        self._tables = torch.zeros(entries, dtype=torch.int32, device=device)
        self._metas: dict[GraphShape, AttentionMeta] = {}
        self._places: dict[GraphShape, dict[str, torch.Tensor]] = {}

    def capture(self, progress: Callable[[float], None] = lambda share: None) -> None:
        """Capture all graphs; the log says which steps run without one, and why.

        Args:
            progress: told the share of graphs that are done, 0..1.
        """
        table = self.table
        table.capture_all(self._computation, progress)
        if table.failure:
            log.warning("all steps run without graphs: %s", table.failure)
            return
        log.info("%d graphs of decode steps take %d MiB", len(table.captured), table.used_bytes // 2**20)
        for shape, reason in list(table.refused.items())[:1]:
            others = f" (as do {len(table.refused) - 1} other shapes)" if len(table.refused) > 1 else ""
            log.info(
                "decode steps of %d rows up to %d tokens have no graph%s: %s", shape.rows, shape.longest, others, reason
            )

    def padded(self, shape: GraphShape, step: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A step's arrays with rows of padding, in the order in which they lie in `inputs`."""
        rows = shape.rows
        arrays: dict[str, np.ndarray] = {
            "token_ids": np.zeros(rows, np.int64),
            "positions": np.zeros(rows, np.int64),
            "slot_mapping": np.full(rows, -1, np.int64),
            "token_slots": np.zeros(rows, np.int64),
            "last": np.zeros(rows, np.int64),
            "sampled_slots": np.zeros(rows, np.int64),
            "seq_lens": np.ones(rows, np.int32),
            "cu_seqlens_q": np.arange(rows + 1, dtype=np.int32),
            "table_rows": np.zeros(rows, np.int64),
        }
        for name, array in step.items():
            arrays[name][tuple(slice(size) for size in array.shape)] = array
        return arrays

    def block_table(self, shape: GraphShape) -> torch.Tensor:
        """i4 `[rows, blocks of the longest]`: where the graph of a shape reads its rows' tables."""
        return self._meta(shape).block_table

    def plan(self, shape: GraphShape, seq_lens_host: list[int]) -> Callable[[], torch.Tensor]:
        """Plan the step whose inputs lie in `inputs`.

        Returns:
            What runs it; gives hidden `[T, C]` without that of its padding.
        """
        captured, static, rows = self.table.graph(shape), self._meta(shape), len(seq_lens_host)
        static.seq_lens_host[:] = seq_lens_host + [1] * (shape.rows - rows)
        self._attention.plan(static)

        def run() -> torch.Tensor:
            captured.replay()
            self.table.replays += 1
            return captured.output[:rows]

        return run

    def _computation(self, shape: GraphShape) -> Callable[[], torch.Tensor]:
        """With nothing but padding in the inputs, as it is to be captured."""
        meta, places = self._meta(shape), self._places[shape]
        for name, array in self.padded(shape, {}).items():
            places[name].copy_(torch.from_numpy(array))
        meta.block_table.zero_()
        self._attention.plan(meta)
        return lambda: self._forward(places["token_ids"], places["positions"], meta)

    def _meta(self, shape: GraphShape) -> AttentionMeta:
        """At fixed places; the longest row is what the shape allows, since grids are captured with it."""
        meta = self._metas.get(shape)
        if meta is None:
            there, _ = views(self.inputs, self.padded(shape, {}))
            width = -(-shape.longest // self._block_size)
            self._places[shape] = there
            meta = self._metas[shape] = AttentionMeta(
                block_table=self._tables[: shape.rows * width].view(shape.rows, width),
                seq_lens=there["seq_lens"],
                cu_seqlens_q=there["cu_seqlens_q"],
                slot_mapping=there["slot_mapping"],
                seq_lens_host=[1] * shape.rows,
                query_lens_host=[1] * shape.rows,
                num_decodes=shape.rows,
                max_seq_len=shape.longest,
                max_query_len=1,
            )
        return meta
