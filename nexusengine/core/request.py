"""The state of one request inside the engine core; the core is its only owner."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from nexusengine.scheduler.request import SchedulerRequest
from nexusengine.types import EngineRequest, Timings


@dataclass(slots=True, kw_only=True)
class RequestState(SchedulerRequest):
    """What the core knows of a request beside what the scheduler does.

    Attributes:
        tokens: prompt and output so far, of 32 bits each.
        end_ids: token ids that end it.
        first_token_s: timestamp of its first token.
        serial: its number in the history.
        foreseen_ttft_s: from its arrival to its first token, as predicted when the first step after it was planned;
            None where nothing reliable could be said. predicted_ttft_s: the same, as it is told.
        unattainable: the device surely cannot meet its SLO, as judged when it arrived.
    """

    tokens: array[int]
    end_ids: frozenset[int]
    first_token_s: float | None = None
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
            tokens=array("i", request.prompt_token_ids),
            end_ids=frozenset(sampling.stop_token_ids)
            | frozenset(() if sampling.ignore_eos else request.eos_token_ids),
        )

    @property
    def output_tokens(self) -> int:
        """How many were delivered; the one that ended it counts."""
        return len(self.tokens) - self.prompt_tokens

    def timings(self, finished_s: float | None) -> Timings:
        return Timings(self.request.arrival_s, self.scheduled_s, self.first_token_s, finished_s, self.output_tokens)
