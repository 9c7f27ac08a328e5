"""Prompt chunks into a step, each as large as the step's time limit allows, and newcomers only where those who run can
bear one more."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.inverse import joined
from nexusengine.perf.model import Predictor
from nexusengine.scheduler.lens.prefill_rate import Costs
from nexusengine.scheduler.plan import Reason
from nexusengine.scheduler.step import CHUNK_MAX, Step

_INF = float("inf")
_TRIALS = 4
_CLOSE = 0.98
_FURTHEST = 1.5
_NONE, _WAIT_TIME = Reason.NONE, Reason.WAIT_TIME  # members of an enum are slow to look up


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
    """limit_s: what the mean duration of the step must stay within; inf where only the token budget counts.
    started_s: predicted decode step with everyone who runs started. tightest_tpot_s: of those who run and can still
    keep their promise. seen_tokens: of the largest step so far; none is planned that is much larger, because the model
    knows nothing of it. open: whether time is left."""

    def __init__(
        self,
        step: Step,
        limit_s: float,
        started_s: float,
        costs: Costs,
        tightest_tpot_s: float,
        seen_tokens: int,
        rules: ChunkRules,
    ) -> None:
        self.step, self.limit_s, self.rules = step, limit_s, rules
        self.open = True
        self._costs, self._decode_s, self._tightest_tpot_s = costs, started_s, tightest_tpot_s
        self._largest = int(_FURTHEST * seen_tokens) if limit_s < _INF else step.view.max_batch_tokens

    def go_on(self, slot: int, context: int, left: int, at_most: int = CHUNK_MAX) -> int:
        """The next chunk of a prompt that has begun; its tokens."""
        count = self._chunk(context, left, at_most)
        if count:
            return self.step.extend(slot, count)
        self.step.reasons[slot] = _WAIT_TIME
        return 0

    def start(self, slot: int, context: int, left: int, tpot_s: float, at_most: int = CHUNK_MAX) -> Reason:
        """The first chunk of a newcomer; NONE, or why it gets none. tpot_s: its promise; inf if it is lost."""
        step, costs = self.step, self._costs
        reason = step.admissible(slot)
        if reason is not _NONE:
            return reason
        tightest_s = min(self._tightest_tpot_s, tpot_s)
        decode_s = self._decode_s + costs.sequence_s + costs.kv_token_s * (context + left)
        if decode_s > self.rules.admit * tightest_s and step.seats < step.view.max_running:
            return Reason.WAIT_TPOT
        count = self._chunk(context, left, at_most)
        if not count:
            return _WAIT_TIME
        step.admit(slot, count)
        self._decode_s, self._tightest_tpot_s = decode_s, tightest_s
        return _NONE

    def _chunk(self, context: int, left: int, at_most: int) -> int:
        """Tokens that fit into what is left of the step; where they are less than wanted, the step is full."""
        step, rules = self.step, self.rules
        wanted = min(left, rules.most, at_most)
        count = most = min(wanted, step.tokens, self._largest - step.taken)
        if most > 0 and self.limit_s < _INF:
            count = largest_chunk(step.view.model, self.limit_s, step.features, context, most)
        if count == left:
            return count
        if count < wanted:
            self.open = False
        if rules.tile and count > rules.tile:
            count -= count % rules.tile
        return count if count >= rules.crumb else 0


def largest_chunk(model: Predictor, limit_s: float, base: StepFeatures, context: int, most: int) -> int:
    """The largest chunk, up to `most` tokens, of a prompt with `context` tokens in its KV cache that keeps the mean
    duration of the step `base` within limit_s, or a little less than that; 0 if none.

    The duration rises with the chunk, and nearly in a straight line: a few secants find it, else halving does.
    """
    high = most
    high_s = model.predict(joined(base, high, context)).mean_s
    if high_s <= limit_s:
        return most
    low, low_s = 0, model.predict(base).mean_s
    if low_s >= limit_s:
        return 0
    trials = 0
    while high - low > 1:
        if trials < _TRIALS:
            middle = low + int((high - low) * (limit_s - low_s) / (high_s - low_s))
            middle = min(max(middle, low + 1), high - 1)
        else:
            middle = (low + high) // 2
        middle_s = model.predict(joined(base, middle, context)).mean_s
        if middle_s <= limit_s:
            low, low_s = middle, middle_s
            if middle_s >= _CLOSE * limit_s:
                return middle
        else:
            high, high_s = middle, middle_s
        trials += 1
    return low
