"""The terms a step's duration is made of: which they are, their order and their units.

    t = w · [1, P, T, (T - h)+ for h in HINGES, P * [T > s] for s in STEPS, n, n_prefill, A, K, P * K],   w >= 0

T tokens, n sequences, P 1 if any sequence computes more than one token, A and K as in StepFeatures. The hinges carry
the bend of the roofline: 4 to 32 tokens on a CPU, 128 to 1024 on a GPU. The steps carry tiles: a matrix kernel that
computes 512 rows at a time costs much the same at 300 (an H100 in fp8: 25 ms at 256 tokens, 45 at 260, 39 at 512).
Scales are fixed physical ones, so that weights are seconds.
"""

from __future__ import annotations

from nexusengine.perf.features import StepFeatures

HINGES = (8, 32, 128, 256, 512, 1024)
STEPS = (64, 128, 256, 512, 768, 1024, 1280, 1536, 1792)
TOKENS, PAIRS, KV_TOKENS = 100.0, 1e6, 1e4  # the units of T, of A, and of K

ONE, MIXED, SLOPE = 0, 1, 2
FIRST_HINGE = 3
FIRST_STEP = FIRST_HINGE + len(HINGES)
SEQUENCES = FIRST_STEP + len(STEPS)
PREFILLS, ATTENTION, KV, MIXED_KV = SEQUENCES + 1, SEQUENCES + 2, SEQUENCES + 3, SEQUENCES + 4
TERMS = MIXED_KV + 1
_NO_STEPS = (0.0,) * len(STEPS)


def terms(f: StepFeatures) -> list[float]:
    """The terms of a step, `[TERMS]`, by which the weights are multiplied."""
    tokens, kv = f.tokens, f.decode_kv_tokens / KV_TOKENS
    hinges = [(tokens - h) / TOKENS if tokens > h else 0.0 for h in HINGES]
    if not f.prefills:
        return [1.0, 0.0, tokens / TOKENS, *hinges, *_NO_STEPS, f.sequences, 0.0, 0.0, kv, 0.0]
    steps = [1.0 if tokens > s else 0.0 for s in STEPS]
    pairs = f.prefill_attention / PAIRS
    return [1.0, 1.0, tokens / TOKENS, *hinges, *steps, f.sequences, f.prefills, pairs, kv, kv]
