"""Rotary position embedding (Su et al., arXiv 2104.09864) and its scalings: linear, Llama 3, YaRN (arXiv 2309.00071).

Pairs are (i, i + D/2), as in Hugging Face checkpoints.
"""

from __future__ import annotations

import math

import torch

from nexusengine.errors import ModelLoadError
from nexusengine.model_config import ModelConfig, RopeScaling

_MOST_POSITIONS = 2**24
"""Of which tables of cos and sin are made: 4 GiB of them with heads of 128."""


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """(inverse frequencies `[D / 2]` float32, factor on cos and sin)."""
    dim = config.head_dim
    # a division, not a negative power: the last bit differs, and long contexts multiply it
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if config.rope_factors is not None:
        inverse = inverse / torch.tensor(config.rope_factors, dtype=torch.float32)
    if scaling is None:
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, scaling.attention_factor or 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    return _yarn(inverse, scaling, dim, config.rope_theta)


def _llama3(inverse: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones left alone, those between interpolated."""
    wave = 2 * math.pi / inverse
    smooth = (s.original_max_position / wave - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - smooth) * inverse / s.factor + smooth * inverse
    stretched = torch.where(wave > s.original_max_position / s.low_freq_factor, inverse / s.factor, between)
    return torch.where(wave < s.original_max_position / s.high_freq_factor, inverse, stretched)


def _yarn(inverse: torch.Tensor, s: RopeScaling, dim: int, theta: float) -> tuple[torch.Tensor, float]:
    def dimension_of(rotations: float) -> float:
        return dim * math.log(s.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(s.beta_fast), dimension_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    blended = inverse / s.factor * ramp + inverse * (1 - ramp)
    if s.attention_factor is not None:
        return blended, s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return blended, _mscale(s.factor, s.mscale) / _mscale(s.factor, s.mscale_all_dim)
    return blended, _mscale(s.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class RotaryEmbedding:
    """Tables of cos and sin `[max_positions, D / 2]`."""

    def __init__(self, config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        if max_positions > _MOST_POSITIONS:
            raise ModelLoadError(f"{max_positions} positions are too many; set --max-model-len to what is needed")
        inverse, factor = inverse_frequencies(config)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse)
        self.cos = (angles.cos() * factor).to(device, dtype)
        self.sin = (angles.sin() * factor).to(device, dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin `[T, 1, D / 2]` of int64 positions `[T]`; looked up once a step."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x `[T, H, D]`."""
    cos, sin = cos_sin
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
