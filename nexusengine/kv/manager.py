"""The block pool of the paged KV cache: who holds which block, and which finished blocks can be used again.

A block is in exactly one of three places: free (no content worth keeping), cached (content found by its block hash, no
user), or held (by one or more slots). Cached blocks are taken when no free one is left, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.errors import InternalError
from nexusengine.kv.digest import CacheEvents


class KVError(InternalError):
    """An invariant of the block pool is violated."""

    code = "kv_error"


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The cached beginning of a prompt.

    Attributes:
        tokens: how many.
        blocks: the blocks that hold them, in order.
        free_blocks: how many of `blocks` have no user now, so that taking them makes the free count smaller.
    """

    tokens: int
    blocks: tuple[int, ...]
    free_blocks: int


class KVManager:
    """Block accounting for slots 0 .. max_slots - 1.

    Args:
        num_blocks: with the null block 0, which is never handed out.
        block_size: tokens a block.

    Attributes:
        block_tables: i4 `[max_slots, max_blocks_per_slot]`, each slot's blocks in order, 0 behind them; executors read
            it in place. Until a slot is released its blocks stay where they are, and others are added behind them.
        releases: i8 `[max_slots]`, how often each slot was released.
        events: records every block hash that comes and goes, if set.
        evictions: cached blocks that were taken for other content.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_slots: int,
        max_blocks_per_slot: int,
        *,
        prefix_caching: bool = True,
    ) -> None:
        if num_blocks < 2:
            raise KVError(f"a pool of {num_blocks} blocks holds nothing beside the null block")
        self.block_size = block_size
        self.total_blocks = num_blocks - 1
        self.prefix_caching = prefix_caching
        self.block_tables: npt.NDArray[np.int32] = np.zeros((max_slots, max_blocks_per_slot), np.int32)
        self.releases: npt.NDArray[np.int64] = np.zeros(max_slots, np.int64)
        self.evictions = 0
        self.events: CacheEvents | None = None
        self._held = [0] * max_slots  # blocks of each slot
        self._published = [0] * max_slots  # leading blocks of each slot that were offered to the cache
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # no user, oldest use first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken now: free ones and cached ones without a user."""
        return len(self._free) + len(self._cached)

    @property
    def used_blocks(self) -> int:
        return self.total_blocks - self.free_blocks

    def blocks_of(self, slot: int) -> int:
        return self._held[slot]

    def lookup(self, hashes: Sequence[bytes], limit_tokens: int) -> PrefixHit:
        """The longest run of leading blocks that is cached, of at most `limit_tokens` tokens; changes nothing."""
        blocks: list[int] = []
        free = 0
        for h in hashes[: limit_tokens // self.block_size]:
            block = self._block_of.get(h)
            if block is None:
                break
            blocks.append(block)
            free += self._users[block] == 0
        return PrefixHit(len(blocks) * self.block_size, tuple(blocks), free)

    def admit(self, slot: int, hashes: Sequence[bytes], limit_tokens: int) -> int:
        """Give an empty slot the cached beginning of its prompt.

        Returns:
            How many tokens that is.

        Raises:
            KVError: the slot holds blocks already.
        """
        if self._held[slot]:
            raise KVError(f"slot {slot} holds {self._held[slot]} blocks and is admitted again")
        hit = self.lookup(hashes, limit_tokens)
        for i, block in enumerate(hit.blocks):
            if self._users[block] == 0:
                del self._cached[block]
            self._users[block] += 1
            self.block_tables[slot, i] = block
        self._held[slot] = self._published[slot] = len(hit.blocks)
        return hit.tokens

    def grow(self, slot: int, total_tokens: int) -> bool:
        """Give the slot room for `total_tokens`; all or nothing.

        Returns:
            False if blocks are lacking.
        """
        held = self._held[slot]
        missing = -(-total_tokens // self.block_size) - held
        if missing <= 0:
            return True
        if missing > self.free_blocks or held + missing > self.block_tables.shape[1]:
            return False
        for i in range(held, held + missing):
            block = self._take()
            self._users[block] = 1
            self.block_tables[slot, i] = block
        self._held[slot] = held + missing
        return True

    def commit(self, slot: int, hashes: Sequence[bytes], computed_tokens: int) -> None:
        """Cache the slot's computed full blocks under `hashes`; a hash that is cached already keeps its first block."""
        first, full = self._published[slot], min(computed_tokens // self.block_size, len(hashes), self._held[slot])
        if full <= first or not self.prefix_caching:
            return
        for i, block in enumerate(self.block_tables[slot, first:full].tolist(), first):
            h = hashes[i]
            if h not in self._block_of and block not in self._hash_of:
                self._block_of[h] = block
                self._hash_of[block] = h
                if self.events is not None:
                    self.events.added(h, i)
        self._published[slot] = full

    def release(self, slot: int, *, discard: bool = False) -> None:
        """Free all blocks of the slot, the last first, so that a prompt's beginning stays cached longest.

        Args:
            slot: whose request has ended or is preempted.
            discard: nobody may be given their content any more, not even of blocks that others hold too.
        """
        for block in self.block_tables[slot, : self._held[slot]][::-1].tolist():
            if discard and block in self._hash_of:
                self._forget_hash(block)
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        self.block_tables[slot, : self._held[slot]] = 0
        self.releases[slot] += 1
        self._held[slot] = self._published[slot] = 0

    def check(self) -> None:
        """Check the pool.

        Raises:
            KVError: naming the first invariant that does not hold.
        """
        users = [0] * len(self._users)
        for slot, held in enumerate(self._held):
            row = self.block_tables[slot].tolist()
            if 0 in row[:held] or any(row[held:]):
                raise KVError(f"slot {slot} holds {held} blocks but its table reads {row}")
            for block in row[:held]:
                users[block] += 1
        if users != self._users:
            wrong = [b for b, (a, c) in enumerate(zip(users, self._users, strict=True)) if a != c]
            raise KVError(f"blocks {wrong[:8]} are counted with other users than the block tables show")
        if self._block_of != {h: b for b, h in self._hash_of.items()}:
            raise KVError("block hashes and blocks of the prefix cache do not agree")
        places = sorted([*self._free, *self._cached, *(b for b, n in enumerate(users) if n)])
        if places != list(range(1, self.total_blocks + 1)):
            raise KVError("a block is lost, or in two of free, cached and held")
        if any(b in self._hash_of for b in self._free) or any(b not in self._hash_of for b in self._cached):
            raise KVError("a free block has a hash, or a cached one has none")

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget_hash(block)
        self.evictions += 1
        return block

    def _forget_hash(self, block: int) -> None:
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        if self.events is not None:
            self.events.removed(block_hash)
