"""First come, first served, with chunked prefill: the plainest policy, and the baseline of all others.

Every decode runs; what is left of the token budget goes to prompts in order of admission, then of arrival. Knows no
SLO and does not use the performance model but to report its prediction.
"""

from __future__ import annotations

import numpy as np

from nexusengine.errors import ConfigError
from nexusengine.lens.plan import Reason, StepPlan
from nexusengine.lens.view import EngineView
from nexusengine.perf.features import StepFeatures


class FCFS:
    """budget: most tokens a step, prompts and decodes together; default: the engine's max_batch_tokens."""

    name = "fcfs"

    def __init__(self, budget: float | None = None) -> None:
        if budget is not None and (budget < 1 or budget != int(budget)):
            raise ConfigError(f"fcfs: budget must be a whole number of tokens >= 1, got {budget}", param="scheduler")
        self.budget = None if budget is None else int(budget)

    def plan(self, view: EngineView, now: float) -> StepPlan:
        step = _Step(view, min(self.budget or view.max_batch_tokens, view.max_batch_tokens))
        step.take_decodes()
        step.take_running_prompts()
        if not step.preempted:
            step.admit()
        if not step.slots and step.running:
            step.make_room_for_the_oldest()
        return step.plan()


class _Step:
    """The step as it fills up."""

    def __init__(self, view: EngineView, budget: int) -> None:
        self.view = view
        self.budget = budget
        self.free_blocks = view.free_blocks
        self.running: list[int] = view.running.tolist()
        self.preempted: list[int] = []
        self.slots: list[int] = []
        self.counts: list[int] = []
        self.contexts: list[int] = []
        self.reasons = np.zeros(len(view.columns.known_tokens), np.int8)
        c = view.columns
        self.left = {s: int(n) for s, n in zip(self.running, _left(view), strict=True)}
        self.computed = c.computed_tokens
        self.blocks = c.blocks

    def take_decodes(self) -> None:
        """Every sequence with one token to compute; takes KV back from the newest while a block is missing."""
        decodes = [s for s in self.running if self.left[s] == 1]
        needs = {s: self._blocks_for(s, 1) for s in decodes}
        while sum(needs.values()) > self.free_blocks and len(self.running) > 1:
            victim = self.running[-1]
            self._preempt(victim)
            needs.pop(victim, None)
        for slot, blocks in needs.items():
            if self.budget == 0 or blocks > self.free_blocks:
                self.reasons[slot] = Reason.WAIT_TOKENS if self.budget == 0 else Reason.WAIT_BLOCKS
                continue
            self._take(slot, 1, int(self.computed[slot]), blocks, Reason.DECODE)

    def take_running_prompts(self) -> None:
        for slot in self.running:
            if self.left[slot] == 1:
                continue
            room = (int(self.blocks[slot]) + self.free_blocks) * self.view.block_size - int(self.computed[slot])
            count = min(self.left[slot], self.budget, room)
            if count < 1:
                self.reasons[slot] = Reason.WAIT_TOKENS if self.budget == 0 else Reason.WAIT_BLOCKS
                continue
            self._take(slot, count, int(self.computed[slot]), self._blocks_for(slot, count), Reason.PREFILL)

    def admit(self) -> None:
        """Newcomers in order. The whole prompt must fit beside what the running prompts still need and one block for
        each running sequence, so that half-computed prompts cannot block each other."""
        c, size = self.view.columns, self.view.block_size
        promised = sum(self._blocks_for(s, self.left[s]) for s in self.running if s not in self.slots)
        promised += sum(
            -(-(self.left[s] + int(self.computed[s])) // size) - -(-(n + int(self.computed[s])) // size)
            for s, n in zip(self.slots, self.counts, strict=True)
        )
        seats = self.view.max_running - len(self.running)
        reason = Reason.NONE
        for slot in self.view.waiting.tolist():
            if reason is Reason.NONE:
                known, cached = int(c.known_tokens[slot]), int(c.cached_tokens[slot])
                headroom = len(self.running) and len(self.running) + 1
                whole = -(-known // size) - cached // size + int(c.cached_free_blocks[slot])
                if seats == 0:
                    reason = Reason.WAIT_SEATS
                elif self.budget == 0:
                    reason = Reason.WAIT_TOKENS
                elif whole + promised + headroom > self.free_blocks and (self.running or whole > self.free_blocks):
                    reason = Reason.WAIT_BLOCKS
                else:
                    count = min(known - cached, self.budget)
                    blocks = -(-(cached + count) // size) - cached // size + int(c.cached_free_blocks[slot])
                    promised += whole - blocks
                    seats -= 1
                    self.running.append(slot)
                    self._take(slot, count, cached, blocks, Reason.ADMITTED)
                    continue
            self.reasons[slot] = reason

    def make_room_for_the_oldest(self) -> None:
        """Nothing could run: KV is full of half-computed sequences. The newest give way until the oldest can go on."""
        while not self.slots and len(self.running) > 1:
            self._preempt(self.running[-1])
            self.take_running_prompts() if self.left[self.running[0]] > 1 else self.take_decodes()

    def plan(self) -> StepPlan:
        counts = np.array(self.counts, np.int32)
        order = np.argsort(counts > 1, kind="stable")
        slots, counts = np.array(self.slots, np.int32)[order], counts[order]
        contexts = np.array(self.contexts, np.int32)[order]
        time = self.view.model.predict(StepFeatures.of(counts, contexts))
        return StepPlan(slots, counts, time.mean_s, time.upper_s, self.reasons, preempt=tuple(self.preempted))

    def _blocks_for(self, slot: int, count: int) -> int:
        needed = -(-(int(self.computed[slot]) + count) // self.view.block_size)
        return max(needed - int(self.blocks[slot]), 0)

    def _take(self, slot: int, count: int, context: int, blocks: int, reason: Reason) -> None:
        self.slots.append(slot)
        self.counts.append(count)
        self.contexts.append(context)
        self.budget -= count
        self.free_blocks -= blocks
        self.reasons[slot] = reason

    def _preempt(self, slot: int) -> None:
        self.running.remove(slot)
        self.preempted.append(slot)
        self.free_blocks += int(self.blocks[slot])
        self.reasons[slot] = Reason.PREEMPTED


def _left(view: EngineView) -> list[int]:
    c = view.columns
    left: list[int] = (c.known_tokens[view.running] - c.computed_tokens[view.running]).tolist()
    return left
