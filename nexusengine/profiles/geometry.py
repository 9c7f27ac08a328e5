"""Shapes of the models that profiles were measured with or are scaled to, and the memory of the devices."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.model_config import ModelConfig

_GIB = 2**30
_MEMORY_SHARE = 0.9
_RESERVE_BYTES = int(1.2 * _GIB)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A decoder of the Llama family; sizes in elements.

    Attributes:
        experts: 0: dense.
        experts_per_token: of `experts`, each with `intermediate`.
        bytes_per_weight: as it is served.
        bytes_per_kv: as it is served.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    tied: bool = False
    bytes_per_weight: int = 2
    bytes_per_kv: int = 2

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one layer's MLP, all experts."""
        return 3 * self.hidden * self.intermediate * max(self.experts, 1) + self.hidden * self.experts

    @property
    def parameters(self) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.attention_parameters + self.mlp_parameters) + embeddings

    @property
    def weights_bytes(self) -> int:
        return self.parameters * self.bytes_per_weight

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_kv


DEFAULT_MODEL = "llama-3.1-8b"

MODELS: dict[str, Geometry] = {
    "llama-3.1-8b": Geometry(4096, 14336, 32, 32, 8, 128, 128256),
    "llama-3-8b": Geometry(4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3-32b": Geometry(5120, 25600, 64, 64, 8, 128, 151936),
    "qwen3-30b-a3b": Geometry(2048, 768, 48, 32, 4, 128, 151936, experts=128, experts_per_token=8),
    "qwq-32b-fp8": Geometry(5120, 27648, 64, 40, 8, 128, 152064, bytes_per_weight=1, bytes_per_kv=1),
    "qwen3-8b": Geometry(4096, 12288, 36, 32, 8, 128, 151936),
    "qwen2.5-7b": Geometry(3584, 18944, 28, 28, 4, 128, 152064),
    "mistral-7b": Geometry(4096, 14336, 32, 32, 8, 128, 32768),
    "llama-2-7b": Geometry(4096, 11008, 32, 32, 32, 128, 32000),
    "llama-3.2-3b": Geometry(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "qwen3-4b": Geometry(2560, 9728, 36, 32, 8, 128, 151936, tied=True),
    "qwen3-14b": Geometry(5120, 17408, 40, 40, 8, 128, 151936),
    "qwen2.5-14b": Geometry(5120, 13824, 48, 40, 8, 128, 152064),
    "qwen2.5-32b": Geometry(5120, 27648, 64, 40, 8, 128, 152064),
    "smollm2-135m": Geometry(576, 1536, 30, 9, 3, 64, 49152, tied=True),
}

MEMORY_BYTES: dict[str, int] = {
    # What CUDA reports as the device's total, which is less than what the datasheet says.
    "t4": int(14.6 * _GIB),
    "a10": int(22.1 * _GIB),
    "l4": int(22.0 * _GIB),
    "a6000": int(47.4 * _GIB),
    "l40s": int(44.4 * _GIB),
    "rtx4090": int(23.5 * _GIB),
    "rtxpro6000": int(94.9 * _GIB),
    "a100": int(79.2 * _GIB),
    "h100": int(79.2 * _GIB),
    "h200": int(139.8 * _GIB),
    "b200": int(178.4 * _GIB),
}


def shards_of(device: str) -> int:
    """Devices behind a name: 2 of "rtxpro6000-tp2"."""
    _, _, count = device.partition("-tp")
    return int(count) if count.isdigit() else 1


def kv_capacity_tokens(device: str, geometry: Geometry) -> int:
    """KV tokens beside the weights, a multiple of 16; 0 if the weights alone do not fit.

    0.9 of the device's memory less weights and 1.2 GiB for activations, CUDA context and graphs. Devices that share a
    model by tensor parallelism each hold a part of weights and KV.
    """
    shards = shards_of(device)
    memory = MEMORY_BYTES[device.partition("-tp")[0]]
    room = memory * _MEMORY_SHARE - geometry.weights_bytes / shards - _RESERVE_BYTES
    tokens = int(room / (geometry.kv_bytes_per_token / shards))
    return max(tokens // 16 * 16, 0)


def emulated_geometry(spec: str) -> ModelConfig | None:
    """The shape of the model in a profile's name; None where it is not known, or has experts."""
    g = MODELS.get(spec.partition("/")[2] or DEFAULT_MODEL)
    if g is None or g.experts or spec.endswith(".json"):
        return None
    return ModelConfig(
        architecture="llama",
        vocab_size=g.vocab,
        hidden_size=g.hidden,
        intermediate_size=g.intermediate,
        num_layers=g.layers,
        num_heads=g.heads,
        num_kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        max_position=131_072,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_embeddings=g.tied,
    )
