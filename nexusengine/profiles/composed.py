"""A profile made of measured parts: dense layers by tokens, attention by its shapes, output head by sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.profiles.attention import Attention, Chunk
from nexusengine.profiles.base import F8, I4, Confidence
from nexusengine.profiles.curves import Curve
from nexusengine.profiles.noise import Noise


@dataclass(frozen=True, slots=True)
class ProfileIdentity:
    """Who a profile is: the attributes of the contract."""

    device: str
    model: str
    source: str
    confidence: Confidence
    kv_capacity_tokens: int
    weights_bytes: int

    @property
    def name(self) -> str:
        return f"{self.device}/{self.model}"


class ComposedProfile:
    """step = dense(tokens) + layers * attention(chunks, decodes) + head(sequences).

    dense: everything that depends on the number of tokens alone, all layers together. head: output projection and
    sampling, for each sequence of the step, also those whose prompt is not finished: engines compute them too.
    """

    def __init__(
        self,
        identity: ProfileIdentity,
        *,
        layers: int,
        dense: Curve,
        attention: Attention,
        head: Curve,
        noise: Noise,
    ) -> None:
        self.name, self.device, self.model = identity.name, identity.device, identity.model
        self.source, self.confidence = identity.source, identity.confidence
        self.kv_capacity_tokens, self.weights_bytes = identity.kv_capacity_tokens, identity.weights_bytes
        self.layers, self.dense, self.attention, self.head = layers, dense, attention, head
        self._noise = noise

    def step_s(self, counts: I4, contexts: I4) -> float:
        return self.dense(int(np.add.reduce(counts))) + self.attention_s(counts, contexts) + self.head(len(counts))

    def attention_s(self, counts: I4, contexts: I4) -> float:
        """Of all layers."""
        n = len(counts)
        kv_sum, longest = int(np.add.reduce(contexts)), int(np.maximum.reduce(contexts))
        if int(np.maximum.reduce(counts)) == 1:
            return self.layers * self.attention.decodes_s(n, kv_sum / n + 1, longest + 1)
        rows = np.flatnonzero(counts > 1)
        chunks: list[Chunk] = list(zip(counts[rows].tolist(), contexts[rows].tolist(), strict=True))
        decodes = n - len(chunks)
        mean = 0.0
        if decodes:
            mean = (kv_sum - sum([ctx for _, ctx in chunks])) / decodes + 1
            if longest == max([ctx for _, ctx in chunks]):
                longest = int(contexts[counts == 1].max())
        return self.layers * self.attention.mixed_s(chunks, decodes, mean, longest + 1)

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        n = len(contexts)
        grown = np.arange(1, steps + 1, dtype=np.float64)
        mean = int(np.add.reduce(contexts)) / n + grown
        attention = self.attention.decode_run_s(n, mean, int(np.maximum.reduce(contexts)) + grown)
        run: F8 = self.layers * attention + (self.dense(n) + self.head(n))
        return run

    def noise(self, u: F8, mixed: bool) -> F8:
        return self._noise(u, mixed)
