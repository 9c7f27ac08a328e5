"""The contract of a model family: weights on one device in one type, and what computes with them."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from nexusengine.attention.base import AttentionBackend, AttentionMeta
from nexusengine.layers.ops import Ops
from nexusengine.model_config import ModelConfig
from nexusengine.models.loader import LoadedWeights, WeightLoader


class Model(Protocol):
    """A decoder-only language model. Not an nn.Module: nothing here is trained.

    Attributes:
        config: its shape.
        ops: what it computes with.
        weights: what was loaded, as `WeightLoader.finish` returned it.
    """

    config: ModelConfig
    ops: Ops[Any]
    weights: LoadedWeights

    def __init__(self, loader: WeightLoader, max_positions: int) -> None:
        """Load all weights of `loader.config`.

        Args:
            loader: of the checkpoint.
            max_positions: the longest sequence that will be computed, in tokens.

        Raises:
            ModelLoadError: a tensor is missing, surplus or of another shape.
        """
        ...

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: torch.Tensor,
        attention: AttentionBackend,
        meta: AttentionMeta,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all layers over a step's tokens, and write their K and V into the cache.

        Args:
            token_ids: i8 `[T]`.
            positions: i8 `[T]`, each token's place in its sequence.
            kv: the cache, `[2, L, num_blocks, block_size, H_kv, D]`.
            attention: the backend, planned for `meta` already.
            meta: of the step.
            wanted: i8 `[N]`, the only rows that are needed; None: all of them.

        Returns:
            Normed hidden states `[T, C]`, or `[N, C]` of the rows wanted.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 `[N, V]` of hidden states `[N, C]`, which hold until the next call (see Ops)."""
        ...
