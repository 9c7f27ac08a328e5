"""One step as a policy fills it: tokens, running slots and KV blocks that are left, and what the rows will cost.

Policies differ in what they take and in which order; that blocks are found, that partially prefilled prompts
can be finished, and that the contract of StepPlan is kept, is seen to here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nexusengine.arrays import F8, I4, Bools
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import StepTime
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.view import EngineView

CHUNK_MAX = 2**31 - 1
_NONE, _DECODE = Reason.NONE, int(Reason.DECODE)  # members of an enum are slow to look up


class Step:
    """Takes rows, and keeps account of what is left.

    Args:
        view: the engine.
        max_tokens: budget of the step, within the view's own.
        headroom: blocks left free for each running sequence when a waiting request is admitted, so that those who run
            can grow.

    Attributes:
        decodes: `[D]`, running slots with one token to compute.
        prompts: partially prefilled slots, in order of admission.
        tokens, free_blocks, free_running_slots: what is left.
        preempted: slots whose KV is taken back.
        reasons: `[S]`, Reason by slot.
    """

    def __init__(self, view: EngineView, max_tokens: int | None = None, headroom: int = 1) -> None:
        c, running = view.columns, view.running
        self.view, self.columns, self.headroom = view, c, headroom
        self.tokens = min(max_tokens or view.max_batch_tokens, view.max_batch_tokens)
        self.free_blocks = view.free_blocks
        self.free_running_slots = view.max_running - len(running)
        computed = c.computed_tokens[running]
        decodes = c.known_tokens[running] - computed == 1
        self.decodes: I4 = running[decodes]
        self._computed: I4 = computed[decodes]  # tokens of each
        self.prompts: list[int] = []
        self.preempted: list[int] = []
        self.reasons = np.zeros(len(c.known_tokens), np.int8)
        self._reserved = 0  # blocks that partially prefilled prompts will still take
        if len(self.decodes) < len(running):
            prompts = running[~decodes]
            self.prompts = prompts.tolist()
            whole = -(-c.known_tokens[prompts] // view.block_size)
            self._reserved = int(np.maximum(whole - c.blocks[prompts], 0).sum())
        self._decode_rows: I4 = self.decodes[:0]
        self._slots: list[int] = []
        self._counts: list[int] = []
        self._contexts: list[int] = []
        self._decode_kv_tokens = 0
        self._attention = 0.0
        self._chunks = 0
        self._taken = 0
        self._time: StepTime | None = None  # until more is taken

    @property
    def empty(self) -> bool:
        return self._taken == 0

    @property
    def taken(self) -> int:
        """Tokens of the rows so far."""
        return self._taken

    @property
    def features(self) -> StepFeatures:
        """Of the rows taken so far."""
        rows = len(self._decode_rows) + len(self._slots)
        return StepFeatures(self._taken, rows, self._chunks, self._attention, self._decode_kv_tokens)

    @property
    def time(self) -> StepTime:
        """Predicted for the rows taken so far."""
        if self._time is None:
            self._time = self.view.model.predict(self.features)
        return self._time

    # ---- decodes -------------------------------------------------------------------------------------------------

    def take_decodes(self, victims: Iterable[int]) -> None:
        """Every decode; while blocks are missing, `victims` give way one after the other, but never the last."""
        rows, computed, short = self._short()
        missing = int(np.count_nonzero(short))
        if missing > self.free_blocks:
            for victim in victims:
                if missing <= self.free_blocks or len(self.decodes) + len(self.prompts) <= 1:
                    break
                self.preempt(victim)
                rows, computed, short = self._short()
                missing = int(np.count_nonzero(short))
        if missing > self.free_blocks:
            lacking = np.nonzero(short)[0][self.free_blocks :]
            self.reasons[rows[lacking]] = Reason.WAIT_BLOCKS
            rows, computed, short = np.delete(rows, lacking), np.delete(computed, lacking), np.delete(short, lacking)
            missing = self.free_blocks
        if len(rows) > self.tokens:
            self.reasons[rows[self.tokens :]] = Reason.WAIT_TOKENS
            rows, computed = rows[: self.tokens], computed[: self.tokens]
            missing = int(np.count_nonzero(short[: self.tokens]))
        self.free_blocks -= missing
        self.tokens -= len(rows)
        self.reasons[rows] = _DECODE
        self._decode_rows = rows
        self._taken += len(rows)
        self._time = None
        self._decode_kv_tokens += int(computed.sum()) + len(rows)

    def _short(self) -> tuple[I4, I4, Bools]:
        """Decodes, their computed tokens, and which of them need a new block."""
        rows, computed = self.decodes, self._computed
        return rows, computed, computed >= self.columns.blocks[rows] * self.view.block_size

    def preempt(self, slot: int) -> None:
        """Take the KV of a running slot that is not in the step yet."""
        c = self.columns
        if slot in self.prompts:
            self.prompts.remove(slot)
            whole = -(-int(c.known_tokens[slot]) // self.view.block_size)
            self._reserved -= max(whole - int(c.blocks[slot]), 0)
        else:
            stays = self.decodes != slot
            self.decodes, self._computed = self.decodes[stays], self._computed[stays]
        self.preempted.append(slot)
        self.free_blocks += int(c.blocks[slot])
        self.free_running_slots += 1
        self.reasons[slot] = Reason.PREEMPTED

    def pending(self) -> tuple[I4, I4, I4]:
        """Every prompt to compute, partially prefilled ones first.

        Returns:
            Slots, tokens in their KV cache when they compute next, and tokens left, `[N]` each.
        """
        c, waiting = self.columns, self.view.waiting
        partial = np.array(self.prompts, np.int32)
        slots = np.concatenate([partial, waiting])
        context = np.concatenate([c.computed_tokens[partial], c.cached_tokens[waiting]])
        return slots, context, c.known_tokens[slots] - context

    # ---- prompts -------------------------------------------------------------------------------------------------

    def extend(self, slot: int, at_most: int = CHUNK_MAX) -> int:
        """The next chunk of a partially prefilled prompt; the number of its tokens, 0 if nothing of it fits."""
        c, size = self.columns, self.view.block_size
        computed, blocks = int(c.computed_tokens[slot]), int(c.blocks[slot])
        left = int(c.known_tokens[slot]) - computed
        count = min(left, self.tokens, at_most, (blocks + self.free_blocks) * size - computed)
        if count < 1:
            self.reasons[slot] = Reason.WAIT_TOKENS if min(self.tokens, at_most) < 1 else Reason.WAIT_BLOCKS
            return 0
        more = max(-(-(computed + count) // size) - blocks, 0)
        self._reserved -= more
        self._take(slot, count, computed, more, Reason.PREFILL)
        return count

    def admissible(self, slot: int) -> Reason:
        """Why a waiting slot cannot start now; NONE if it can.

        Its whole prompt must fit beside what partially prefilled prompts still need and the headroom of each running
        sequence, so that none of them blocks another.
        """
        if self.free_running_slots < 1:
            return Reason.WAIT_RUNNING_SLOT
        if self.tokens < 1:
            return Reason.WAIT_TOKENS
        running = self.view.max_running - self.free_running_slots
        headroom = self.headroom * running + 1 if running else 0
        needed = self._whole_blocks(slot)
        if needed + self._reserved + headroom > self.free_blocks and (running or needed > self.free_blocks):
            return Reason.WAIT_BLOCKS
        return Reason.NONE

    def admit(self, slot: int, at_most: int = CHUNK_MAX) -> int:
        """The first chunk of a slot that is `admissible`; the number of its tokens."""
        c = self.columns
        cached = int(c.cached_tokens[slot])
        count = min(int(c.known_tokens[slot]) - cached, self.tokens, at_most)
        blocks = self.blocks_to_start(slot, count)
        self._reserved += self._whole_blocks(slot) - blocks
        self.free_running_slots -= 1
        self._take(slot, count, cached, blocks, Reason.ADMITTED)
        return count

    def blocks_to_start(self, slot: int, count: int) -> int:
        """Free blocks that a waiting slot takes for its first `count` tokens behind the cached ones, at most all."""
        c, size = self.columns, self.view.block_size
        cached = int(c.cached_tokens[slot])
        ends = min(cached + count, int(c.known_tokens[slot]))
        return -(-ends // size) - cached // size + int(c.cached_free_blocks[slot])

    def _whole_blocks(self, slot: int) -> int:
        return self.blocks_to_start(slot, CHUNK_MAX)

    def _take(self, slot: int, count: int, context: int, blocks: int, reason: Reason) -> None:
        self._slots.append(slot)
        self._counts.append(count)
        self._contexts.append(context)
        self.tokens -= count
        self.free_blocks -= blocks
        self.reasons[slot] = reason
        self._taken += count
        self._time = None
        if count > 1:
            self._chunks += 1
            self._attention += count * (context + 0.5 * count)
        else:
            self._decode_kv_tokens += context + 1

    def finished_prompts(self) -> list[int]:
        """Slots whose last known token is computed in this step, decodes apart."""
        c = self.columns
        rows = zip(self._slots, self._counts, self._contexts, strict=True)
        return [slot for slot, count, context in rows if context + count == c.known_tokens[slot]]

    # ---- the plan ------------------------------------------------------------------------------------------------

    def plan(
        self,
        *,
        relegate: tuple[int, ...] = (),
        restore: tuple[int, ...] = (),
        refuse: tuple[int, ...] = (),
        notes: dict[str, float] | None = None,
        due_s: F8 | None = None,
    ) -> StepPlan:
        slots, counts = self._decode_rows, np.ones(len(self._decode_rows), np.int32)
        if self._slots:
            chunks = np.array((self._slots, self._counts), np.int32)
            if 1 in self._counts:
                chunks = chunks[:, np.argsort(chunks[1] > 1, kind="stable")]
            slots, counts = np.concatenate([slots, chunks[0]]), np.concatenate([counts, chunks[1]])
        time = self.time
        return StepPlan(
            slots=slots,
            counts=counts,
            predicted_s=time.mean_s,
            upper_s=time.upper_s,
            reasons=self.reasons,
            preempt=tuple(self.preempted),
            relegate=relegate,
            restore=restore,
            refuse=refuse,
            notes=notes or {},
            due_s=due_s,
        )
