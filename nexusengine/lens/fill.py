"""Prompt chunks into a step, each as large as the step's time limit allows, and newcomers only where those who run can
bear one more."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.lens.plan import Reason
from nexusengine.lens.step import Step
from nexusengine.perf.features import StepFeatures


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """The decode step with everyone who runs started, linearised: its duration, and what one more sequence and one more
    KV token add to it. Seconds."""

    step_s: float
    per_sequence_s: float
    per_kv_token_s: float


@dataclass(frozen=True, slots=True)
class ChunkRules:
    """In tokens. most: of one chunk. crumb: the smallest piece of a prompt worth a chunk. tile: pieces are rounded down
    to multiples of it; 0: not at all. admit: share of the tightest promised time per token that the decode step may
    fill with everyone started."""

    most: int = 8192
    crumb: int = 16
    tile: int = 0
    admit: float = 0.95


class Fill:
    """budget_s: upper bound of the step's duration; inf where only the token budget counts. tightest_tpot_s: of those
    who run and can still keep their promise. open: whether time is left."""

    def __init__(
        self, step: Step, budget_s: float, load: DecodeLoad, tightest_tpot_s: float, rules: ChunkRules
    ) -> None:
        self.step, self.budget_s, self.rules = step, budget_s, rules
        self.open = True
        self._load, self._decode_s, self._tightest_tpot_s = load, load.step_s, tightest_tpot_s

    def go_on(self, slot: int, context: int, left: int, budget_s: float | None = None) -> int:
        """The next chunk of a prompt that has begun; its tokens."""
        count = self._chunk(context, left, self.budget_s if budget_s is None else budget_s)
        if count:
            return self.step.extend(slot, count)
        self.step.reasons[slot] = Reason.WAIT_TIME
        return 0

    def start(self, slot: int, context: int, left: int, tpot_s: float, budget_s: float | None = None) -> Reason:
        """The first chunk of a newcomer; NONE, or why it gets none. tpot_s: its promise; inf if it is lost."""
        step = self.step
        reason = step.admissible(slot)
        if reason is not Reason.NONE:
            return reason
        tightest_s = min(self._tightest_tpot_s, tpot_s)
        decode_s = self._decode_s + self._load.per_sequence_s + self._load.per_kv_token_s * (context + left)
        if decode_s > self.rules.admit * tightest_s and step.seats < step.view.max_running:
            return Reason.WAIT_TPOT
        count = self._chunk(context, left, self.budget_s if budget_s is None else budget_s)
        if not count:
            return Reason.WAIT_TIME
        step.admit(slot, count)
        self._decode_s, self._tightest_tpot_s = decode_s, tightest_s
        return Reason.NONE

    def _chunk(self, context: int, left: int, budget_s: float) -> int:
        """Tokens that fit into what is left of the step; where that is less than `left`, the step is full."""
        step, rules = self.step, self.rules
        most = min(left, rules.most, step.tokens)
        count = largest_chunk(step, budget_s, context, most)
        if count == left:
            return count
        if budget_s == self.budget_s and count < min(left, rules.most):
            self.open = False
        if rules.tile and count > rules.tile:
            count -= count % rules.tile
        return count if count >= rules.crumb else 0


def largest_chunk(step: Step, budget_s: float, context: int, most: int) -> int:
    """The largest chunk of at most `most` tokens of a prompt that keeps the step's upper bound within budget_s."""
    if budget_s == float("inf") or most < 1:
        return max(most, 0)
    f, model = step.features, step.view.model
    whole = StepFeatures(
        f.tokens + most,
        f.sequences + 1,
        f.prefills + (most > 1),
        f.prefill_attention + (most * (context + 0.5 * most) if most > 1 else 0.0),
        f.decode_kv_tokens + (context + 1 if most == 1 else 0),
    )
    if model.predict(whole).upper_s <= budget_s:
        return most
    return model.max_tokens(budget_s, f, context, most)
