"""Linear maps of AWQ and GPTQ checkpoints on CUDA, by the kernels of the package gptqmodel.

It chooses among them (Marlin and others) by device and checkpoint. What is called is its interface for transformers and
optimum: `hf_select_quant_linear_v2`, the class that it returns, `hf_convert_gptq_v1_to_v2_format` and
`hf_gptqmodel_post_init`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.layers.basic import Linear
from nexusengine.loading.packed import PackedWeight
from nexusengine.model_config import StoredWeights

INSTALL = "pip install 'nexusengine[packed]'"


def check(stored: StoredWeights, device: torch.device) -> None:
    """Check that packed weights can be computed with on a device.

    Raises:
        ModelLoadError: they cannot; says what the checkpoint is, what is missing, and what to do.
    """
    what = f"the checkpoint's weights are packed by {stored.method} with {stored.bits} bits"
    if device.type != "cuda":
        raise ModelLoadError(
            f"{what}, which is computed on CUDA devices only, not on {device}; take an unquantised or FP8 checkpoint, "
            "or a .gguf file"
        )
    if importlib.util.find_spec("gptqmodel") is None:
        raise ModelLoadError(
            f"{what}, for which the package gptqmodel is needed and not installed; {INSTALL}, or take an unquantised "
            "or FP8 checkpoint"
        )


@dataclass(slots=True)
class PackedLinear(Linear):
    """Linear maps packed by a library, side by side; `weight` is not used.

    Attributes:
        modules: the library's, one for each map of the checkpoint.
    """

    modules: tuple[torch.nn.Module, ...] = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = [module(x) for module in self.modules]
        out: torch.Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def tensors(self) -> Iterator[torch.Tensor]:
        for module in self.modules:
            yield from module.buffers()
            yield from module.parameters()
        if self.bias is not None:
            yield self.bias


@dataclass(slots=True)
class PackedMaps:
    """Makes the maps of one model; `finish` once all are made: then the library puts them in order for its kernels."""

    dtype: torch.dtype
    device: torch.device
    _made: list[torch.nn.Module] = field(default_factory=list)
    _stored: StoredWeights | None = None
    _kernel: Any = None

    def make(self, weight: PackedWeight, bias: torch.Tensor | None) -> PackedLinear:
        """One map of the checkpoint's, side by side.

        Raises:
            ModelLoadError: the library has no kernel for it, in its words.
        """
        s = self._stored = weight.stored
        kernel = self._selected(s)
        modules = []
        for part in weight.parts:
            try:
                with self.device:
                    module = kernel(
                        bits=s.bits,
                        group_size=s.group,
                        desc_act=s.reordered,
                        sym=s.symmetric,
                        in_features=part.inputs,
                        out_features=part.outputs,
                        bias=False,
                        register_buffers=True,
                    )
            except Exception as error:  # its checks raise many kinds
                raise self._refused(s, error) from None
            tensors = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in part.tensors.items()}
            module.load_state_dict(tensors, strict=False, assign=True)
            modules.append(module.to(self.device).eval().requires_grad_(False))
        self._made += modules
        return PackedLinear(torch.empty(0), bias, tuple(modules))

    def finish(self) -> None:
        if not self._made or self._stored is None:
            return
        from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

        everything, s = torch.nn.ModuleList(self._made), self._stored
        if s.method == "gptq":
            hf_convert_gptq_v1_to_v2_format(everything, s.bits, self._kernel, s.layout, None)
        hf_gptqmodel_post_init(everything, use_act_order=s.reordered)
        self._made.clear()

    def _selected(self, s: StoredWeights) -> Any:
        if self._kernel is None:
            try:
                from gptqmodel.utils.importer import hf_select_quant_linear_v2

                self._kernel = hf_select_quant_linear_v2(
                    bits=s.bits,
                    group_size=s.group,
                    desc_act=s.reordered,
                    sym=s.symmetric,
                    format=s.layout,
                    quant_method=s.method,
                    zero_point=not s.symmetric if s.method == "awq" else None,
                    dtype=self.dtype,
                    pack=False,
                    device_map={"": str(self.device)},
                )
            except Exception as error:
                raise self._refused(s, error) from None
        return self._kernel

    def _refused(self, s: StoredWeights, error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"gptqmodel cannot compute with weights packed by {s.method} ({s.layout}) with {s.bits} bits in groups of "
            f"{s.group} in {self.dtype} on {self.device}: {type(error).__name__}: {error}"
        )
