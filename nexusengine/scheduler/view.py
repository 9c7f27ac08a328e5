"""What a scheduler policy sees: requests as columns, KV as numbers, and the performance model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I4, Bools
from nexusengine.perf.model import Predictor
from nexusengine.types import EngineRequest


@dataclass(frozen=True, slots=True)
class RequestColumns:
    """What a policy sees of each request: one column a property, one row a slot `[S]`.

    A slot is a request's row for as long as the worker knows it. The Scheduler owns and writes the columns; to a policy
    they are read-only.

    Attributes:
        arrival_s: monotonic timestamp of arrival at the server.
        prompt_tokens: length of the prompt.
        known_tokens: prompt + generated so far; a row is sampled in the step that computes the last known token.
        computed_tokens: tokens in the KV cache; known - computed == 1 is a decode (or a prompt's last token).
        generated_tokens: output tokens so far.
        max_tokens: output tokens at which it ends.
        blocks: KV blocks it holds.
        cached_tokens: of waiting requests: prompt tokens the prefix cache would serve (an estimate until admitted).
        cached_free_blocks: of waiting requests: how many of those blocks are not in use by others, so come off the free
            list.
        ttft_s, tpot_s, e2e_s: SLO, NaN where there is none.
        expected_tokens: median length of answers like this one (see scheduler.output_lengths); NaN while unknown, and
            without an e2e bound.
        tenant: number of who sent it (see scheduler.fairness).
        first_token_s, last_token_s: monotonic timestamps of the first and of the newest token, NaN before.
        priority: higher goes first within a class; 0 by default.
        relegated: an earlier plan put it after all others.
    """

    arrival_s: F8
    prompt_tokens: I4
    known_tokens: I4
    computed_tokens: I4
    generated_tokens: I4
    max_tokens: I4
    blocks: I4
    cached_tokens: I4
    cached_free_blocks: I4
    ttft_s: F8
    tpot_s: F8
    e2e_s: F8
    expected_tokens: F8
    first_token_s: F8
    last_token_s: F8
    priority: I4
    tenant: I4
    relegated: Bools

    def context_tokens(self, slots: I4) -> I4:
        """Tokens in the KV cache when each of `slots [N]` computes next: its own, or the cached ones."""
        own = self.computed_tokens[slots]
        return np.where(own > 0, own, self.cached_tokens[slots])

    @classmethod
    def empty(cls, slots: int) -> RequestColumns:
        """All-zero columns for `slots` rows."""
        i4 = [np.zeros(slots, np.int32) for _ in range(10)]
        f8 = [np.full(slots, np.nan) for _ in range(7)]
        return cls(
            arrival_s=f8[0],
            prompt_tokens=i4[0],
            known_tokens=i4[1],
            computed_tokens=i4[2],
            generated_tokens=i4[3],
            max_tokens=i4[4],
            blocks=i4[5],
            cached_tokens=i4[6],
            cached_free_blocks=i4[7],
            ttft_s=f8[1],
            tpot_s=f8[2],
            e2e_s=f8[3],
            expected_tokens=f8[4],
            first_token_s=f8[5],
            last_token_s=f8[6],
            priority=i4[8],
            tenant=i4[9],
            relegated=np.zeros(slots, np.bool_),
        )

    def enter(self, slot: int, request: EngineRequest, max_tokens: int) -> None:
        """Write the row of a request that arrives, but for what is learned of it."""
        slo, prompt_tokens = request.slo, len(request.prompt_token_ids)
        self.arrival_s[slot] = request.arrival_s
        self.prompt_tokens[slot] = self.known_tokens[slot] = prompt_tokens
        self.computed_tokens[slot] = self.generated_tokens[slot] = self.blocks[slot] = 0
        self.cached_tokens[slot] = self.cached_free_blocks[slot] = 0
        self.max_tokens[slot] = max_tokens
        self.ttft_s[slot] = slo.ttft_s if slo else np.nan
        self.tpot_s[slot] = slo.tpot_s if slo else np.nan
        self.e2e_s[slot] = slo.e2e_s if slo and slo.e2e_s else np.nan
        self.expected_tokens[slot] = self.first_token_s[slot] = self.last_token_s[slot] = np.nan
        self.priority[slot] = request.priority
        self.tenant[slot] = 0
        self.relegated[slot] = False


@dataclass(frozen=True, slots=True)
class EngineView:
    """The engine at the time of planning. A picture: nothing in it changes while a plan is made.

    Attributes:
        columns: of all requests.
        running: slots that hold KV, in order of admission.
        waiting: slots that do not, preempted ones first, then in order of arrival; a preempted request computes
            everything it knows anew.
        free_blocks, total_blocks: blocks that can be taken now, cached but unused ones included; and all.
        block_size: tokens in a block.
        max_batch_tokens: hard cap on tokens a step (buffers are this large).
        max_running: cap on sequences with KV.
        model: predicts step times.
        arrivals: counter that rises whenever `waiting` gained a request, so that an order can be kept between steps.
        over_share: bool `[S]`, whose tenant has had more than its share while others wait; None: nobody's.
    """

    columns: RequestColumns
    running: I4
    waiting: I4
    free_blocks: int
    total_blocks: int
    block_size: int
    max_batch_tokens: int
    max_running: int
    model: Predictor
    arrivals: int = 0
    over_share: Bools | None = None
