"""How fast a worker serves prompts and decodes, read off the performance model that it reports. PURE.

"Pairs" are query-key pairs of prefill attention.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cache

import numpy as np

from nexusengine.arrays import F8
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor
from nexusengine.perf.registry import make_model, rebuild
from nexusengine.wire import PerfSnapshot, PolicyTraits

REFERENCE_STEP = StepFeatures(
    tokens=544, sequences=33, prefills=1, prefill_attention=512 * 256.0, decode_kv_tokens=32_768
)
"""A step all workers can be compared by: a chunk of 512 tokens beside 32 decodes with 1024 tokens of context each."""

_MARGIN_S = 0.0005
_MIN_CHUNK_TOKENS = 16.0
_LEAST_SHARE = 0.1  # of a step that is reckoned to be left for prompts, where the model says that there is nothing
_CHUNK_SHARES = (1 / 2048, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
_PROBE_PAIRS, _PROBE_KV, _PROBE_ROWS = 4e6, 16_384.0, 16.0
_CHUNKS = len(_CHUNK_SHARES)
_SEQUENCES = np.ones(_CHUNKS + 4)
_PREFILLS = np.array([1.0] * (_CHUNKS + 1) + [0.0] * 3)
_PAIRS = np.array([0.0] * _CHUNKS + [_PROBE_PAIRS, 0.0, 0.0, 0.0])
_KV = np.array([0.0] * (_CHUNKS + 3) + [_PROBE_KV])


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a worker computes prompts beside its decodes, and how its decode step grows.

    Attributes:
        per_token_s: seconds for each prompt token, with the decodes of the same steps included: what waiting requests
            see.
        per_pair_s: the same for each pair.
        first_step_s: base of a lone chunk; one of q tokens takes first_step_s + q * chunk_token_s.
        chunk_token_s: seconds that each token adds to a lone chunk.
        chunk_tokens: prompt tokens that fit into a step.
        step_s: seconds of a full step.
        by_time: whether that is a limit, so that pairs leave room for fewer tokens; else they make steps longer.
        decode_s: seconds of a decode-only step over the decodes of now.
        per_row_s: what another sequence adds to a decode step.
        per_kv_s: what another KV token read adds to it.
    """

    per_token_s: float
    per_pair_s: float
    first_step_s: float
    chunk_token_s: float
    chunk_tokens: float
    step_s: float
    by_time: bool
    decode_s: float
    per_row_s: float
    per_kv_s: float

    def service_s(self, left: F8, done: F8) -> F8:
        """Seconds `[N]` that prompts with `left [N]` tokens to compute and `done [N]` computed keep the worker busy."""
        return left * (self.per_token_s + self.per_pair_s * (done + 0.5 * left))


def predict_speed(
    model: Predictor,
    quantile: float,
    decodes: int,
    kv_tokens: float,
    tightest_tpot_s: float,
    batch_tokens: int,
    traits: PolicyTraits,
) -> Speed:
    """The speed of a worker beside its present decodes.

    Args:
        model: of its step times.
        quantile: by how much its bound exceeds the mean it predicts.
        decodes: sequences that decode.
        kv_tokens: KV tokens that their next step reads.
        tightest_tpot_s: least TPOT among all requests, infinite if there is none.
        batch_tokens: most tokens that a step of the engine holds.
        traits: of the engine's policy, which may keep steps shorter.
    """
    batch_tokens = min(batch_tokens, traits.step_tokens or batch_tokens)
    paced = traits.by_tpot or traits.step_s < float("inf")
    rows = float(max(decodes, 1))
    chunks = [q * batch_tokens for q in _CHUNK_SHARES]
    probe = 0.25 * batch_tokens
    tokens = np.array([q + decodes for q in chunks] + [probe + decodes, rows, rows + _PROBE_ROWS, rows])
    sequences = _SEQUENCES + decodes
    sequences[_CHUNKS + 1 :] = tokens[_CHUNKS + 1 :]
    took_s = model.mean_s(tokens, sequences, _PREFILLS, _PAIRS, _KV + kv_tokens).tolist()
    steps_s = took_s[:_CHUNKS]
    probed_s, decode_s, more_rows_s, more_kv_s = took_s[_CHUNKS:]
    first_s = steps_s[0]
    pair_s = max(probed_s - _interpolate(probe, chunks, steps_s), 0.0) / _PROBE_PAIRS
    room = float(max(batch_tokens - decodes, 1))
    chunk = room
    if paced:
        limit_s = traits.step_s
        if traits.by_tpot:
            limit_s = min(limit_s, tightest_tpot_s)
        limit_s = limit_s / quantile - _MARGIN_S
        chunk = min(max(_interpolate(limit_s, steps_s, chunks), _MIN_CHUNK_TOKENS), room)
    by_time = chunk < room
    step_s = _interpolate(chunk, chunks, steps_s)
    work_s = max(step_s - first_s, 1e-9)
    slowdown = step_s / max(work_s, _LEAST_SHARE * step_s) if by_time else 1.0
    return Speed(
        per_token_s=step_s / chunk,
        per_pair_s=pair_s * slowdown,
        first_step_s=first_s,
        chunk_token_s=work_s / chunk,
        chunk_tokens=chunk,
        step_s=step_s,
        by_time=by_time,
        decode_s=decode_s,
        per_row_s=max(more_rows_s - decode_s, 0.0) / _PROBE_ROWS,
        per_kv_s=max(more_kv_s - decode_s, 0.0) / _PROBE_KV,
    )


def _interpolate(x: float, xs: list[float], ys: list[float]) -> float:
    """Linear interpolation; outside of `xs` the nearest of `ys`. xs must not fall."""
    if x <= xs[0]:
        return ys[0]
    i = bisect.bisect_left(xs, x)
    if i == len(xs):
        return ys[-1]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def predictor_of(perf: PerfSnapshot | None) -> Predictor:
    """The model that a worker reported; the one that has seen no step where it reported none.

    Raises:
        ValueError: the weights are not those of a model.
    """
    if perf is None:
        return _unfitted()
    return rebuild(perf)


@cache
def _unfitted() -> Predictor:
    return make_model()
