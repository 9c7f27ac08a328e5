"""Puts prompt chunks into a step, each as large as the step's time limit allows.

Waiting requests start only where those who run can bear one more.
"""

from __future__ import annotations

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import Predictor
from nexusengine.scheduler.lens.prefill_rate import MarginalCosts
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.step import CHUNK_MAX, Step

_INF = float("inf")
MIN_CHUNK_TOKENS = 16
"""The smallest piece of a prompt worth a chunk: below it, a step costs as much as with none."""
_MAX_CHUNK_TOKENS = 8192
_ADMIT_TPOT_SHARE = 0.95  # of the tightest TPOT that a decode step may fill with everyone started
SPARE = 0.1
"""Of running slots, KV blocks and the time of decode steps: left to others by those who have no claim to them."""
_SECANTS = 4
_CLOSE = 0.98
_FURTHEST = 1.5  # times the largest step so far: the model knows nothing of steps beyond
_NONE, _WAIT_TIME = Reason.NONE, Reason.WAIT_TIME  # members of an enum are slow to look up


class Fill:
    """Puts chunks into one step.

    Args:
        step: holds the decodes already.
        limit_s: what the mean duration of the step must stay within; inf where only the token budget counts.
        started_s: predicted decode step with everyone who runs started.
        costs: at the margin of this step.
        tightest_tpot_s: of those who run and can still meet their SLO.
        seen_tokens: of the largest step so far; none is planned that is much larger.

    Attributes:
        open: whether time is left.
    """

    def __init__(
        self,
        step: Step,
        limit_s: float,
        started_s: float,
        costs: MarginalCosts,
        tightest_tpot_s: float,
        seen_tokens: int,
    ) -> None:
        self.step, self.limit_s = step, limit_s
        self.open = True
        self._step_s = 0.0  # predicted, with the newest chunk whole
        self._costs, self._decode_s, self._tightest_tpot_s = costs, started_s, tightest_tpot_s
        self._largest = int(_FURTHEST * seen_tokens) if limit_s < _INF else step.view.max_batch_tokens

    def end_by(self, time_s: float) -> None:
        """A prompt that ends in this step is due in so many seconds: nothing that is added may make it late.

        If the step is longer already, it is late anyway.
        """
        if time_s < self.limit_s:
            unknown = self.limit_s == _INF
            step_s = self.step.time.mean_s if unknown else self._step_s
            self.limit_s = time_s if step_s <= time_s else self.limit_s

    def resume(self, slot: int, context: int, left: int, at_most: int = CHUNK_MAX) -> int:
        """The next chunk of a partially prefilled prompt; its tokens."""
        count = self._chunk(context, left, at_most)
        if count:
            return self.step.extend(slot, count)
        self.step.reasons[slot] = _WAIT_TIME
        return 0

    def start(
        self, slot: int, context: int, left: int, tpot_s: float, at_most: int = CHUNK_MAX, *, spare: bool = False
    ) -> Reason:
        """The first chunk of a waiting request; NONE, or why it gets none.

        Args:
            tpot_s: its SLO; inf if that is missed.
            spare: it leaves some of the running slots, KV blocks and time of decode steps to others.
        """
        step, costs = self.step, self._costs
        reason = step.admissible(slot)
        if reason is _NONE and spare:
            reason = self._spared()
        if reason is not _NONE:
            return reason
        tightest_s = min(self._tightest_tpot_s, tpot_s)
        decode_s = self._decode_s + costs.sequence_s + costs.kv_token_s * (context + left)
        share = _ADMIT_TPOT_SHARE * (1.0 - SPARE) if spare else _ADMIT_TPOT_SHARE
        if decode_s > share * tightest_s and step.free_running_slots < step.view.max_running:
            return Reason.WAIT_TPOT
        count = self._chunk(context, left, at_most)
        if not count:
            return _WAIT_TIME
        step.admit(slot, count)
        self._decode_s, self._tightest_tpot_s = decode_s, tightest_s
        return _NONE

    def _spared(self) -> Reason:
        """Why nobody may start who has to leave slots and blocks to others; NONE if there are enough."""
        step, view = self.step, self.step.view
        if step.free_running_slots <= int(SPARE * view.max_running):
            return Reason.WAIT_RUNNING_SLOT
        return Reason.WAIT_BLOCKS if step.free_blocks <= int(SPARE * view.total_blocks) else _NONE

    def _chunk(self, context: int, left: int, at_most: int) -> int:
        """Tokens that fit into what is left of the step; where they are less than wanted, the step is full."""
        step = self.step
        wanted = min(left, _MAX_CHUNK_TOKENS, at_most)
        count = most = min(wanted, step.tokens, self._largest - step.taken)
        if most > 0 and self.limit_s < _INF:
            base, model = step.features, step.view.model
            self._step_s = model.predict(base.with_chunk(most, context)).mean_s
            if self._step_s > self.limit_s:
                count = largest_chunk(model, self.limit_s, base, context, most)
        if count == left:
            return count
        if count < wanted:
            self.open = False
        return count if count >= MIN_CHUNK_TOKENS or self.limit_s == _INF else 0


def largest_chunk(model: Predictor, limit_s: float, base: StepFeatures, context: int, most: int) -> int:
    """The largest chunk of a prompt that keeps the mean duration of a step within a limit, or a little less than that.

    The duration rises with the chunk, and nearly in a straight line: a few secants find it, else halving does.

    Args:
        limit_s: of the step.
        base: the step without the chunk.
        context: tokens of the prompt in its KV cache.
        most: tokens of the chunk at most.

    Returns:
        Tokens; 0 if none fits.
    """
    high = most
    high_s = model.predict(base.with_chunk(high, context)).mean_s
    if high_s <= limit_s:
        return most
    low, low_s = 0, model.predict(base).mean_s
    if low_s >= limit_s:
        return 0
    trials = 0
    while high - low > 1:
        if trials < _SECANTS:
            middle = low + int((high - low) * (limit_s - low_s) / (high_s - low_s))
            middle = min(max(middle, low + 1), high - 1)
        else:
            middle = (low + high) // 2
        middle_s = model.predict(base.with_chunk(middle, context)).mean_s
        if middle_s <= limit_s:
            low, low_s = middle, middle_s
            if middle_s >= _CLOSE * limit_s:
                return middle
        else:
            high, high_s = middle, middle_s
        trials += 1
    return low


def force(step: Step, order: list[int]) -> None:
    """Compute something where nothing fits the limit, or KV is full of partially prefilled prompts.

    The first that can run gets a small chunk, and the last give way until one can.
    """
    partial = set(step.prompts)
    for slot in order:
        if slot in partial:
            step.extend(slot, MIN_CHUNK_TOKENS)
        elif not step.preempted and step.admissible(slot) is _NONE:
            step.admit(slot, MIN_CHUNK_TOKENS)
        if not step.empty:
            return
    last_first = [slot for slot in reversed(order) if slot in partial]
    while step.empty and len(step.prompts) > 1:
        step.preempt(last_first.pop(0))
        step.extend(last_first[-1], MIN_CHUNK_TOKENS)
