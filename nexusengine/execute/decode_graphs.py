"""Decode steps as CUDA graphs: inputs at fixed places, rows of padding, and the capture itself.

Written for CUDA and rehearsed on the CPU with a device that computes where a graph would be replayed; it has not run on
a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.execute.graphs import Captured, GraphDevice, GraphShape, GraphTable, row_buckets
from nexusengine.obs.logs import get_logger

log = get_logger("graphs")
Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMeta], torch.Tensor]
"""(token_ids, positions, meta) -> hidden `[T, C]`."""


class CudaGraphDevice:
    """One memory pool for all graphs of a device; they run one at a time and may share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, compute: Callable[[], torch.Tensor]) -> Captured[torch.Tensor]:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = compute()
        return Captured(graph.replay, output)

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)


class DecodeGraphs:
    """Graphs of one executor's decode steps. forward: the model's, with its KV cache and backend.

    A row of padding has one token in the null block, writes to slot -1, which is skipped, and nobody reads its output.
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
        self._attention, self._forward = attention, forward
        rows, width = row_buckets(max_rows)[-1], -(-max_tokens // block_size)
        self._token_ids = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._slot_mapping = torch.full((rows,), -1, dtype=torch.long, device=device)
        self._block_table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._seq_lens = torch.ones(rows, dtype=torch.int32, device=device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._block_size = block_size
        self._metas: dict[GraphShape, AttentionMeta] = {}

    def hidden(self, token_ids: torch.Tensor, positions: torch.Tensor, meta: AttentionMeta) -> torch.Tensor | None:
        """Of a step in which every row computes one token; None if it has to be computed without a graph."""
        rows = len(token_ids)
        shape = self.table.shape_for(rows, meta.max_seq_len)
        if shape is None:
            return None
        if shape not in self.table.captured and shape not in self.table.refused:
            self._fill_padding(0, self._seq_lens.shape[0])
            known = set(self.table.refused)
            self.table.graph(shape, self._computation)
            for one, reason in self.table.refused.items():
                if one not in known:
                    log.info("decode steps up to %d x %d tokens run without a graph: %s", one.rows, one.longest, reason)
        captured = self.table.graph(shape, self._computation)
        if captured is None:
            return None
        self._fill_padding(rows, shape.rows)
        self._token_ids[:rows] = token_ids
        self._positions[:rows] = positions
        self._slot_mapping[:rows] = meta.slot_mapping
        self._block_table[:rows, : meta.block_table.shape[1]] = meta.block_table
        self._seq_lens[:rows] = meta.seq_lens
        static = self._meta(shape)
        static.seq_lens_host[:] = meta.seq_lens_host + [1] * (shape.rows - rows)
        self._attention.plan(static)
        captured.replay()
        self.table.replays += 1
        return captured.output[:rows]

    def _fill_padding(self, begin: int, end: int) -> None:
        if begin < end:
            self._token_ids[begin:end] = 0
            self._positions[begin:end] = 0
            self._slot_mapping[begin:end] = -1
            self._block_table[begin:end, 0] = 0
            self._seq_lens[begin:end] = 1

    def _computation(self, shape: GraphShape) -> Callable[[], torch.Tensor]:
        meta, rows = self._meta(shape), shape.rows
        self._attention.plan(meta)
        return lambda: self._forward(self._token_ids[:rows], self._positions[:rows], meta)

    def _meta(self, shape: GraphShape) -> AttentionMeta:
        """At fixed places; the longest row is what the shape allows, since grids are captured with it."""
        meta = self._metas.get(shape)
        if meta is None:
            rows = shape.rows
            meta = self._metas[shape] = AttentionMeta(
                block_table=self._block_table[:rows, : -(-shape.longest // self._block_size)],
                seq_lens=self._seq_lens[:rows],
                cu_seqlens_q=self._starts[: rows + 1],
                slot_mapping=self._slot_mapping[:rows],
                seq_lens_host=[1] * rows,
                query_lens_host=[1] * rows,
                num_decodes=rows,
                max_seq_len=shape.longest,
                max_query_len=1,
            )
        return meta
