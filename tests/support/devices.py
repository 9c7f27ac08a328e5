"""A made-up device whose step times are known exactly, and random steps for it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from nexusengine.perf.features import StepFeatures


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step: an overhead, the larger of moving weights and computing, KV and attention."""

    overhead_s: float = 0.002
    weights_s: float = 0.012
    token_s: float = 0.0001
    sequence_s: float = 0.00005
    pair_s: float = 3e-9
    kv_s: float = 1e-7
    mixed_s: float = 0.002

    def step_s(self, f: StepFeatures) -> float:
        roof_s = max(self.weights_s, f.tokens * self.token_s)
        rest_s = f.sequences * self.sequence_s + f.prefill_attention * self.pair_s + f.decode_kv_tokens * self.kv_s
        return self.overhead_s + roof_s + rest_s + (self.mixed_s if f.prefills else 0.0)


def random_rows(rng: random.Random, budget: int, decodes: int) -> tuple[list[int], list[int]]:
    """Tokens computed and tokens in the cache of a step with so many decodes and, half of the time, a chunk."""
    counts, contexts = [1] * decodes, [rng.randrange(10, 2000) for _ in range(decodes)]
    if rng.random() < 0.5:
        full = rng.random() < 0.6
        counts.append(max(budget - decodes if full else rng.randrange(2, budget - decodes), 2))
        contexts.append(rng.randrange(0, 3000))
    return counts, contexts


def features(counts: list[int], contexts: list[int]) -> StepFeatures:
    return StepFeatures.of(np.array(counts, np.int32), np.array(contexts, np.int32))


def random_step(rng: random.Random, budget: int = 512, most_decodes: int = 32) -> StepFeatures:
    return features(*random_rows(rng, budget, rng.randrange(1, most_decodes)))
