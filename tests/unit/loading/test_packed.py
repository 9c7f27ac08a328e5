"""AWQ and GPTQ checkpoints: what is said where they cannot be computed, and a model over a stand-in of gptqmodel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nexusengine.attention.base import AttentionSpec
from nexusengine.attention.registry import backend_class
from nexusengine.config import parse_device
from nexusengine.errors import ModelLoadError
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.factory import make_executor
from nexusengine.layers.ops import TorchOps
from nexusengine.layers.packed import PackedLinear, PackedMaps, check
from nexusengine.loading.packed import PackedWeight
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.weights import open_weights
from nexusengine.model_config import StoredWeights
from nexusengine.models.llama import LlamaForCausalLM
from nexusengine.models.loader import WeightLoader
from tests.support import checkpoints, gptqmodel_standin
from tests.support.attention_cases import make_case

CPU = torch.device("cpu")


def written(folder: Path, layout: str) -> tuple[Path, checkpoints.Tensors]:
    tensors, numbers, quantization = checkpoints.packed(layout)
    return checkpoints.write(folder, tensors, quantization), numbers


def loaded(path: Path, packed: bool, scaled_kv: bool = False) -> LlamaForCausalLM:
    files = resolve_model(str(path))
    ops = TorchOps(1e-5, PackedMaps(torch.float32, CPU) if packed else None)
    with open_weights(files) as source:
        loader = WeightLoader(files.config, source, dtype=torch.float32, device=CPU, ops=ops, scaled_kv=scaled_kv)
        return LlamaForCausalLM(loader, max_positions=64)


def modules_of(model: LlamaForCausalLM) -> list[gptqmodel_standin.QuantLinear]:
    """The library's modules for q, k and v in the first layer."""
    qkv = model.layers[0].qkv
    assert isinstance(qkv, PackedLinear)
    return [module for module in qkv.modules if isinstance(module, gptqmodel_standin.QuantLinear)]


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    spec = AttentionSpec(4, 2, 64, torch.float32, CPU, 16, 0.125)
    meta, attention = make_case(spec, [(1, 1), (19, 19)]).meta, backend_class("sdpa")(spec)
    with torch.inference_mode():
        attention.plan(meta)
        kv = torch.zeros(2, 2, 8, 16, 2, 64)
        ids, positions = torch.arange(20) * 7 % 89, torch.tensor([0, *range(19)])
        return model.logits(model.forward(ids, positions, kv, attention, meta))


@pytest.mark.parametrize("layout", checkpoints.PACKED_LAYOUTS)
def test_on_a_cpu_the_error_says_what_the_checkpoint_is_and_what_to_do(tmp_path: Path, layout: str) -> None:
    path, _ = written(tmp_path, layout)
    with pytest.raises(
        ModelLoadError,
        match=f"{path}: .*packed by {layout} with 4 bits, .*on CUDA devices only, not on cpu; take .*gguf file",
    ):
        make_executor(resolve_model(str(path)), parse_device("cpu"), ExecutorOptions())


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"gptq with 4 bits, .*gptqmodel .*pip install 'nexusengine\[packed\]'"):
        check(StoredWeights("gptq", bits=4), torch.device("cuda", 0))


@pytest.mark.parametrize("layout", checkpoints.PACKED_LAYOUTS)
def test_a_packed_model_computes_what_its_numbers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    gptqmodel_standin.install(monkeypatch)
    check(StoredWeights("awq" if layout == "awq" else "gptq", bits=4), torch.device("cuda", 0))
    path, numbers = written(tmp_path / "packed", layout)
    model, plain = loaded(path, True), loaded(checkpoints.write(tmp_path / "plain", numbers), False)
    assert torch.allclose(logits(model), logits(plain), atol=2e-3)
    modules = modules_of(model)
    assert [type(m) for m in modules] == [
        gptqmodel_standin.GptqLinear if layout == "gptq" else gptqmodel_standin.AwqLinear
    ] * 3
    assert modules[0].made_of == (layout == "gptq", False)
    assert model.weights.unkept == []
    linear = sum(numbers[f"{name}.weight"].numel() for name in checkpoints.projections())
    rest = plain.weights.total_bytes - 4 * linear
    assert linear / 2 < model.weights.total_bytes - rest < linear


@pytest.mark.parametrize("layout", checkpoints.PACKED_LAYOUTS)
def test_scales_of_k_and_v_go_into_packed_weights_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    gptqmodel_standin.install(monkeypatch)
    tensors, _, quantization = checkpoints.packed(layout)
    tensors |= {f"model.layers.{i}.self_attn.{which}_scale": torch.tensor(0.3) for i in range(2) for which in "kv"}
    path = checkpoints.write(tmp_path, tensors, quantization)
    plain, scaled = loaded(path, True), loaded(path, True, scaled_kv=True)
    assert torch.allclose(logits(plain), logits(scaled), atol=2e-3)
    pairs = zip(modules_of(scaled), modules_of(plain), strict=True)
    ratio = [a.scales[0, 0] / b.scales[0, 0] for a, b in pairs]
    assert ratio == [0.5, 2.0, 2.0]


def test_what_the_library_refuses_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptqmodel_standin.install(monkeypatch)
    path, _ = written(tmp_path, "gptq")
    with open_weights(resolve_model(str(path))) as source:
        weight = source.stored("model.layers.0.self_attn.q_proj.weight")
        assert isinstance(weight, PackedWeight)
        with pytest.raises(ModelLoadError, match=r"by gptq \(gptq\) with 4 bits in groups of 64 .*float64 on cpu"):
            PackedMaps(torch.float64, CPU).make(weight, None)
        odd = PackedWeight(StoredWeights("gptq", bits=4, group=100, layout="gptq"), weight.parts)
        with pytest.raises(ModelLoadError, match="NotImplementedError: in_features: 256 must be divisible by 100"):
            PackedMaps(torch.float16, CPU).make(odd, None)
        with pytest.raises(ModelLoadError, match="packed by gptq, and here it is needed unpacked"):
            source.get("model.layers.0.self_attn.q_proj.weight", torch.float32)


def test_a_packed_map_that_lacks_a_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptqmodel_standin.install(monkeypatch)
    tensors, _, quantization = checkpoints.packed("awq")
    del tensors["model.layers.1.mlp.down_proj.qzeros"]
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.down_proj\.qweight is there, but .*qzeros is missing"):
        loaded(checkpoints.write(tmp_path, tensors, quantization), True)
