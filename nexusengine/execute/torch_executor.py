"""Steps on a real device, through torch: CPU and CUDA by the same code."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nexusengine.attention.base import AttentionMeta
from nexusengine.config import DeviceSpec
from nexusengine.errors import ModelLoadError
from nexusengine.execute.base import ExecutorOptions, ExecutorSpec, Progress
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.execute.block_tables import DeviceTables
from nexusengine.execute.decode_graphs import CudaGraphDevice, DecodeGraphs
from nexusengine.execute.graphs import GraphDevice, GraphShape
from nexusengine.execute.load import LoadedModel, load_model
from nexusengine.execute.memory import (
    RESERVE_SHARE,
    DeviceMemory,
    cpu_memory,
    graph_budget_bytes,
    largest_step,
    plan_memory,
    ready_blocks,
)
from nexusengine.execute.staging import ReadBack, Staging, Timer
from nexusengine.loading.resolve import ModelFiles
from nexusengine.loading.weights import WeightSource, open_weights
from nexusengine.model_config import ModelConfig
from nexusengine.obs.logs import get_logger
from nexusengine.sampling.sampler import sample

log = get_logger("executor")


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A step's tensors on the device.

    Attributes:
        token_ids: i8 `[T]`.
        positions: i8 `[T]`.
        last: i8 `[N]`, where in the batch the last token of each sampled row is.
        sampled_slots: i8 `[N]`, the slots of the sampled rows.
        meta: for the attention backend.
        graph: the shape that runs the step, with rows of padding among the tensors; None: no graph does.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    sampled_slots: torch.Tensor
    meta: AttentionMeta
    graph: GraphShape | None = None


class TorchExecutor:
    """A model, its KV cache and its attention backend on one device. Made by `create`.

    Attributes:
        kv: the cache, `[2, L, num_blocks, block_size, Hkv, D]`, keys before values; None once it is closed.
    """

    def __init__(self, loaded: LoadedModel, spec: ExecutorSpec) -> None:
        self.spec = spec
        attention_spec, c = loaded.attention_spec, loaded.model.config
        self._model, self._attention = loaded.model, loaded.backend(attention_spec)
        self._device, self._block_size = attention_spec.device, attention_spec.block_size
        shape = (2, c.num_layers, spec.num_blocks, spec.block_size, c.num_kv_heads, c.head_dim)
        self.kv: torch.Tensor | None = torch.empty(shape, dtype=loaded.cache_dtype, device=self._device)
        self.kv[:, :, : spec.ready_blocks].zero_()  # else the first steps that write there wait for their pages
        self._places: dict[str, np.ndarray] = {}
        self._last_tokens = torch.zeros(1, dtype=torch.long, device=self._device)
        self._staging = Staging(self._device)
        self._in_flight: deque[tuple[ReadBack, Timer]] = deque()
        self._timer: Timer | None = None
        self.graphs: DecodeGraphs | None = None
        self._tables: DeviceTables | None = None if self._device.type == "cpu" else self._device_tables()

    @classmethod
    def create(
        cls, files: ModelFiles, device: DeviceSpec, options: ExecutorOptions, progress: Progress
    ) -> TorchExecutor:
        """Load the model and allocate its KV cache.

        Raises:
            ModelLoadError: naming the model's file or folder.
            ConfigError: naming the setting that cannot be met.
        """
        try:
            with open_weights(files) as source:
                return cls.build(files.config, source, device, options, progress)
        except ModelLoadError as error:
            if str(files.path) in error.message:
                raise
            raise ModelLoadError(f"{files.path}: {error.message}") from None

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        config: ModelConfig,
        source: WeightSource | None,
        device: DeviceSpec,
        options: ExecutorOptions,
        progress: Progress,
    ) -> TorchExecutor:
        """As `create`, from weights that are open already.

        Args:
            config: of the model.
            source: the weights; None: random ones from `options.seed`, for checks without a checkpoint.
            device: where it is to run.
            options: what the user decided.
            progress: told how far loading is.
        """
        loaded = load_model(config, source, device, options, progress)
        progress("allocating the KV cache", 0.0)
        on_cpu = loaded.attention_spec.device.type == "cpu"
        memory = cpu_memory(loaded.model.weights.total_bytes) if on_cpu else _gpu_memory(loaded, device, options)
        block_size, element_bytes = loaded.attention_spec.block_size, loaded.cache_dtype.itemsize
        plan = plan_memory(config, options, device, memory, block_size, element_bytes)
        executor = cls(loaded, _spec(loaded, device, options, plan.num_blocks, plan.max_model_len))
        log.info("memory of %s: %s", device, plan.text())
        if memory.graphs:
            graph_device = CudaGraphDevice(loaded.attention_spec.device)
            executor.capture_decodes(graph_device, memory.graphs, options.max_running, progress)
        progress("ready", 1.0)
        return executor

    @torch.inference_mode()
    def submit(self, batch: StepBatch) -> None:
        """Computes at once on a CPU; on CUDA only launches."""
        if len(self._in_flight) > self.spec.overlaps:
            raise RuntimeError(f"steps in flight: {len(self._in_flight)}; collect it first")
        if self.kv is None:
            raise RuntimeError("the executor is closed")
        timer = Timer(self._device, self._timer)
        rows = np.nonzero(batch.sampled)[0]
        inputs = self._inputs(batch, rows)
        compute = self._planned(inputs, self.kv)
        tokens, logprobs = None, None
        timer.begin()
        hidden = compute()
        if len(rows):
            sampling = batch.sampling.rows(batch.slots[rows], (batch.starts + batch.counts)[rows])
            tokens, logprobs = sample(self._model.logits(hidden), sampling)
            # a row without a token (-1) fails; until its owner knows, any valid id keeps the others' steps safe
            self._last_tokens[inputs.sampled_slots] = tokens.clamp_min(0)
        read_back = ReadBack(tokens, logprobs)
        timer.stop()
        self._timer = timer
        self._in_flight.append((read_back, timer))

    def _hidden(self, inputs: _Inputs, kv: torch.Tensor) -> torch.Tensor:
        """Hidden states `[N, C]` of the sampled rows."""
        return self._planned(inputs, kv)()

    def _planned(self, inputs: _Inputs, kv: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What computes the hidden states `[N, C]` of the sampled rows, once attention is planned.

        A decode step is one of few shapes, which may be remembered.
        """
        meta = inputs.meta
        decodes = meta.max_query_len == 1
        if inputs.graph is not None and self.graphs is not None:
            replay = self.graphs.plan(inputs.graph, meta.seq_lens_host)
            return lambda: replay()[inputs.last]
        wanted = inputs.last if self._device.type == "cpu" and not decodes else None
        self._attention.plan(meta)

        def forward() -> torch.Tensor:
            return self._model.forward(inputs.token_ids, inputs.positions, kv, self._attention, meta, wanted)

        def compute() -> torch.Tensor:
            if not self._attention.caps().graphs:
                hidden = forward()
            elif not decodes:
                hidden = self._model.ops.step(forward, None)
            else:
                tensors = (inputs.token_ids, inputs.positions, kv, meta.block_table, meta.seq_lens, meta.cu_seqlens_q)
                hidden = self._model.ops.step(forward, (*tensors, meta.slot_mapping))
            if wanted is not None or (decodes and len(inputs.last) == len(hidden)):
                return hidden
            return hidden[inputs.last]

        return compute

    def collect(self) -> StepResult:
        """Waits for the end of the oldest step, and for nothing else."""
        if not self._in_flight:
            raise RuntimeError("no step is in flight")
        read_back, timer = self._in_flight.popleft()
        device_s, idle_s = timer.seconds()
        ids, logprobs = read_back.get()
        return StepResult(ids, device_s, logprobs, idle_s)

    def close(self) -> None:
        self.kv = self.graphs = self._tables = None
        self._in_flight.clear()

    def capture_decodes(
        self,
        graph_device: GraphDevice[torch.Tensor],
        budget_bytes: int,
        max_rows: int,
        progress: Progress = lambda phase, share: None,
    ) -> None:
        """Capture the graphs of decode steps, which run as such from now on: where the backend can, within the budget.

        Args:
            graph_device: captures them.
            budget_bytes: for all graphs together.
            max_rows: most rows of a step.
            progress: told how far capturing is.
        """
        kv, attention = self.kv, self._attention
        if kv is None:
            raise RuntimeError("the executor is closed")

        def forward(token_ids: torch.Tensor, positions: torch.Tensor, meta: AttentionMeta) -> torch.Tensor:
            return self._model.forward(token_ids, positions, kv, attention, meta)

        graphs = DecodeGraphs(
            graph_device,
            attention,
            forward,
            device=self._device,
            block_size=self._block_size,
            max_rows=max_rows,
            max_tokens=self.spec.max_model_len,
            budget_bytes=budget_bytes,
        )
        graphs.capture(lambda share: progress("capturing decode steps as CUDA graphs", share))
        if not graphs.table.failure:
            self.graphs, self._tables = graphs, self._tables or self._device_tables()

    # ---- building the step's tensors -----------------------------------------------------------------------------

    def _upload_with_tables(
        self, batch: StepBatch, width: int, arrays: dict[str, np.ndarray], graph: GraphShape | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The step's arrays on the device, and its rows' block tables, `width` blocks or what the graph reads."""
        if self._tables is None:
            there = self._upload({**arrays, "block_table": batch.block_tables[batch.slots, :width]}, graph)
            return there, there["block_table"]
        self._tables.update(batch, self._block_size)
        there = self._upload({**arrays, "table_rows": batch.slots.astype(np.int64) + 1}, graph)
        target = None if graph is None or self.graphs is None else self.graphs.block_table(graph)
        width = width if target is None else target.shape[1]
        return there, self._tables.rows(there["table_rows"], width, target)

    def _device_tables(self) -> DeviceTables:
        return DeviceTables(self._device, -(-self.spec.max_model_len // self._block_size))

    def _upload(self, arrays: dict[str, np.ndarray], graph: GraphShape | None) -> dict[str, torch.Tensor]:
        """Copy a step's arrays to the device.

        On CUDA in one copy, without waiting for it, for a graph straight to where it looks; on a CPU each to the place
        that is always its own, so that steps of the same shape find their inputs at the same addresses.
        """
        if graph is not None and self.graphs is not None:
            return self._staging.upload(self.graphs.padded(graph, arrays), self.graphs.inputs)
        if self._device.type == "cpu":
            return {name: self._place(name, array) for name, array in arrays.items()}
        return self._staging.upload(arrays)

    def _place(self, name: str, array: np.ndarray) -> torch.Tensor:
        """Rows of the place of this name, which grows; one with columns is as wide as it ever needs to be."""
        place = self._places.get(name)
        if place is None or len(place) < len(array) or place.shape[1:] < array.shape[1:]:
            shape = [2 ** max(len(array) - 1, 1).bit_length()]
            if array.ndim == 2:
                widest = -(-self.spec.max_model_len // self._block_size)
                shape.append(max(widest, array.shape[1]))
            place = self._places[name] = np.zeros(shape, array.dtype)
        place[tuple(slice(size) for size in array.shape)] = array
        return torch.from_numpy(place[: len(array)])

    def _inputs(self, batch: StepBatch, sampled_rows: np.ndarray) -> _Inputs:
        size, total = self._block_size, len(batch.token_ids)
        self._hold_slots(len(batch.block_tables))
        seq_lens = batch.starts + batch.counts
        ends = np.cumsum(batch.counts, dtype=np.int64)
        longest, most = int(seq_lens.max()), int(batch.counts.max())
        if most == 1:
            rows, positions = np.arange(total), batch.starts.astype(np.int64)
        else:
            rows = np.repeat(np.arange(len(batch.slots)), batch.counts)
            positions = np.arange(total) - np.repeat(ends - seq_lens, batch.counts)
        slot_mapping = (
            batch.block_tables[batch.slots[rows], positions // size].astype(np.int64) * size + positions % size
        )
        starts = np.zeros(len(ends) + 1, np.int32)
        starts[1:] = ends
        graph = self.graphs.table.shape_for(total, longest) if most == 1 and self.graphs is not None else None
        arrays = {
            "token_ids": batch.token_ids.astype(np.int64),
            "positions": positions,
            "slot_mapping": slot_mapping,
            "token_slots": batch.slots[rows].astype(np.int64),
            "last": ends[sampled_rows] - 1,
            "sampled_slots": batch.slots[sampled_rows].astype(np.int64),
            "seq_lens": seq_lens,
            "cu_seqlens_q": starts,
        }
        there, block_table = self._upload_with_tables(batch, -(-longest // size), arrays, graph)
        sampled = len(sampled_rows)
        ids = there["token_ids"]
        if (batch.token_ids < 0).any():
            torch.where(ids < 0, self._last_tokens[there["token_slots"]], ids, out=ids)
        meta = AttentionMeta(
            block_table=block_table,
            seq_lens=there["seq_lens"],
            cu_seqlens_q=there["cu_seqlens_q"],
            slot_mapping=there["slot_mapping"],
            seq_lens_host=seq_lens.tolist(),
            query_lens_host=batch.counts.tolist(),
            num_decodes=int((batch.counts == 1).sum()),
            max_seq_len=longest,
            max_query_len=most,
        )
        last, slots = there["last"][:sampled], there["sampled_slots"][:sampled]
        return _Inputs(ids, there["positions"], last, slots, meta, graph)

    def _hold_slots(self, slots: int) -> None:
        """Room to remember the last token of so many slots."""
        have = len(self._last_tokens)
        if have < slots:
            self._last_tokens = torch.cat([self._last_tokens, self._last_tokens.new_zeros(slots - have)])


def _spec(
    loaded: LoadedModel, device: DeviceSpec, options: ExecutorOptions, num_blocks: int, max_model_len: int
) -> ExecutorSpec:
    attention, config = loaded.attention_spec, loaded.model.config
    block_bytes = attention.block_size * config.kv_bytes_per_token(loaded.cache_dtype.itemsize)
    on_cuda = attention.device.type == "cuda"
    return ExecutorSpec(
        device=str(device),
        dtype=str(attention.dtype).removeprefix("torch."),
        block_size=attention.block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_batch_tokens=options.max_batch_tokens,
        vocab_size=config.vocab_size,
        attention_backend=loaded.backend.name,
        weights_bytes=loaded.model.weights.total_bytes,
        kv_bytes=num_blocks * block_bytes,
        kv_dtype=str(attention.kv_dtype).removeprefix("torch.") if attention.kv_dtype else "",
        device_name=torch.cuda.get_device_name(attention.device) if on_cuda else "",
        overlaps=on_cuda if options.overlap is None else options.overlap,
        ready_blocks=0 if on_cuda else ready_blocks(num_blocks, block_bytes),
    )


def _gpu_memory(loaded: LoadedModel, device: DeviceSpec, options: ExecutorOptions) -> DeviceMemory:
    """The device's memory after the largest step has run on a KV cache of two blocks, to measure its peak."""
    where = loaded.attention_spec.device
    total_bytes = torch.cuda.mem_get_info(where)[1]
    graphs_bytes = 0
    if loaded.backend.caps().graphs and not options.enforce_eager:
        graphs_bytes = graph_budget_bytes(total_bytes)
    step = largest_step(options, loaded.max_positions, loaded.attention_spec.block_size)
    executor = TorchExecutor(loaded, _spec(loaded, device, options, 2, loaded.max_positions))
    before_bytes = torch.cuda.memory_allocated(where)
    torch.cuda.reset_peak_memory_stats(where)
    executor.submit(step)
    executor.collect()
    peak_bytes = torch.cuda.max_memory_allocated(where) - before_bytes
    executor.close()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(where)
    free_bytes = max(int(free - RESERVE_SHARE * total) - peak_bytes - graphs_bytes, 0)
    return DeviceMemory(
        total=total_bytes,
        weights=loaded.model.weights.total_bytes,
        free=free_bytes,
        default_kv=free_bytes,
        activations=peak_bytes,
        graphs=graphs_bytes,
        reserve=int(RESERVE_SHARE * total_bytes),
    )
