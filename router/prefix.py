"""Which worker holds which prefixes of prompts, from the digests that workers send. PURE."""

from __future__ import annotations

from collections.abc import Sequence

from nexusengine.kv.digest import Batch, digest_stride, unpack

ASK_AGAIN_AFTER_S = 1.0
MAX_HASHES_PER_BLOCK, MIN_BLOCKS = 4, 10_000


class PrefixIndex:
    """Block hashes, each with the workers that hold it as bits; and how far each worker's digest has been followed.

    Workers are numbered in the order in which they were first seen, so that what a prompt shares with all of them is
    found in one walk along its hashes.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bit_of: dict[str, int] = {}
        self._hashes: dict[str, set[int]] = {}
        self._at: dict[str, tuple[int, int]] = {}
        self._asked_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def has_too_many(self, worker_id: str, kv_blocks: int) -> bool:
        """Whether it is believed to hold far more hashes than it has KV blocks: its digest must be begun anew."""
        return len(self._hashes.get(worker_id, ())) > MAX_HASHES_PER_BLOCK * max(kv_blocks, MIN_BLOCKS)

    def forget(self, worker_id: str) -> None:
        """Drop all that is known of a worker whose process has ended."""
        self._clear(worker_id)
        self._at.pop(worker_id, None)
        self._asked_s.pop(worker_id, None)

    def follow(self, worker_id: str, round: int, seq: int, batches: Sequence[Batch], now: float) -> bool:
        """Apply a worker's newest batches.

        Args:
            round: rises when the worker starts over.
            seq: number of the last batch.

        Returns:
            False if some batches before these are missing and the worker should be asked to start over.

        Raises:
            ValueError: batches that are not made of hashes.
        """
        at_round, at_seq = self._at.get(worker_id, (-1, -1))
        if round < at_round:
            return True  # from before it started over
        first = seq - len(batches) + 1
        if round > at_round:
            at_seq = -1
        if first > at_seq + 1:
            asked_s = self._asked_s.get(worker_id)
            if asked_s is not None and now - asked_s < ASK_AGAIN_AFTER_S:
                return True
            self._asked_s[worker_id] = now
            return False
        if at_seq == -1:
            self._clear(worker_id)
        for batch in batches[max(at_seq + 1 - first, 0) :]:
            self._apply(worker_id, batch)
        self._at[worker_id] = round, max(seq, at_seq)
        return True

    def shared(self, hashes: Sequence[int], block_size: int) -> dict[str, int]:
        """Tokens of a prompt with these block hashes that each worker holds; workers that hold none are left out.

        A worker that holds a block holds those before it too, but for the few that were evicted out of order; so that
        one look at the middle tells most of both halves.
        """
        get = self._holders.get
        depth: dict[int, int] = {}
        first = get(hashes[0], 0) if hashes else 0
        if not first:
            return {}
        tokens = digest_stride(block_size) * block_size

        def walk(low: int, low_mask: int, high: int, high_mask: int) -> None:
            """Note the depth of the workers that hold hashes[low] but not hashes[high]."""
            lost = low_mask & ~high_mask
            if not lost:
                return
            if high - low == 1:
                depth[low + 1] = depth.get(low + 1, 0) | lost
                return
            middle = (low + high) // 2
            middle_mask = get(hashes[middle], 0) & low_mask
            walk(low, low_mask, middle, middle_mask)
            walk(middle, middle_mask, high, high_mask & middle_mask)

        walk(0, first, len(hashes), 0)
        found: dict[str, int] = {}
        for worker_id, bit in self._bit_of.items():
            for blocks, mask in depth.items():
                if mask >> bit & 1:
                    found[worker_id] = blocks * tokens
        return found

    def _apply(self, worker_id: str, batch: Batch) -> None:
        bit = 1 << self._bit_of.setdefault(worker_id, len(self._bit_of))
        mine, holders = self._hashes.setdefault(worker_id, set()), self._holders
        for block in unpack(batch[0]):
            mine.add(block)
            holders[block] = holders.get(block, 0) | bit
        for block in unpack(batch[1]):
            if block in mine:
                mine.remove(block)
                self._drop(block, bit)

    def _drop(self, block: int, bit: int) -> None:
        left = self._holders[block] & ~bit
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]

    def _clear(self, worker_id: str) -> None:
        bit = 1 << self._bit_of.get(worker_id, 0)
        for block in self._hashes.pop(worker_id, set()):
            self._drop(block, bit)
