"""The state of one request inside the engine core; the core is its only owner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import I4
from nexusengine.scheduler.request import SchedulerRequest
from nexusengine.types import EngineRequest, Timings


@dataclass(slots=True, kw_only=True)
class RequestState(SchedulerRequest):
    """What the core knows of a request beside what the scheduler does.

    Attributes:
        tokens, known: `tokens[:known]` are prompt and output so far.
        end_ids: token ids that end it.
        first_token_s: timestamp of its first token.
        output_tokens: how many were delivered.
        pending: tokens that steps in flight sample; they are not in `tokens` yet.
        serial: its number in the history.
        foreseen_ttft_s: from its arrival to its first token, as predicted when the first step after it was planned;
            None where nothing reliable could be said. predicted_ttft_s: the same, as it is told.
        unattainable: the device surely cannot meet its SLO, as judged when it arrived.
    """

    tokens: I4
    known: int
    end_ids: frozenset[int]
    first_token_s: float | None = None
    output_tokens: int = 0
    pending: int = 0
    serial: int = 0
    foreseen_ttft_s: float | None = None
    predicted_ttft_s: float | None = None
    unattainable: bool = False

    @classmethod
    def of(cls, request: EngineRequest, max_tokens: int) -> RequestState:
        """Of a request that has just arrived."""
        sampling = request.sampling
        return cls(
            request=request,
            max_tokens=max_tokens,
            tokens=np.array(request.prompt_token_ids, np.int32),
            known=len(request.prompt_token_ids),
            end_ids=frozenset(sampling.stop_token_ids)
            | frozenset(() if sampling.ignore_eos else request.eos_token_ids),
        )

    def append(self, token_id: int) -> None:
        if self.known == len(self.tokens):
            grown = np.empty(min(2 * self.known, self.prompt_tokens + self.max_tokens), np.int32)
            grown[: self.known] = self.tokens
            self.tokens = grown
        self.tokens[self.known] = token_id
        self.known += 1

    def timings(self, finished_s: float | None) -> Timings:
        return Timings(self.request.arrival_s, self.scheduled_s, self.first_token_s, finished_s, self.output_tokens)
