"""A stand-in for gptqmodel: the signatures of its interface for transformers and optimum (utils/importer.py,
utils/model.py and the modules of version 7), over plain torch."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from .checkpoints import AWQ_ORDER


def _apart(packed: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Numbers of 4 bits, eight of each integer along a dimension."""
    found = (packed.unsqueeze(dim + 1) >> torch.arange(0, 32, 4).view(-1, *[1] * (packed.dim() - 1 - dim))) & 15
    places = torch.tensor([order.index(i) for i in range(8)])
    return found.index_select(dim + 1, places).flatten(dim, dim + 1)


class QuantLinear(torch.nn.Module):
    REQUIRES_FORMAT_V2 = True
    quant_method = ""
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    wf: torch.Tensor

    def __init__(
        self,
        bits: int,
        group_size: int,
        desc_act: bool,
        sym: bool,
        in_features: int,
        out_features: int,
        bias: bool = False,
        pack_dtype: torch.dtype = torch.int32,
        adapter: Any = None,
        register_buffers: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if in_features % group_size:
            raise NotImplementedError(f"in_features: {in_features} must be divisible by {group_size}")
        assert (bits, pack_dtype, bias) == (4, torch.int32, False)
        self.made_of, self.ready, self.v2 = (desc_act, sym), False, False
        groups = in_features // group_size
        shape = (in_features // 8, out_features) if self.quant_method == "gptq" else (in_features, out_features // 8)
        if register_buffers:
            self.register_buffer("qweight", torch.zeros(shape, dtype=torch.int32))
            self.register_buffer("qzeros", torch.zeros((groups, out_features // 8), dtype=torch.int32))
            self.register_buffer("scales", torch.zeros((groups, out_features), dtype=torch.float16))
            if self.quant_method == "gptq":
                self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // group_size)
        self.register_buffer("wf", torch.arange(0, 32, 4), persistent=False)
        self.groups = torch.arange(in_features) // group_size

    def post_init(self) -> None:
        self.ready = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.ready, "post_init was not called"
        assert self.wf.tolist() == list(range(0, 32, 4))
        if self.quant_method == "gptq":
            assert self.v2, "zeros are still stored less 1"
            numbers, zeros, groups = _apart(self.qweight, 0), _apart(self.qzeros, 1), self.g_idx.long()
        else:
            numbers, zeros = (_apart(t, 1, AWQ_ORDER) for t in (self.qweight, self.qzeros))
            groups = self.groups
        weight = (numbers - zeros[groups]).float() * self.scales[groups].float()
        return (x.float() @ weight).to(x.dtype)


class GptqLinear(QuantLinear):
    quant_method = "gptq"


class AwqLinear(QuantLinear):
    quant_method = "awq"


def hf_select_quant_linear_v2(
    bits: int,
    group_size: int,
    desc_act: bool,
    sym: bool,
    format: str,
    quant_method: str,
    zero_point: bool | None = None,
    dtype: Any = None,
    meta: Any = None,
    pack: bool | None = True,
    device_map: Any = None,
    backend: Any = None,
) -> type[QuantLinear]:
    if format not in {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[quant_method]:
        raise ValueError(f"Unsupported format: `{format}` for quantization method `{quant_method}`")
    assert not pack
    assert device_map.keys() == {""}
    if dtype is torch.float64:
        raise NotImplementedError("only supports float16")
    return GptqLinear if quant_method == "gptq" else AwqLinear


def hf_convert_gptq_v1_to_v2_format(
    model: torch.nn.Module, bits: int, qlinear_kernel: type[QuantLinear], checkpoint_format: str, meta: Any
) -> tuple[torch.nn.Module, bool]:
    for module in model.modules():
        if isinstance(module, qlinear_kernel):
            if checkpoint_format == "gptq":
                module.qzeros += 0x11111111
            module.v2 = True
    return model, checkpoint_format == "gptq"


def hf_gptqmodel_post_init(
    model: torch.nn.Module, use_act_order: bool, quantize_config: Any = None, max_input_length: int | None = None
) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.post_init()
    return model


def install(patch: pytest.MonkeyPatch) -> None:
    importer, model = types.ModuleType("gptqmodel.utils.importer"), types.ModuleType("gptqmodel.utils.model")
    importer.hf_select_quant_linear_v2 = hf_select_quant_linear_v2  # type: ignore[attr-defined]
    model.hf_convert_gptq_v1_to_v2_format = hf_convert_gptq_v1_to_v2_format  # type: ignore[attr-defined]
    model.hf_gptqmodel_post_init = hf_gptqmodel_post_init  # type: ignore[attr-defined]
    for name in ("gptqmodel", "gptqmodel.utils"):
        module = types.ModuleType(name)
        module.__spec__ = importlib_spec(name)
        patch.setitem(sys.modules, name, module)
    patch.setitem(sys.modules, importer.__name__, importer)
    patch.setitem(sys.modules, model.__name__, model)


def importlib_spec(name: str) -> Any:
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None)
