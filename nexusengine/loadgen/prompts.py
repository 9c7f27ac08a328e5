"""Prompts of an exact length, as token ids, and the bodies that carry them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.loadgen.items import WorkItem
from nexusengine.slo.resolve import CUSTOM

_FIRST_ID = 1000  # special tokens have low ids
_PROMPTS, _BLOCKS = 0, 1


class Prompts:
    """Random token ids by seed; equal block ids give equal tokens."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._low, self._high = min(_FIRST_ID, vocab_size // 2), vocab_size
        self._seed = seed

    def token_ids(self, index: int, item: WorkItem) -> npt.NDArray[np.int64]:
        """Of the item that is the index-th of its run: `[prompt_tokens]`."""
        pieces = []
        left = item.prompt_tokens
        if item.blocks is not None:
            named = min(item.blocks.named_tokens, left)
            for block in item.blocks.ids[: -(-named // item.blocks.tokens)]:
                pieces.append(self._draw(_BLOCKS, item.blocks.scope, block, count=item.blocks.tokens)[:named])
                named -= len(pieces[-1])
                left -= len(pieces[-1])
        if left:
            pieces.append(self._draw(_PROMPTS, index, count=left))
        return np.concatenate(pieces)

    def _draw(self, *key: int, count: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key))
        return rng.integers(self._low, self._high, count)


def bodies(
    items: Sequence[WorkItem], prompts: Prompts, model: str | None, *, seed: int, bounds: bool = False
) -> list[bytes]:
    """The JSON body of each item, for /v1/completions.

    Args:
        bounds: ask for an SLO in numbers instead of by its class, for servers that do not know the class.
    """
    return [_body(i, item, prompts.token_ids(i, item), model, seed, bounds) for i, item in enumerate(items)]


def _body(
    index: int, item: WorkItem, token_ids: npt.NDArray[np.int64], model: str | None, seed: int, bounds: bool
) -> bytes:
    body: dict[str, Any] = {
        "max_tokens": item.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "seed": seed + index,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model is not None:
        body["model"] = model
    if item.tenant is not None:
        body["user"] = item.tenant
    if item.slo is not None and (bounds or item.slo_class in (None, CUSTOM)):
        given = {"ttft_ms": item.slo.ttft_s, "tpot_ms": item.slo.tpot_s, "e2e_ms": item.slo.e2e_s}
        body["slo"] = {key: 1e3 * value for key, value in given.items() if value is not None}
    else:
        body["slo"] = item.slo_class or "none"
    head = json.dumps(body).encode()
    return b'{"prompt":[' + ",".join(map(str, token_ids.tolist())).encode() + b"]," + head[1:]
