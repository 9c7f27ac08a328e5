"""Keyed hashes of tenants and prompts: equal ones are seen to be equal; none can be guessed without the key."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import numpy as np

_DIGEST_BYTES, _ID_BITS = 16, 53  # ids are whole numbers that JSON and float64 carry exactly


class Keys:
    """Hashes of one recording.

    Args:
        secret: of the configuration; None: random bytes that are never written anywhere.
    """

    def __init__(self, secret: str | None = None) -> None:
        given = secrets.token_bytes(32) if secret is None else secret.encode()
        self._key = hashlib.blake2b(given, digest_size=32, person=b"nexus trace").digest()

    def tenant(self, kind: str, value: str) -> str:
        """A tenant by a kind of name ("user", "key") and its value: 16 hexadecimal digits."""
        text = f"{kind}:{value}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=8, key=self._key, person=b"tenant").hexdigest()

    def blocks(self, token_ids: Sequence[int], block_tokens: int) -> tuple[int, ...]:
        """An id below 2**53 for each full block, which stands for all tokens up to the block's end."""
        ids = np.ascontiguousarray(token_ids, np.int32)
        found, previous = [], b""
        for start in range(0, len(ids) - block_tokens + 1, block_tokens):
            block = hashlib.blake2b(previous, digest_size=_DIGEST_BYTES, key=self._key, person=b"block")
            block.update(ids[start : start + block_tokens].tobytes())
            previous = block.digest()
            found.append(int.from_bytes(previous[:8], "little") >> (64 - _ID_BITS))
        return tuple(found)
