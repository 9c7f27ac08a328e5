"""The state of one request inside the engine core; the core is its only owner."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nexusengine.types import EngineRequest, Timings


@dataclass(slots=True)
class RequestState:
    """tokens[:known] are prompt and output so far; hashes name its full blocks as far as they are known.

    pending: tokens that steps in flight sample; they are not in `tokens` yet."""

    request: EngineRequest
    slot: int
    tokens: npt.NDArray[np.int32]
    known: int
    max_tokens: int
    end_ids: frozenset[int]
    hashes: list[bytes] = field(default_factory=list)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    output_tokens: int = 0
    pending: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    serial: int = 0
    predicted_ttft_s: float = 0.0
    unattainable: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def append(self, token_id: int) -> None:
        if self.known == len(self.tokens):
            grown = np.empty(min(2 * self.known, self.prompt_tokens + self.max_tokens), np.int32)
            grown[: self.known] = self.tokens
            self.tokens = grown
        self.tokens[self.known] = token_id
        self.known += 1

    def timings(self, finished_s: float | None) -> Timings:
        return Timings(self.request.arrival_s, self.scheduled_s, self.first_token_s, finished_s, self.output_tokens)
