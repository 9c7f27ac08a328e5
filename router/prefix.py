"""Which worker holds which beginnings of prompts, from the digests that workers send. PURE."""

from __future__ import annotations

from collections.abc import Sequence

from nexusengine.kv.digest import Batch, digest_stride, unpack

ASK_AGAIN_AFTER_S = 1.0


class PrefixIndex:
    """Names of blocks, each with the workers that hold it as bits; and how far each worker's digest has been followed.

    Workers are numbered in the order in which they were first seen, so that what a prompt shares with all of them is
    found in one walk along its names.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bit_of: dict[str, int] = {}
        self._names: dict[str, set[int]] = {}
        self._at: dict[str, tuple[int, int]] = {}
        self._asked_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def count_of(self, worker_id: str) -> int:
        """How many names it is believed to hold."""
        return len(self._names.get(worker_id, ()))

    def forget(self, worker_id: str) -> None:
        """The worker's process has ended."""
        self._clear(worker_id)
        self._at.pop(worker_id, None)
        self._asked_s.pop(worker_id, None)

    def follow(self, worker_id: str, round: int, seq: int, batches: Sequence[Batch], now: float) -> bool:
        """Take a worker's newest batches, of which the last has the number `seq`. False if some before them are missing
        and it should be asked to start over. Raises ValueError for batches that are not made of names."""
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

    def shared(self, names: Sequence[int], block_size: int) -> dict[str, int]:
        """By worker, how many tokens of a prompt with these names it holds; workers that hold none are left out.

        A worker that holds a block holds those before it too, but for the few that were evicted out of order; so that
        one look at the middle tells most of both halves.
        """
        get = self._holders.get
        depth: dict[int, int] = {}
        first = get(names[0], 0) if names else 0
        if not first:
            return {}
        tokens = digest_stride(block_size) * block_size

        def walk(low: int, low_mask: int, high: int, high_mask: int) -> None:
            """Note the depth of the workers that hold names[low] but not names[high]."""
            lost = low_mask & ~high_mask
            if not lost:
                return
            if high - low == 1:
                depth[low + 1] = depth.get(low + 1, 0) | lost
                return
            middle = (low + high) // 2
            middle_mask = get(names[middle], 0) & low_mask
            walk(low, low_mask, middle, middle_mask)
            walk(middle, middle_mask, high, high_mask & middle_mask)

        walk(0, first, len(names), 0)
        found: dict[str, int] = {}
        for worker_id, bit in self._bit_of.items():
            for blocks, mask in depth.items():
                if mask >> bit & 1:
                    found[worker_id] = blocks * tokens
        return found

    def _apply(self, worker_id: str, batch: Batch) -> None:
        bit = 1 << self._bit_of.setdefault(worker_id, len(self._bit_of))
        mine, holders = self._names.setdefault(worker_id, set()), self._holders
        for name in unpack(batch[0]):
            mine.add(name)
            holders[name] = holders.get(name, 0) | bit
        for name in unpack(batch[1]):
            if name in mine:
                mine.remove(name)
                self._drop(name, bit)

    def _drop(self, name: int, bit: int) -> None:
        left = self._holders[name] & ~bit
        if left:
            self._holders[name] = left
        else:
            del self._holders[name]

    def _clear(self, worker_id: str) -> None:
        bit = 1 << self._bit_of.get(worker_id, 0)
        for name in self._names.pop(worker_id, set()):
            self._drop(name, bit)
