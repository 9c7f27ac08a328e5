"""Steps on a real device, through torch: CPU and CUDA by the same code."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from nexusengine.attention.base import FP8, AttentionBackend, AttentionMeta, AttentionSpec
from nexusengine.attention.registry import choose
from nexusengine.cgroup import usable_cpus
from nexusengine.config import DeviceSpec
from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.execute.base import ExecutorOptions, ExecutorSpec, Progress
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.execute.decode_graphs import CudaGraphDevice, DecodeGraphs
from nexusengine.execute.graphs import GraphDevice, GraphShape
from nexusengine.execute.ledger import RESERVE_SHARE, MemoryLedger, graph_budget_bytes
from nexusengine.execute.memory import available_bytes, cpu_kv_bytes, largest_step, ready_blocks, size_kv, wanted_length
from nexusengine.execute.staging import ReadBack, Staging, Timer
from nexusengine.layers.choice import choose_ops
from nexusengine.loading.resolve import ModelFiles
from nexusengine.loading.weights import WeightSource, open_weights
from nexusengine.model_config import ModelConfig
from nexusengine.models.llama import LlamaForCausalLM
from nexusengine.models.registry import model_class
from nexusengine.obs.logs import get_logger
from nexusengine.sampling.sampler import SamplingRows, sample

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
log = get_logger("executor")


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A step on the device. token_ids, positions i8 `[T]`; last, sampled_slots i8 `[N]`: the sampled rows' last token
    in the batch, and their slots. graph: the shape that runs it, with rows of padding among its tensors, or None."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    sampled_slots: torch.Tensor
    meta: AttentionMeta
    graph: GraphShape | None = None


class TorchExecutor:
    """A model, its KV cache and its attention backend on one device. Made by `create`."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        attention: AttentionBackend,
        attention_spec: AttentionSpec,
        spec: ExecutorSpec,
        cache_dtype: torch.dtype,
    ) -> None:
        """cache_dtype: of K and V."""
        self.spec = spec
        self._model, self._attention, self._device = model, attention, attention_spec.device
        self._block_size = attention_spec.block_size
        c = model.config
        shape = (2, c.num_layers, spec.num_blocks, spec.block_size, c.num_kv_heads, c.head_dim)
        self._kv: torch.Tensor | None = torch.empty(shape, dtype=cache_dtype, device=self._device)
        self._kv[:, :, : spec.ready_blocks].zero_()  # else the first steps that write there wait for their pages
        self._places: dict[str, np.ndarray] = {}
        self._last_tokens = torch.zeros(1, dtype=torch.long, device=self._device)
        self._staging = Staging(self._device)
        self._in_flight: deque[tuple[ReadBack, Timer]] = deque()
        self.graphs: DecodeGraphs | None = None
        self.ledger: MemoryLedger | None = None

    @classmethod
    def create(
        cls, files: ModelFiles, device: DeviceSpec, options: ExecutorOptions, progress: Progress
    ) -> TorchExecutor:
        """Load the model. Raises ModelLoadError naming its file or folder, or ConfigError naming the setting that
        cannot be met."""
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
        """source None: random weights from `options.seed`, for checks without a checkpoint. Raises like `create`."""
        where = _torch_device(device)
        dtype = _dtype(options.dtype, config.dtype, where)
        longest = wanted_length(config, options)
        if longest == config.sliding_window and longest < config.max_position:
            log.warning(
                "prompt + output are limited to %d tokens: more needs sliding-window attention, which is not supported",
                longest,
            )
        attention_spec = AttentionSpec(
            config.num_heads, config.num_kv_heads, config.head_dim, dtype, where, 1, config.head_dim**-0.5,
            kv_dtype=FP8 if options.fp8_kv else None,
        )  # fmt: skip
        if where.type == "cpu":
            progress("preparing the CPU kernels (the first time, they are compiled)", 0.0)
        backend, attention_spec, passed_over = choose(attention_spec, options.attention_backend, options.block_size)
        for name, reason in passed_over:
            log.info("attention backend %s is passed over: %s", name, reason)
        ops = choose_ops(where, dtype, config.rms_norm_eps, options.quantization, config.stored)
        kept = ops.cache_dtype if backend.name == "cpu" else None
        cache_dtype = attention_spec.kv_dtype or kept or dtype
        token_bytes = config.kv_bytes_per_token(cache_dtype.itemsize)
        try:
            model = model_class(config.architecture)(
                config,
                dtype=dtype,
                device=where,
                max_positions=longest,
                source=source,
                seed=options.seed,
                ops=ops,
                scaled_kv=options.fp8_kv,
                progress=lambda fraction: progress(source.phase() if source else "loading weights", fraction),
            )
        except torch.OutOfMemoryError:
            raise ModelLoadError(
                f"the weights need about {config.num_parameters * dtype.itemsize} bytes in {dtype}, more than device "
                f"{device} has free; take a smaller model or dtype, or end what else uses the device"
            ) from None
        if config.stored is not None and not ops.keeps_stored:
            log.info(
                "weights stored with 8 bits are read as %s: nothing on %s multiplies them as they are", dtype, device
            )
        elif model.unkept:
            first, many = model.unkept[0], len(model.unkept)
            log.info(
                "%d maps, %s first, are read as %s: nothing multiplies them as they are stored", many, first, dtype
            )

        def made(num_blocks: int, max_model_len: int) -> TorchExecutor:
            ready = ready_blocks(num_blocks, attention_spec.block_size * token_bytes) if where.type == "cpu" else 0
            spec = ExecutorSpec(
                device=str(device),
                dtype=str(dtype).removeprefix("torch."),
                block_size=attention_spec.block_size,
                num_blocks=num_blocks,
                max_model_len=max_model_len,
                max_batch_tokens=options.max_batch_tokens,
                vocab_size=config.vocab_size,
                attention_backend=backend.name,
                weights_bytes=model.weights_bytes,
                kv_bytes=num_blocks * attention_spec.block_size * token_bytes,
                kv_dtype=str(attention_spec.kv_dtype).removeprefix("torch.") if attention_spec.kv_dtype else "",
                device_name=torch.cuda.get_device_name(where) if where.type == "cuda" else "",
                overlaps=where.type == "cuda" if options.overlap is None else options.overlap,
                ready_blocks=ready,
            )
            return cls(model, backend(attention_spec), attention_spec, spec, cache_dtype)

        progress("allocating the KV cache", 0.0)
        graphs_bytes = peak_bytes = 0
        if where.type == "cpu":
            free_bytes = total_bytes = available_bytes()
            total_bytes += model.weights_bytes
            kv_bytes = options.kv_cache_bytes or cpu_kv_bytes()
        else:
            total_bytes = torch.cuda.mem_get_info(where)[1]
            if backend.caps().graphs and not options.enforce_eager:
                graphs_bytes = graph_budget_bytes(total_bytes)
            step = largest_step(options, longest, attention_spec.block_size)
            free_bytes, peak_bytes = _free_gpu_bytes(made(2, longest), step, graphs_bytes)
            kv_bytes = options.kv_cache_bytes or free_bytes
        num_blocks, max_len = size_kv(config, options, kv_bytes, attention_spec.block_size, cache_dtype.itemsize)
        needed = num_blocks * attention_spec.block_size * token_bytes
        if needed > free_bytes:
            raise ConfigError(
                f"a KV cache of {needed} bytes was asked for, but only {free_bytes} bytes are free on {device}; "
                "lower --kv-cache-memory",
                param="kv_cache_memory",
            )
        executor = made(num_blocks, max_len)
        reserve = int(RESERVE_SHARE * total_bytes) if where.type == "cuda" else 0
        executor.ledger = MemoryLedger(total_bytes, model.weights_bytes, peak_bytes, graphs_bytes, needed, reserve)
        log.info("memory of %s: %s", device, executor.ledger.text())
        if graphs_bytes:
            executor.capture_decodes(CudaGraphDevice(where), graphs_bytes, options.max_running)
        progress("ready", 1.0)
        return executor

    @torch.inference_mode()
    def submit(self, batch: StepBatch) -> None:
        """Computes at once on a CPU; on CUDA only launches."""
        if len(self._in_flight) > self.spec.overlaps:
            raise RuntimeError(f"steps in flight: {len(self._in_flight)}; collect it first")
        if self._kv is None:
            raise RuntimeError("the executor is closed")
        timer = Timer(self._device)
        rows = np.nonzero(batch.sampled)[0]
        inputs = self._inputs(batch, rows)
        hidden = self._hidden(inputs, self._kv)
        tokens, logprobs = None, None
        if len(rows):
            slots, table = batch.slots[rows], batch.sampling
            tokens, logprobs = sample(
                self._model.logits(hidden),
                SamplingRows(
                    table.temperature[slots],
                    table.top_k[slots],
                    table.top_p[slots],
                    table.min_p[slots],
                    table.seed[slots],
                    table.logprobs[slots],
                    (batch.starts + batch.counts)[rows],
                ),
            )
            # a row without a token (-1) fails; until its owner knows, any valid id keeps the others' steps safe
            self._last_tokens[inputs.sampled_slots] = tokens.clamp_min(0)
        read_back = ReadBack(tokens, logprobs)
        timer.stop()
        self._in_flight.append((read_back, timer))

    def _hidden(self, inputs: _Inputs, kv: torch.Tensor) -> torch.Tensor:
        """What the model says of the sampled rows `[N, C]`; a step that only decodes is one of few shapes, which a
        table may remember."""
        meta = inputs.meta
        decodes = meta.max_query_len == 1
        if inputs.graph is not None and self.graphs is not None:
            return self.graphs.replay(inputs.graph, meta.seq_lens_host)[inputs.last]
        wanted = inputs.last if self._device.type == "cpu" and not decodes else None
        self._attention.plan(meta)

        def compute() -> torch.Tensor:
            return self._model.forward(inputs.token_ids, inputs.positions, kv, self._attention, meta, wanted)

        if not self._attention.caps().graphs:
            hidden = compute()
        elif not decodes:
            hidden = self._model.ops.step(compute, None)
        else:
            tensors = (inputs.token_ids, inputs.positions, kv, meta.block_table, meta.seq_lens, meta.cu_seqlens_q)
            hidden = self._model.ops.step(compute, (*tensors, meta.slot_mapping))
        if wanted is not None or (decodes and len(inputs.last) == len(hidden)):
            return hidden
        return hidden[inputs.last]

    def collect(self) -> StepResult:
        """Waits for the end of the oldest step, and for nothing else."""
        if not self._in_flight:
            raise RuntimeError("no step is in flight")
        read_back, timer = self._in_flight.popleft()
        device_s = timer.seconds()
        ids, logprobs = read_back.get()
        return StepResult(ids, device_s, logprobs)

    def close(self) -> None:
        self._kv = self.graphs = None
        self._in_flight.clear()

    def capture_decodes(self, graph_device: GraphDevice[torch.Tensor], budget_bytes: int, max_rows: int) -> None:
        """From now on decode steps run as graphs, where the backend can and the budget allows."""
        kv, attention = self._kv, self._attention
        if kv is None:
            raise RuntimeError("the executor is closed")

        def forward(token_ids: torch.Tensor, positions: torch.Tensor, meta: AttentionMeta) -> torch.Tensor:
            return self._model.forward(token_ids, positions, kv, attention, meta)

        self.graphs = DecodeGraphs(
            graph_device,
            attention,
            forward,
            device=self._device,
            block_size=self._block_size,
            max_rows=max_rows,
            max_tokens=self.spec.max_model_len,
            budget_bytes=budget_bytes,
        )

    # ---- building the step's tensors -----------------------------------------------------------------------------

    def _upload(self, arrays: dict[str, np.ndarray], graph: GraphShape | None) -> dict[str, torch.Tensor]:
        """To the device. On CUDA in one copy, without waiting for it, for a graph straight to where it looks; on a CPU
        each to the place that is always its own, so that steps of the same shape find their inputs at the same
        addresses."""
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
        tables = batch.block_tables[batch.slots, : -(-longest // size)]
        slot_mapping = tables[rows, positions // size].astype(np.int64) * size + positions % size
        starts = np.zeros(len(ends) + 1, np.int32)
        starts[1:] = ends
        graph = self.graphs.shape_of(total, longest) if most == 1 and self.graphs is not None else None
        arrays = {
            "token_ids": batch.token_ids.astype(np.int64),
            "positions": positions,
            "slot_mapping": slot_mapping,
            "token_slots": batch.slots[rows].astype(np.int64),
            "last": ends[sampled_rows] - 1,
            "sampled_slots": batch.slots[sampled_rows].astype(np.int64),
            "seq_lens": seq_lens,
            "cu_seqlens_q": starts,
            "block_table": tables,
        }
        there, sampled = self._upload(arrays, graph), len(sampled_rows)
        ids = there["token_ids"]
        if (batch.token_ids < 0).any():
            torch.where(ids < 0, self._last_tokens[there["token_slots"]], ids, out=ids)
        meta = AttentionMeta(
            block_table=there["block_table"],
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


def _torch_device(device: DeviceSpec) -> torch.device:
    if device.kind == "cpu":
        if device.threads is not None:
            torch.set_num_threads(device.threads)
        elif "OMP_NUM_THREADS" not in os.environ:  # torch counts cores, not what a container may use of them
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {device}: torch {torch.__version__} sees no CUDA device; choose cpu, or run `nexusengine doctor` "
            "to see why",
            param="devices",
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {device}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0",
            param="devices",
        )
    where = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(where)
    return where


def _dtype(wanted: str | None, checkpoint: str, device: torch.device) -> torch.dtype:
    if wanted not in (None, "auto"):
        return _DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    if torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return _DTYPES.get(checkpoint, torch.bfloat16) if checkpoint != "float32" else torch.bfloat16


def _free_gpu_bytes(executor: TorchExecutor, step: StepBatch, graphs_bytes: int) -> tuple[int, int]:
    """(what is left of our share of the device after the weights, the graphs and the measured peak of the largest step;
    that peak)."""
    device = executor._device
    before_bytes = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    executor.submit(step)
    executor.collect()
    peak_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
    executor.close()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(int(free - RESERVE_SHARE * total) - peak_bytes - graphs_bytes, 0), peak_bytes
