"""Which tensors the Llama family takes from a checkpoint, and what it says of those that do not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nexusengine.errors import ModelLoadError
from nexusengine.layers.basic import Linear
from nexusengine.layers.ops import Map
from nexusengine.model_config import ModelConfig
from nexusengine.models.llama import LlamaForCausalLM
from nexusengine.models.loader import WeightLoader

CONFIG = ModelConfig("LlamaForCausalLM", 23, 16, 24, 2, 4, 2, 4, 32, 1e-6, 10_000.0, tie_embeddings=True)


class Tensors:
    """A WeightSource in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.tensors[name].to(dtype)

    def stored(self, name: str) -> None:
        return None

    def phase(self) -> str:
        return "tensors"


def checkpoint() -> dict[str, torch.Tensor]:
    """What a file of CONFIG's model holds, in Hugging Face's names."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (23, 16), "model.norm.weight": (16,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (16,),
            f"{layer}.post_attention_layernorm.weight": (16,),
            f"{layer}.self_attn.q_proj.weight": (16, 16),
            f"{layer}.self_attn.k_proj.weight": (8, 16),
            f"{layer}.self_attn.v_proj.weight": (8, 16),
            f"{layer}.self_attn.o_proj.weight": (16, 16),
            f"{layer}.mlp.gate_proj.weight": (24, 16),
            f"{layer}.mlp.up_proj.weight": (24, 16),
            f"{layer}.mlp.down_proj.weight": (16, 24),
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def load(tensors: dict[str, torch.Tensor] | None, config: ModelConfig = CONFIG, seed: int = 0) -> LlamaForCausalLM:
    source = None if tensors is None else Tensors(tensors)
    loader = WeightLoader(config, source, dtype=torch.float32, device=torch.device("cpu"), seed=seed)
    return LlamaForCausalLM(loader, max_positions=32)


def weight(map: Map) -> torch.Tensor:
    assert isinstance(map, Linear)
    return map.weight


def test_every_tensor_ends_up_where_it_belongs() -> None:
    tensors = checkpoint()
    model = load(tensors)
    layer, name = model.layers[1], "model.layers.1.self_attn"
    assert torch.equal(weight(layer.qkv), torch.cat([tensors[f"{name}.{p}_proj.weight"] for p in "qkv"]))
    assert torch.equal(weight(layer.gate_up)[24:], tensors["model.layers.1.mlp.up_proj.weight"])
    assert model.weights.total_bytes == 4 * sum(t.numel() for t in tensors.values())


def test_tied_embeddings_are_one_where_the_file_repeats_them() -> None:
    tensors = checkpoint()
    model = load(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert model.head is model.embedding


def test_a_head_of_its_own_is_kept_whatever_the_configuration_ties() -> None:
    """As transformers 5: the configuration is wrong, not the file."""
    model = load(checkpoint() | {"lm_head.weight": torch.zeros(23, 16)})
    assert torch.equal(weight(model.head), torch.zeros(23, 16))
    assert not torch.equal(weight(model.embedding), weight(model.head))


def test_of_tied_embeddings_either_may_be_the_one_in_the_file() -> None:
    tensors = checkpoint()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    model = load(tensors)
    assert model.head is model.embedding
    assert torch.equal(weight(model.head), tensors["lm_head.weight"])


def test_tables_that_old_checkpoints_carry_are_ignored() -> None:
    load(checkpoint() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})


@pytest.mark.parametrize("name", sorted(checkpoint()))
def test_any_tensor_that_is_missing_is_named(name: str) -> None:
    tensors = checkpoint()
    del tensors[name]
    with pytest.raises(ModelLoadError, match=f"{name} .*missing"):
        load(tensors)


@pytest.mark.parametrize("name", sorted(checkpoint()))
def test_any_tensor_of_another_shape_is_named_with_both_shapes(name: str) -> None:
    tensors = checkpoint()
    good = list(tensors[name].shape)
    bad = [*good[:-1], good[-1] + 1]
    tensors[name] = torch.zeros(bad)
    with pytest.raises(ModelLoadError) as caught:
        load(tensors)
    for word in (name, str(good), str(bad)):
        assert word in caught.value.message


def test_tensors_that_are_surplus_are_named_and_counted() -> None:
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(16),
        "model.layers.2.mlp.up_proj.weight": torch.ones(1),
    }
    with pytest.raises(ModelLoadError, match=r"layers\.0\.self_attn\.q_proj\.bias and 1 more"):
        load(checkpoint() | extra)


def test_a_head_of_its_own_must_be_there_when_embeddings_are_not_tied() -> None:
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        load(checkpoint(), untied)
    assert weight(load(checkpoint() | {"lm_head.weight": torch.ones(23, 16)}, untied).head).sum() == 23 * 16


def test_random_weights_are_the_same_for_a_seed() -> None:
    one, same, other = (load(None, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(weight(one.layers[1].down), weight(same.layers[1].down))
    assert not torch.equal(weight(one.embedding), weight(other.embedding))
