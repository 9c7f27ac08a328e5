"""A profile made of measured parts: dense layers by tokens, attention by its shapes, output head by sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I4
from nexusengine.profiles.attention import Attention
from nexusengine.profiles.base import ProfileIdentity
from nexusengine.profiles.curves import Curve
from nexusengine.profiles.moe import Experts
from nexusengine.profiles.noise import Noise


@dataclass(frozen=True, slots=True)
class Measured:
    """The most tokens and sequences of a step, and the longest context, that were measured."""

    tokens: int
    sequences: int
    context: int


class ComposedProfile:
    """step = dense(tokens) + experts(tokens) + layers * attention(chunks, decodes) + head(sequences).

    Args:
        identity: of the profile.
        layers: of the model.
        hidden: width of what devices that share the model exchange.
        dense: everything that depends on the number of tokens alone, all layers together, experts left out.
        attention: of one layer.
        head: output projection and sampling, for each sequence of the step, also those whose prompt is not finished:
            engines compute them too.
        experts: of all layers, None if the model is dense.
        noise: scatter of steps.
        measured: how far the measurements go.

    Attributes:
        by_tokens: everything that depends on the number of tokens alone, experts included.
    """

    def __init__(
        self,
        identity: ProfileIdentity,
        *,
        layers: int,
        hidden: int,
        dense: Curve,
        attention: Attention,
        head: Curve,
        experts: Experts | None,
        noise: Noise,
        measured: Measured,
    ) -> None:
        self.identity = identity
        self.layers, self.hidden, self.experts = layers, hidden, experts
        self.dense, self.attention, self.head = dense, attention, head
        self.by_tokens = dense if experts is None else dense.plus(experts.seconds())
        self._noise, self.measured = noise, measured

    def beyond_measured(self, counts: I4, contexts: I4) -> bool:
        """Whether a step of `counts` and `contexts` (`[R]` each) has more of anything than was measured."""
        most = self.measured
        tokens, context = int(_sum(counts)), int(_max(contexts))
        return tokens > most.tokens or len(counts) > most.sequences or context > most.context

    def step_s(self, counts: I4, contexts: I4) -> float:
        rows, tokens = len(counts), int(_sum(counts))
        return self.by_tokens(tokens) + self.attention_s(counts, contexts, tokens) + self.head(rows)

    def attention_s(self, counts: I4, contexts: I4, tokens: int) -> float:
        """Seconds of attention in all layers.

        Args:
            counts: `[R]`, tokens computed.
            contexts: `[R]`, tokens in the KV cache.
            tokens: the sum of `counts`.
        """
        rows = len(counts)
        if tokens == rows:
            return self.layers * self.attention.decodes_s(rows, int(_sum(contexts)) / rows + 1, int(_max(contexts)) + 1)
        at = (counts > 1).nonzero()[0]
        chunks = list(zip(counts[at].tolist(), contexts[at].tolist(), strict=True))
        decodes = rows - len(chunks)
        if not decodes:
            return self.layers * self.attention.mixed_s(chunks, 0, 0.0, 0.0)
        longest, in_chunks = int(_max(contexts)), sum([ctx for _, ctx in chunks])
        if in_chunks >= longest and longest == max([ctx for _, ctx in chunks]):
            longest = int(_max(contexts[counts == 1]))
        mean = (int(_sum(contexts)) - in_chunks) / decodes + 1
        return self.layers * self.attention.mixed_s(chunks, decodes, mean, longest + 1)

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        rows = len(contexts)
        grown = np.arange(1, steps + 1, dtype=np.float64)
        attention = self.attention.decode_run_s(rows, int(_sum(contexts)) / rows + grown, int(_max(contexts)) + grown)
        run: F8 = self.layers * attention + (self.by_tokens(rows) + self.head(rows))
        return run

    def noise(self, u: F8, mixed: bool) -> F8:
        return self._noise(u, mixed)


_sum, _max = np.add.reduce, np.maximum.reduce  # what the array's methods call, without their wrappers
