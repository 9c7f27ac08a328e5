"""The geometry of a decoder-only transformer, read from config.json or GGUF metadata. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_LEAST_FACTOR = 1e-6
_MOST_POSITIONS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary embedding scaling, in the terms of Hugging Face's `rope_scaling` (rope_type names the formula).

    attention_factor: by which cos and sin are multiplied; None: what the formula says.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def fault(self, theta: float) -> str:
        """What is wrong with base `theta` and these factors, such that angles would be no numbers; "" if nothing."""
        if not _LEAST_FACTOR <= self.factor <= 1 / _LEAST_FACTOR:
            return f"a scaling factor of {self.factor:g} is out of range"
        if self.kind == "yarn" and theta == 1.0:
            return "yarn needs a base other than 1"
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            return f"low_freq_factor and high_freq_factor are both {self.low_freq_factor:g}; they must differ"
        return ""

    def reach(self, positions: int) -> int:
        """How many positions a model of `positions` is good for once they are scaled.

        Those of its training times the factor, where the file does not name more itself.
        """
        if self.kind == "llama3":
            return positions
        trained = self.original_max_position if self.kind == "yarn" else positions
        return max(positions, int(min(trained * self.factor, _MOST_POSITIONS)))


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How a checkpoint holds the weights of its linear maps, where not as plain numbers.

    block: rows and columns that share a scale (fp8; None where a row or the whole map does). bits, group (inputs that
    share a scale; -1 for all), symmetric, reordered (inputs in an order of their own, `desc_act`) and layout (which of
    the ways to pack, by the file's own name): of awq and gptq.
    """

    method: Literal["fp8", "awq", "gptq"]
    block: tuple[int, int] | None = None
    bits: int = 8
    group: int = -1
    symmetric: bool = True
    reordered: bool = False
    layout: str = ""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the model file says of itself. Sizes in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens that a position sees, in layers that do not see all
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    rope_factors: tuple[float, ...] | None = None  # per-frequency divisors, where the file has them ready-made
    stored: StoredWeights | None = None  # None: as numbers of `dtype`

    @property
    def longest(self) -> int:
        """Tokens up to which the model computes what it should.

        Within a sliding window, since beyond it positions would see more than they were trained to see.
        """
        return min(self.max_position, self.sliding_window or self.max_position)

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes of K and V over all layers for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, tied embeddings counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + mlp) + embeddings
