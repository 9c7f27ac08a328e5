"""What a prefix cache holds, for the router, in small pieces: changes since the last time, as short block hashes.

`CacheEvents` is written by whoever changes the cache; a `DigestSender` reads it, perhaps in another thread, and makes
the batches that go out. Only every `digest_stride`-th block of a prefix is reported, by 64 bits of its hash: 30,000
blocks of 16 tokens are 7,500 hashes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from nexusengine.splitmix import GOLDEN, MASK_64

DIGEST_TOKENS = 64
MAX_HASHES_IN_BATCH = 1360
BATCHES_REPEATED = 2
"""Every batch goes out three times, so that it takes three lost messages in a row to lose a change: 3 * 1360 hashes of
8 bytes stay below 32 KiB."""


def digest_stride(block_size: int) -> int:
    """The stride of the blocks of a prefix that are reported: the stride-th, the 2 * stride-th, ..."""
    return max(DIGEST_TOKENS // block_size, 1)


def short_hash(block_hash: bytes) -> int:
    """64 bits of a block's hash of 8 to 16 bytes."""
    return int.from_bytes(block_hash[:8], "little") ^ (int.from_bytes(block_hash[8:16], "little") * GOLDEN & MASK_64)


def short_hashes(block_hashes: Sequence[bytes], block_size: int) -> tuple[int, ...]:
    """Short hashes of the blocks of a prompt that a digest would report, in order."""
    stride = digest_stride(block_size)
    return tuple(map(short_hash, block_hashes[stride - 1 :: stride]))


class CacheEvents:
    """Records which block hashes enter and leave a prefix cache.

    Belongs to the thread that changes the cache; others may take from the left of `changes`.

    Attributes:
        changes: (short hash, whether it is cached now), oldest first.
    """

    def __init__(self, block_size: int) -> None:
        self.changes: deque[tuple[int, bool]] = deque()
        self._stride = digest_stride(block_size)
        self._reported: dict[bytes, int] = {}

    def added(self, block_hash: bytes, index: int) -> None:
        """A block is cached under this hash now; it is the index-th of its prefix, from 0."""
        if (index + 1) % self._stride == 0:
            short = self._reported[block_hash] = short_hash(block_hash)
            self.changes.append((short, True))

    def removed(self, block_hash: bytes) -> None:
        """No block is cached under this hash any more."""
        short = self._reported.pop(block_hash, None)
        if short is not None:
            self.changes.append((short, False))


Batch = tuple[bytes, bytes]
"""Short hashes that came, and those that went: 8 bytes each, little endian."""


class DigestSender:
    """Makes batches of what has changed.

    Attributes:
        round: rises when the receiver has to start over; a round begins with batch 0, before which nothing is cached.
        seq: number of the last batch in this round.
    """

    def __init__(self, events: CacheEvents) -> None:
        self.round, self.seq = 0, -1
        self._events = events
        self._cached: set[int] = set()
        self._sent: set[int] = set()
        self._dirty: dict[int, None] = {}
        self._recent: deque[Batch] = deque(maxlen=1 + BATCHES_REPEATED)

    def start_over(self) -> None:
        """Send everything anew, in as many batches as it takes: the receiver has lost its picture."""
        self.round, self.seq = self.round + 1, -1
        self._sent.clear()
        self._dirty = dict.fromkeys(self._cached)
        self._recent.clear()

    def take(self) -> tuple[int, int, tuple[Batch, ...]]:
        """Round, number of the last batch, and the newest batches, oldest first."""
        self._read()
        added: list[int] = []
        removed: list[int] = []
        while self._dirty and len(added) + len(removed) < MAX_HASHES_IN_BATCH:
            short = next(iter(self._dirty))
            del self._dirty[short]
            if short in self._cached and short not in self._sent:
                self._sent.add(short)
                added.append(short)
            elif short in self._sent and short not in self._cached:
                self._sent.remove(short)
                removed.append(short)
        self.seq += 1
        self._recent.append((pack(added), pack(removed)))
        return self.round, self.seq, tuple(self._recent)

    def _read(self) -> None:
        changes = self._events.changes
        while changes:
            short, cached = changes.popleft()
            (self._cached.add if cached else self._cached.discard)(short)
            self._dirty[short] = None


def pack(hashes: Sequence[int]) -> bytes:
    """Short hashes as 8 bytes each, little endian."""
    return np.array(hashes, "<u8").tobytes()


def unpack(packed: bytes) -> list[int]:
    """Short hashes from `pack`.

    Raises:
        ValueError: the bytes are not whole hashes.
    """
    hashes: list[int] = np.frombuffer(packed, "<u8").tolist()
    return hashes
