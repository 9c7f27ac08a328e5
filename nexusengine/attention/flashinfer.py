"""flashinfer: decodes and longer queries by a wrapper each, planned once a step on the host's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nexusengine.attention import external
from nexusengine.attention.base import AttentionCaps, AttentionMeta, AttentionSpec

_INSTALL = "pip install flashinfer-python"
_PREFILL, _DECODE = "BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"
_WORKSPACE_BYTES = 128 * 1024 * 1024
"""What its documentation recommends."""
_GROUP_FOR_TENSOR_CORES = 4
"""Query heads for each KV head from which a decode is worth the tensor cores."""


class FlashInferBackend(external.External):
    name = "flashinfer"

    @classmethod
    def caps(cls) -> AttentionCaps:
        """No graphs: its plan lies in memory that changes from step to step."""
        return AttentionCaps((16, 1, 8, 32, 64), external.HALF, modifiers=True, fp8_cache=True)

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        needed = ("float_workspace_buffer", "kv_layout")
        for wrapper, more in ((_PREFILL, ()), (_DECODE, ("use_tensor_cores",))):
            found, reason = external.find("flashinfer", wrapper, (*needed, *more), _INSTALL)
            if found is None:
                return False, reason
        return True, "flashinfer's wrappers for paged KV"

    @classmethod
    def supports(cls, spec: AttentionSpec) -> tuple[bool, str]:
        if spec.head_dim not in (64, 128, 256):
            return False, f"has no kernels for head dimension {spec.head_dim}"
        return external.fits(spec, (8, 9, 10, 12))

    def __init__(self, spec: AttentionSpec) -> None:
        import flashinfer

        self._spec = spec
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=spec.device)
        group = spec.num_heads // spec.num_kv_heads
        self._planned = torch.Event("cuda") if spec.device.type == "cuda" else None
        self._prefill = getattr(flashinfer, _PREFILL)(workspace, "NHD")
        self._decode = getattr(flashinfer, _DECODE)(workspace, "NHD", use_tensor_cores=group >= _GROUP_FOR_TENSOR_CORES)

    def plan(self, meta: AttentionMeta) -> None:
        """Waits until the device has what the plan before brought it, which is the case once its step has begun.

        A wrapper writes its plan into pinned memory of its own and starts a copy. Where steps overlap, the next plan
        may come while that copy is still behind the step that runs.
        """
        if self._planned is not None:
            self._planned.synchronize()
        spec, ones, rows = self._spec, meta.num_decodes, len(meta.seq_lens_host)
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size)
        options: dict[str, Any] = {
            "sm_scale": spec.scale,
            "window_left": external.window_of(spec)[0],
            "logits_soft_cap": spec.soft_cap or 0.0,
            "q_data_type": spec.dtype,
            "kv_data_type": spec.kv_dtype or spec.dtype,
        }
        if ones:
            self._decode.plan(*self._pages(meta, 0, ones), *shape, **options)
        if ones < rows:
            starts = torch.from_numpy(_sums(np.array(meta.query_lens_host[ones:])))
            self._prefill.plan(starts, *self._pages(meta, ones, rows), *shape, causal=True, **options)
        if self._planned is not None:
            self._planned.record()

    def _pages(self, meta: AttentionMeta, first: int, past: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The KV blocks of the rows first .. past - 1.

        The blocks come from the device's table, the rest lies on the host.

        Returns:
            Where each row's blocks begin i4 `[rows + 1]`, the blocks i4, tokens in each row's last one i4 `[rows]`.
        """
        size, lengths = self._spec.block_size, np.array(meta.seq_lens_host[first:past])
        used = -(-lengths // size)
        starts = _sums(used)
        rows = np.repeat(np.arange(first, past), used)
        columns = np.arange(starts[-1]) - np.repeat(starts[:-1], used)
        index = torch.from_numpy(rows * meta.block_table.shape[1] + columns).to(meta.block_table.device)
        blocks = meta.block_table.reshape(-1).index_select(0, index)
        last = (lengths - (used - 1) * size).astype(np.int32)
        return torch.from_numpy(starts), blocks, torch.from_numpy(last)

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        meta: AttentionMeta,
        out: torch.Tensor,
    ) -> None:
        ones = meta.num_decodes
        if ones:
            self._decode.run(q[:ones], (k_cache, v_cache), out=out[:ones])
        if ones < len(meta.seq_lens_host):
            self._prefill.run(q[ones:], (k_cache, v_cache), out=out[ones:])


def _sums(counts: np.ndarray) -> np.ndarray:
    """i4: 0 and the running sums."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
