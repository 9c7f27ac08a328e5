"""The terms a step's duration is made of: which they are, their order and their units.

    t = w · [1, P, T, (T - h)+ for h in HINGES, P * [T > s] for s in STEPS, n, n_prefill, A, K, P * K],   w >= 0

T tokens, n sequences, P 1 if any sequence computes more than one token, A and K as in StepFeatures. The hinges carry
the bend of the roofline: 4 to 32 tokens on a CPU, 128 to 1024 on a GPU. The steps carry tiles: a matrix kernel chosen
for 512 rows costs much the same at 300. Scales are fixed physical ones, so that weights are in seconds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nexusengine.perf.features import StepFeatures

HINGES = (8, 32, 128, 256, 512, 1024)
STEPS = (64, 128, 256, 512, 1024)
TOKENS, PAIRS, KV_TOKENS = 100.0, 1e6, 1e4  # the units of T, of A, and of K

ONE, MIXED, SLOPE = 0, 1, 2
FIRST_HINGE = 3
FIRST_STEP = FIRST_HINGE + len(HINGES)
SEQUENCES = FIRST_STEP + len(STEPS)
PREFILLS, ATTENTION, KV, MIXED_KV = SEQUENCES + 1, SEQUENCES + 2, SEQUENCES + 3, SEQUENCES + 4
TERMS = MIXED_KV + 1

_HINGES, _STEPS = np.array(HINGES, np.float64), np.array(STEPS, np.float64)


def terms(f: StepFeatures) -> npt.NDArray[np.float64]:
    """The vector the weights are multiplied with, `[TERMS]`."""
    row = np.zeros(TERMS)
    tokens, mixed = f.tokens, f.prefills > 0
    kv = f.decode_kv_tokens / KV_TOKENS
    row[0] = 1.0
    row[SLOPE] = tokens / TOKENS
    np.maximum((tokens - _HINGES) / TOKENS, 0.0, out=row[FIRST_HINGE:FIRST_STEP])
    row[SEQUENCES] = f.sequences
    row[KV] = kv
    if mixed:
        row[MIXED] = 1.0
        row[FIRST_STEP:SEQUENCES] = tokens > _STEPS
        row[PREFILLS] = f.prefills
        row[ATTENTION] = f.prefill_attention / PAIRS
        row[MIXED_KV] = kv
    return row
