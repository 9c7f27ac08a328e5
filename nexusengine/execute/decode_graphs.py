"""Decode steps as CUDA graphs: inputs at fixed places of one buffer, rows of padding, and the capture itself.

Tests run it on the CPU, with a device that computes where a graph would be replayed.
"""

from __future__ import annotations

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
    """Graphs of one executor's decode steps.

    All inputs of a step lie in one buffer, `inputs`, at places that its shape determines, so that one copy brings them
    there; a step's are those of its rows and of rows of padding. A row of padding has one token in the null block,
    writes to slot -1, which is skipped, and nobody reads its output.

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
        self._metas: dict[GraphShape, AttentionMeta] = {}
        self._places: dict[GraphShape, dict[str, torch.Tensor]] = {}

    def shape_of(self, rows: int, longest: int) -> GraphShape | None:
        """The shape whose graph runs a step in which every row computes one token, captured if need be.

        Returns:
            None if the step has to be computed without a graph.
        """
        shape = self.table.shape_for(rows, longest)
        if shape is None:
            return None
        if shape not in self.table.captured and shape not in self.table.refused:
            known = set(self.table.refused)
            self.table.graph(shape, self._computation)
            for one, reason in self.table.refused.items():
                if one not in known:
                    log.info("decode steps up to %d x %d tokens run without a graph: %s", one.rows, one.longest, reason)
        return shape if shape in self.table.captured else None

    def padded(self, shape: GraphShape, step: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A step's arrays with rows of padding, in the order in which they lie in `inputs`."""
        rows, width = shape.rows, -(-shape.longest // self._block_size)
        arrays: dict[str, np.ndarray] = {
            "token_ids": np.zeros(rows, np.int64),
            "positions": np.zeros(rows, np.int64),
            "slot_mapping": np.full(rows, -1, np.int64),
            "token_slots": np.zeros(rows, np.int64),
            "last": np.zeros(rows, np.int64),
            "sampled_slots": np.zeros(rows, np.int64),
            "seq_lens": np.ones(rows, np.int32),
            "cu_seqlens_q": np.arange(rows + 1, dtype=np.int32),
            "block_table": np.zeros((rows, width), np.int32),
        }
        for name, array in step.items():
            arrays[name][tuple(slice(size) for size in array.shape)] = array
        return arrays

    def replay(self, shape: GraphShape, seq_lens_host: list[int]) -> torch.Tensor:
        """Hidden `[T, C]` of the step whose inputs lie in `inputs`, without those of its padding."""
        captured, static, rows = self.table.graph(shape, self._computation), self._meta(shape), len(seq_lens_host)
        if captured is None:
            raise RuntimeError(f"no graph of {shape} was captured")
        static.seq_lens_host[:] = seq_lens_host + [1] * (shape.rows - rows)
        self._attention.plan(static)
        captured.replay()
        self.table.replays += 1
        return captured.output[:rows]

    def _computation(self, shape: GraphShape) -> Callable[[], torch.Tensor]:
        """With nothing but padding in the inputs, as it is to be captured."""
        meta, places = self._meta(shape), self._places[shape]
        for name, array in self.padded(shape, {}).items():
            places[name].copy_(torch.from_numpy(array))
        self._attention.plan(meta)
        return lambda: self._forward(places["token_ids"], places["positions"], meta)

    def _meta(self, shape: GraphShape) -> AttentionMeta:
        """At fixed places; the longest row is what the shape allows, since grids are captured with it."""
        meta = self._metas.get(shape)
        if meta is None:
            there, _ = views(self.inputs, self.padded(shape, {}))
            self._places[shape] = there
            meta = self._metas[shape] = AttentionMeta(
                block_table=there["block_table"],
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
