"""Steps on a real device, through torch: CPU and CUDA by the same code."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta, AttentionSpec
from nexusengine.attention.registry import choose
from nexusengine.config import DeviceSpec
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorOptions, ExecutorSpec, Progress
from nexusengine.execute.batch import SampledLogprobs, StepBatch, StepResult
from nexusengine.execute.memory import cpu_kv_bytes, size_kv
from nexusengine.loading.resolve import ModelFiles
from nexusengine.loading.weights import open_weights
from nexusengine.models.llama import LlamaForCausalLM
from nexusengine.models.registry import model_class
from nexusengine.sampling.sampler import SamplingRows, sample

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GPU_SHARE = 0.9


class TorchExecutor:
    """A model, its KV cache and its attention backend on one device. Made by `create`."""

    def __init__(
        self, model: LlamaForCausalLM, attention: AttentionBackend, attention_spec: AttentionSpec, spec: ExecutorSpec
    ) -> None:
        self.spec = spec
        self._model, self._attention, self._device = model, attention, attention_spec.device
        self._block_size = attention_spec.block_size
        c = model.config
        shape = (2, c.num_layers, spec.num_blocks, spec.block_size, c.num_kv_heads, c.head_dim)
        self._kv: torch.Tensor | None = torch.empty(shape, dtype=model.dtype, device=self._device)
        self._last_tokens = torch.zeros(1, dtype=torch.long, device=self._device)
        self._in_flight: tuple[torch.Tensor | None, SampledLogprobs | None, Callable[[], float]] | None = None

    @classmethod
    def create(
        cls, files: ModelFiles, device: DeviceSpec, options: ExecutorOptions, progress: Progress
    ) -> TorchExecutor:
        """Load the model. Raises ModelLoadError, or ConfigError naming the setting that cannot be met."""
        where = _torch_device(device)
        dtype = _dtype(options.dtype, files.config.dtype, where)
        config = files.config
        spec = AttentionSpec(
            config.num_heads, config.num_kv_heads, config.head_dim, dtype, where, 1, config.head_dim**-0.5
        )
        backend, spec, _ = choose(spec, options.attention_backend, options.block_size)
        positions = options.max_model_len or config.max_position
        with torch.inference_mode(), open_weights(files) as source:
            model = model_class(config.architecture)(
                config,
                dtype=dtype,
                device=where,
                max_positions=min(positions, config.max_position),
                source=source,
                progress=lambda fraction: progress("loading weights", fraction),
            )
        progress("allocating the KV cache", 0.0)
        kv_bytes = options.kv_cache_bytes or (_free_gpu_bytes(where) if where.type == "cuda" else cpu_kv_bytes())
        num_blocks, max_len = size_kv(config, options, kv_bytes, spec.block_size, dtype.itemsize)
        made = cls(
            model,
            backend(spec),
            spec,
            ExecutorSpec(
                device=str(device),
                dtype=str(dtype).removeprefix("torch."),
                block_size=spec.block_size,
                num_blocks=num_blocks,
                max_model_len=max_len,
                max_batch_tokens=options.max_batch_tokens,
                vocab_size=config.vocab_size,
                attention_backend=backend.name,
                weights_bytes=model.weights_bytes,
                kv_bytes=num_blocks * spec.block_size * config.kv_bytes_per_token(dtype.itemsize),
            ),
        )
        progress("ready", 1.0)
        return made

    @torch.inference_mode()
    def submit(self, batch: StepBatch) -> None:
        """Computes at once on a CPU; on CUDA only launches."""
        if self._in_flight is not None:
            raise RuntimeError("a step is in flight; collect it first")
        if self._kv is None:
            raise RuntimeError("the executor is closed")
        elapsed_s = self._start_timer()
        meta = self._meta(batch)
        hidden = self._model.forward(
            self._token_ids(batch), self._upload(_positions(batch)), self._kv, self._attention, meta
        )
        tokens, logprobs = None, None
        rows = np.nonzero(batch.sampled)[0]
        if len(rows):
            last = self._upload(np.cumsum(batch.counts)[rows] - 1)
            slots = batch.slots[rows]
            table = batch.sampling
            tokens, logprobs = sample(
                self._model.logits(hidden[last]),
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
            self._remember(slots, tokens, len(batch.block_tables))
        self._in_flight = (tokens, logprobs, elapsed_s())

    def collect(self) -> StepResult:
        if self._in_flight is None:
            raise RuntimeError("no step is in flight")
        tokens, logprobs, device_s = self._in_flight
        self._in_flight = None
        ids = np.empty(0, np.int32) if tokens is None else tokens.int().cpu().numpy()
        return StepResult(ids, device_s(), logprobs)

    def close(self) -> None:
        self._kv = None
        self._in_flight = None

    # ---- building the step's tensors -----------------------------------------------------------------------------

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _token_ids(self, batch: StepBatch) -> torch.Tensor:
        """Input ids i8 `[T]`, with the ids that so far exist only on the device filled in."""
        ids = self._upload(batch.token_ids.astype(np.int64))
        unknown = np.nonzero(batch.token_ids < 0)[0]
        if len(unknown):
            slots = np.repeat(batch.slots, batch.counts)[unknown]
            ids[self._upload(unknown)] = self._last_tokens[self._upload(slots.astype(np.int64))]
        return ids

    def _remember(self, slots: np.ndarray, tokens: torch.Tensor, total_slots: int) -> None:
        if len(self._last_tokens) < total_slots:
            self._last_tokens = torch.zeros(total_slots, dtype=torch.long, device=self._device)
        self._last_tokens[self._upload(slots.astype(np.int64))] = tokens

    def _meta(self, batch: StepBatch) -> AttentionMeta:
        size = self._block_size
        seq_lens = batch.starts + batch.counts
        most_blocks = -(-int(seq_lens.max()) // size)
        tables = batch.block_tables[batch.slots, :most_blocks]
        positions = _positions(batch)
        rows = np.repeat(np.arange(len(batch.slots)), batch.counts)
        slot_mapping = tables[rows, positions // size].astype(np.int64) * size + positions % size
        cu_seqlens = np.zeros(len(batch.slots) + 1, np.int32)
        np.cumsum(batch.counts, out=cu_seqlens[1:])
        meta = AttentionMeta(
            block_table=self._upload(tables),
            seq_lens=self._upload(seq_lens),
            cu_seqlens_q=self._upload(cu_seqlens),
            slot_mapping=self._upload(slot_mapping),
            seq_lens_host=seq_lens.tolist(),
            query_lens_host=batch.counts.tolist(),
            num_decodes=int((batch.counts == 1).sum()),
            max_seq_len=int(seq_lens.max()),
            max_query_len=int(batch.counts.max()),
        )
        self._attention.plan(meta)
        return meta

    def _start_timer(self) -> Callable[[], Callable[[], float]]:
        """A call that ends the measurement and returns a call that gives its seconds (waiting on CUDA if it must)."""
        if self._device.type != "cuda":
            began_s = time.perf_counter()

            def end_cpu() -> Callable[[], float]:
                took_s = time.perf_counter() - began_s
                return lambda: took_s

            return end_cpu
        began, ended = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
        began.record()

        def end_cuda() -> Callable[[], float]:
            ended.record()

            def seconds() -> float:
                ended.synchronize()
                return float(began.elapsed_time(ended)) / 1000

            return seconds

        return end_cuda


def _positions(batch: StepBatch) -> np.ndarray:
    """Position of each token in its sequence, i8 `[T]`."""
    ends = np.cumsum(batch.counts)
    return np.arange(ends[-1]) - np.repeat(ends - batch.counts - batch.starts, batch.counts)


def _torch_device(device: DeviceSpec) -> torch.device:
    if device.kind == "cpu":
        if device.threads is not None:
            torch.set_num_threads(device.threads)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device}: torch {torch.__version__} sees no CUDA device here", param="devices")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices", param="devices")
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


def _free_gpu_bytes(device: torch.device) -> int:
    """What is left of the share of the device that we use, less room for a step's activations."""
    free, total = torch.cuda.mem_get_info(device)
    return max(int(free - (1 - _GPU_SHARE) * total), 0)
