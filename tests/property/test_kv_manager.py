"""The block pool under random use: invariants hold after every call, and a hit has the content it claims."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nexusengine.kv.hashing import block_hashes
from nexusengine.kv.manager import KVManager

SIZE, SLOTS, BLOCKS = 2, 4, 12
slots = st.integers(0, SLOTS - 1)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=2 * SIZE * BLOCKS)


class Pool(RuleBasedStateMachine):
    """content: what the tokens of each block would be; written when a slot computes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVManager(BLOCKS + 1, SIZE, SLOTS, BLOCKS)
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.content: dict[tuple[int, int], int] = {}
        self.tables: dict[int, tuple[int, list[int]]] = {}

    def hashes(self, slot: int) -> list[bytes]:
        return block_hashes(self.tokens[slot], SIZE, b"k")

    @rule(slot=slots, prompt=prompts)
    def admit(self, slot: int, prompt: list[int]) -> None:
        if slot in self.tokens:
            return
        self.tokens[slot] = prompt
        cached = self.kv.admit(slot, self.hashes(slot), len(prompt) - 1)
        assert cached < len(prompt)
        for position in range(cached):
            block = int(self.kv.block_tables[slot, position // SIZE])
            assert self.content[block, position % SIZE] == prompt[position], "a hit with other content"
        self.computed[slot] = cached

    @precondition(lambda self: self.tokens)
    @rule(slot=slots, count=st.integers(1, 6))
    def compute(self, slot: int, count: int) -> None:
        if slot not in self.tokens:
            return
        end = min(self.computed[slot] + count, len(self.tokens[slot]))
        free = self.kv.free_blocks
        if not self.kv.grow(slot, end):
            assert self.kv.free_blocks == free
            return
        for position in range(self.computed[slot], end):
            block = int(self.kv.block_tables[slot, position // SIZE])
            self.content[block, position % SIZE] = self.tokens[slot][position]
        self.computed[slot] = end
        self.kv.commit(slot, self.hashes(slot), end)

    @precondition(lambda self: self.tokens)
    @rule(slot=slots)
    def release(self, slot: int) -> None:
        if self.tokens.pop(slot, None) is not None:
            self.kv.release(slot)

    @precondition(lambda self: self.tokens)
    @rule(slot=slots)
    def discard(self, slot: int) -> None:
        if slot in self.tokens:
            names = self.hashes(slot)[: self.computed[slot] // SIZE]
            held = set(self.kv.block_tables[slot].tolist()) - {0}
            del self.tokens[slot]
            self.kv.release(slot, discard=True)
            assert not held & set(self.kv.lookup(names, SIZE * BLOCKS).blocks), "discarded, and yet given to others"

    @invariant()
    def tables_only_grow_until_they_are_released(self) -> None:
        for slot in range(SLOTS):
            releases = int(self.kv.releases[slot])
            table = self.kv.block_tables[slot, : self.kv.blocks_of(slot)].tolist()
            last_releases, last_table = self.tables.get(slot, (0, []))
            if releases == last_releases:
                assert table[: len(last_table)] == last_table
            self.tables[slot] = releases, table

    @rule(prompt=prompts)
    def lookup(self, prompt: list[int]) -> None:
        names = block_hashes(prompt, SIZE, b"k")
        hit, free = self.kv.lookup(names, len(prompt)), self.kv.free_blocks
        claimed = [self.content[block, i] for block in hit.blocks for i in range(SIZE)]
        assert claimed == prompt[: hit.tokens]
        held = {b for slot in self.tokens for b in self.kv.block_tables[slot].tolist()}
        assert hit.free_blocks == len(set(hit.blocks) - held)
        assert self.kv.free_blocks == free

    @invariant()
    def consistent(self) -> None:
        self.kv.check()
        if not self.tokens:
            assert self.kv.used_blocks == 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
