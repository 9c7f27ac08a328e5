"""vLLM's own policy (V1 scheduler, first come first served), for replaying its runs and as a baseline.

Every running request in order of admission, as many tokens as the budget allows; when blocks are lacking the request
admitted last gives way; nobody is admitted in a step that preempted. Then waiting requests in order, each with what is
left of the budget, as long as the whole of what it has to compute finds blocks; the first that does not holds back
those behind it. Other than FCFS here it keeps no blocks back for partially prefilled prompts, nor for decodes to grow
into.
"""

from __future__ import annotations

from nexusengine.errors import ConfigError
from nexusengine.scheduler.baselines.fcfs import by_tokens
from nexusengine.scheduler.plan import Reason, StepPlan
from nexusengine.scheduler.step import CHUNK_MAX, Step
from nexusengine.scheduler.view import EngineView


class Vllm:
    """The schedule of vLLM's V1 engine.

    Args:
        budget: max_num_batched_tokens; default: the engine's max_batch_tokens.
        reserve_full: whether a request is admitted only if blocks for its whole prompt are free
            (scheduler_reserve_full_isl), 1 or 0.
        longest_chunk: long_prefill_token_threshold, 0 for none.
    """

    name = "vllm"

    def __init__(self, budget: float | None = None, reserve_full: float = 1, longest_chunk: float = 0) -> None:
        for key, value, least in (("budget", budget, 1), ("longest_chunk", longest_chunk, 0)):
            if value is not None and (value < least or value != int(value)):
                raise ConfigError(
                    f"{self.name}: {key} must be a whole number of tokens >= {least}, got {value}", param="scheduler"
                )
        self.budget = None if budget is None else int(budget)
        self.traits = by_tokens("arrival", self.budget)
        self.reserve_full = bool(reserve_full)
        self.longest_chunk = int(longest_chunk) or CHUNK_MAX

    def plan(self, view: EngineView, now: float) -> StepPlan:
        del now
        step = Step(view, self.budget)
        step.take_decodes(view.running[::-1].tolist())
        for slot in step.prompts:
            step.extend(slot, self.longest_chunk)
        if step.preempted:
            step.reasons[view.waiting] = Reason.WAIT_BLOCKS
        else:
            self._admit(step, view)
        while step.empty and len(step.prompts) > 1:
            step.preempt(step.prompts[-1])
            step.extend(step.prompts[0], self.longest_chunk)
        return step.plan()

    def _admit(self, step: Step, view: EngineView) -> None:
        for n, slot in enumerate(view.waiting.tolist()):
            reason = self._obstacle(step, slot)
            if reason is not Reason.NONE:
                step.reasons[view.waiting[n:]] = reason
                return
            step.admit(slot, self.longest_chunk)

    def _obstacle(self, step: Step, slot: int) -> Reason:
        if step.free_running_slots < 1:
            return Reason.WAIT_RUNNING_SLOT
        if step.tokens < 1:
            return Reason.WAIT_TOKENS
        at_most = CHUNK_MAX if self.reserve_full else min(step.tokens, self.longest_chunk)
        return Reason.WAIT_BLOCKS if step.blocks_to_start(slot, at_most) > step.free_blocks else Reason.NONE
