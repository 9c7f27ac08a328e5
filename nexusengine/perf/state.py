"""What the online model has learned, in a form that outlives its process: checked when it is made, and when read back.

The normal equations of each kind of step, as of `online`, and what tells the scale of the prior.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from nexusengine.arrays import F8
from nexusengine.perf import basis
from nexusengine.perf.kinds import STRATA

FORMAT = 1
BASIS = f"{FORMAT}:{basis.HINGES}:{basis.STEPS}:{basis.TOKENS}:{basis.PAIRS}:{basis.KV_TOKENS}:{basis.TERMS}:{STRATA}"
"""Names the terms that weights belong to: a state of other terms is of no use."""
_MOST_TOKENS, _LARGEST_LOG = 1e7, 20.0
_LARGEST, _SMALLEST, _SYMMETRIC, _ROUNDED = 1e30, 1e-300, 1e-9, 1.0 + 1e-6


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """A state of `OnlineModel`.

    Attributes:
        basis: `BASIS` of the program that wrote it.
        gram: float64 `[STRATA, TERMS, TERMS]`, little-endian.
        moment: float64 `[STRATA, TERMS]`, little-endian.
        seen: steps of each kind that it has learned from.
        tokens_seen: of the largest of them.
        log_scales: logarithm of the slowness of decode-only and of mixed steps against the prior.
        steps: observed, of all kinds.
    """

    basis: str
    gram: bytes
    moment: bytes
    seen: tuple[Annotated[int, Meta(ge=0, lt=2**62)], ...]
    tokens_seen: float
    log_scales: tuple[float, float]
    steps: Annotated[int, Meta(ge=0)]


def encode_arrays(gram: F8, moment: F8) -> tuple[bytes, bytes]:
    """The `gram` and `moment` of a ModelState."""
    return gram.astype("<f8").tobytes(), moment.astype("<f8").tobytes()


def decode_arrays(state: ModelState) -> tuple[F8, F8]:
    """Gram and moment.

    Raises:
        ValueError: they are not what normal equations of these terms can be, or another number is out of range.
    """
    n = basis.TERMS
    if state.basis != BASIS:
        raise ValueError("it was written with other terms")
    if len(state.gram) != 8 * STRATA * n * n or len(state.moment) != 8 * STRATA * n or len(state.seen) != STRATA:
        raise ValueError("its arrays have another size")
    gram = np.frombuffer(state.gram, "<f8").astype(np.float64).reshape(STRATA, n, n)
    moment = np.frombuffer(state.moment, "<f8").astype(np.float64).reshape(STRATA, n)
    if not (np.isfinite(gram).all() and np.isfinite(moment).all()) or min(gram.min(), moment.min()) < 0.0:
        raise ValueError("its arrays hold numbers that are negative or not finite")
    own = np.diagonal(gram, axis1=1, axis2=2)
    if gram.max() > _LARGEST or (gram**2 > _ROUNDED * own[:, :, None] * own[:, None, :]).any():
        raise ValueError("its arrays are no sums of products")
    if np.abs(gram - gram.transpose(0, 2, 1)).max() > _SYMMETRIC * max(float(gram.max()), _SMALLEST):
        raise ValueError("its normal equations are not symmetric")
    if not 0.0 < state.tokens_seen <= _MOST_TOKENS or not all(abs(s) <= _LARGEST_LOG for s in state.log_scales):
        raise ValueError("its largest step or its scale is out of range")
    return gram, moment
