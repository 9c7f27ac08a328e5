"""Block hashes: a keyed hash of the tokens of a KV block and of all before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HASH_BYTES = 16
_TOKEN_BYTES = 4


def block_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.int32],
    block_size: int,
    key: bytes,
    previous: bytes = b"",
) -> list[bytes]:
    """Hashes of the full blocks of `token_ids`, each chained to its predecessor.

    Args:
        token_ids: of the sequence, or of its blocks from some block on.
        block_size: tokens a block.
        key: at most 64 bytes; keeps one engine's hashes from being guessed or matched by another's.
        previous: hash of the block before the first token, or a salt that separates requests which must not share.
    """
    data = np.ascontiguousarray(token_ids, np.int32).tobytes()
    size, hashes = _TOKEN_BYTES * block_size, []
    for start in range(0, len(data) - size + 1, size):
        block = data[start : start + size]
        previous = hashlib.blake2b(previous + block, digest_size=HASH_BYTES, key=key).digest()
        hashes.append(previous)
    return hashes
