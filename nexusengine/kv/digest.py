"""What a prefix cache holds, told to somebody else in small pieces: changes since the last time, under short names.

A `CacheJournal` is written by whoever changes the cache; a `DigestSender` reads it, perhaps in another thread, and
makes the batches that go out. Only every `digest_stride`-th block of a prefix is named, by 64 bits: 30,000 blocks of 16
tokens are 7,500 names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from nexusengine.splitmix import GOLDEN, MASK_64

DIGEST_TOKENS = 64
MOST_NAMES_IN_BATCH = 1360
BATCHES_REPEATED = 2
"""Every batch goes out three times, so that it takes three lost messages in a row to lose a change: 3 * 1360 names of 8
bytes stay below 32 KiB."""


def digest_stride(block_size: int) -> int:
    """Which blocks of a prefix are named: the stride-th, the 2 * stride-th, ..."""
    return max(DIGEST_TOKENS // block_size, 1)


def short_name(name: bytes) -> int:
    """64 bits of a block's name of 8 to 16 bytes."""
    return int.from_bytes(name[:8], "little") ^ (int.from_bytes(name[8:16], "little") * GOLDEN & MASK_64)


def short_names(names: Sequence[bytes], block_size: int) -> tuple[int, ...]:
    """Of the blocks of a prompt that a digest would name, in order."""
    stride = digest_stride(block_size)
    return tuple(map(short_name, names[stride - 1 :: stride]))


class CacheJournal:
    """Notes what enters and leaves a prefix cache. Belongs to the thread that changes the cache; others may take from
    the left of `changes`: (short name, whether it is there now)."""

    def __init__(self, block_size: int) -> None:
        self.changes: deque[tuple[int, bool]] = deque()
        self._stride = digest_stride(block_size)
        self._noted: dict[bytes, int] = {}

    def added(self, name: bytes, index: int) -> None:
        """A block has a name now; it is the index-th of its prefix, from 0."""
        if (index + 1) % self._stride == 0:
            short = self._noted[name] = short_name(name)
            self.changes.append((short, True))

    def removed(self, name: bytes) -> None:
        """No block has this name any more."""
        short = self._noted.pop(name, None)
        if short is not None:
            self.changes.append((short, False))


Batch = tuple[bytes, bytes]
"""Names that came, and names that went: 8 bytes each, little endian."""


class DigestSender:
    """Makes batches of what has changed. round, seq: a round begins with batch 0, which says that nothing is there."""

    def __init__(self, journal: CacheJournal) -> None:
        self.round, self.seq = 0, -1
        self._journal = journal
        self._there: set[int] = set()
        self._told: set[int] = set()
        self._dirty: dict[int, None] = {}
        self._recent: deque[Batch] = deque(maxlen=1 + BATCHES_REPEATED)

    def start_over(self) -> None:
        """The receiver has lost its picture: tell everything anew, in as many batches as it takes."""
        self.round, self.seq = self.round + 1, -1
        self._told.clear()
        self._dirty = dict.fromkeys(self._there)
        self._recent.clear()

    def take(self) -> tuple[int, int, tuple[Batch, ...]]:
        """Round, number of the last batch, and the newest batches, oldest first."""
        self._read()
        added: list[int] = []
        removed: list[int] = []
        while self._dirty and len(added) + len(removed) < MOST_NAMES_IN_BATCH:
            name = next(iter(self._dirty))
            del self._dirty[name]
            if name in self._there and name not in self._told:
                self._told.add(name)
                added.append(name)
            elif name in self._told and name not in self._there:
                self._told.remove(name)
                removed.append(name)
        self.seq += 1
        self._recent.append((pack(added), pack(removed)))
        return self.round, self.seq, tuple(self._recent)

    def _read(self) -> None:
        changes = self._journal.changes
        while changes:
            name, there = changes.popleft()
            (self._there.add if there else self._there.discard)(name)
            self._dirty[name] = None


def pack(names: Sequence[int]) -> bytes:
    return np.array(names, "<u8").tobytes()


def unpack(packed: bytes) -> list[int]:
    """Raises ValueError for what is not made of whole names."""
    names: list[int] = np.frombuffer(packed, "<u8").tolist()
    return names
