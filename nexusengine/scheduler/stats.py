"""Counters of an engine core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nexusengine.types import FinishReason

_SLOW = 1.6


@dataclass(slots=True)
class CoreStats:
    """Since the core was made, except for the first four, which are of now. Seconds, tokens, counts.

    scheduler_s: spent in the core outside the executor: planning, KV accounting, batch building, applying.
    prediction_error: running mean of |predicted - measured| / measured; prediction_bias: of the same with its sign;
    coverage: of measured <= upper bound. slow_steps: took more than 1.6 times what was predicted.
    lengths_told, lengths_within: answers that ended of which a length was expected, and those of them that were no
    longer than that (nine of ten, see scheduler.output_lengths).
    predicted_s, host_s: what the steps were predicted to take, and the time from the end of a step to the beginning of
    the next in a core that had work all the time: planning, bookkeeping, messages.
    plan_shortfalls: rows a plan held that found no KV blocks (its estimate of the prefix cache was stale).
    """

    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    plan_shortfalls: int = 0
    kv_evictions: int = 0
    finished_stop: int = 0
    finished_length: int = 0
    finished_abort: int = 0
    finished_error: int = 0
    scheduler_s: float = 0.0
    device_s: float = 0.0
    predicted_s: float = 0.0
    host_s: float = 0.0
    prediction_error: float = 0.0
    prediction_bias: float = 0.0
    coverage: float = 0.0
    slow_steps: int = 0
    lengths_told: int = 0
    lengths_within: int = 0

    def counters(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in self.__slots__}

    def stepped(self, tokens: int, predicted_s: float, upper_s: float, device_s: float) -> None:
        """A step has ended."""
        self.steps += 1
        self.computed_tokens += tokens
        self.device_s += device_s
        self.predicted_s += predicted_s
        self.learn_prediction(predicted_s, upper_s, device_s)

    def finished(self, reason: FinishReason) -> None:
        """A request has ended."""
        name = f"finished_{reason}"
        setattr(self, name, getattr(self, name) + 1)

    def learn_length(self, expected_tokens: float, output_tokens: int) -> None:
        """An answer has ended. expected_tokens: NaN if nothing was expected."""
        if not math.isnan(expected_tokens):
            self.lengths_told += 1
            self.lengths_within += output_tokens <= expected_tokens

    def learn_prediction(self, predicted_s: float, upper_s: float, measured_s: float) -> None:
        """Running means over about the last 200 steps, plain means before."""
        weight = 1.0 / min(self.steps, 200)
        error = (predicted_s - measured_s) / max(measured_s, 1e-9)
        self.prediction_error += weight * (abs(error) - self.prediction_error)
        self.prediction_bias += weight * (error - self.prediction_bias)
        self.slow_steps += measured_s > _SLOW * predicted_s
        self.coverage += weight * (float(measured_s <= upper_s) - self.coverage)
