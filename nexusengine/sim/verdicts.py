"""Every outcome as numbers, one row a request in order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nexusengine.arrays import F8, I8, Bools
from nexusengine.errors import ContextTooLong, Overloaded
from nexusengine.sim.cluster import Outcome
from nexusengine.slo.due import judge
from nexusengine.slo.resolve import NONE
from nexusengine.types import Missed, Verdict

_REFUSED = {Overloaded.code, ContextTooLong.code}
_UNFINISHED = {"unfinished", "deadline_exceeded"}


@dataclass(frozen=True, slots=True)
class Table:
    """Outcomes as columns `[N]`.

    Attributes:
        first_s, last_s: timestamps of the client, NaN where there is none; last_s only of those completed.
        output_tokens: that were wanted.
        missed: "" where the SLO was met.
        waited_s: for the first token, or for the end if there was none.
    """

    arrival_s: F8
    prompt_tokens: I8
    output_tokens: I8
    first_s: F8
    last_s: F8
    waited_s: F8
    met: Bools
    strict: Bools
    missed: list[str]
    slo_class: list[str]
    preemptions: I8
    relegated: Bools

    @property
    def ttft_s(self) -> F8:
        return self.first_s - self.arrival_s

    @property
    def e2e_s(self) -> F8:
        return self.last_s - self.arrival_s

    @property
    def tpot_s(self) -> F8:
        """NaN for requests of a single token."""
        after = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return (self.last_s - self.first_s) / after


def refused(outcome: Outcome) -> bool:
    """Whether the server did not take it on."""
    return outcome.error in _REFUSED


def verdict(outcome: Outcome) -> Verdict:
    """Whether the promise of a request was kept. One without a promise is kept when it completes."""
    if outcome.error is not None:
        missed: Missed = "failed"
        if outcome.error in _REFUSED:
            missed = "refused"
        elif outcome.error in _UNFINISHED:
            missed = "unfinished"
        return Verdict(False, False, missed)
    assert outcome.ended is not None
    request = outcome.job.request
    if request.slo is None:
        return Verdict(True, True)
    return judge(
        request.slo,
        arrival_s=request.arrival_s,
        first_token_s=outcome.first_token_s,
        last_token_s=outcome.last_s,
        output_tokens=outcome.ended.output_tokens,
        strict=outcome.ended.strict,
    )


def tabulate(outcomes: Sequence[Outcome], end_s: float) -> Table:
    """end_s: timestamp at which the simulation was over."""
    verdicts = [verdict(o) for o in outcomes]
    arrival_s = np.array([o.job.request.arrival_s for o in outcomes])
    first_s = np.array([o.first_token_s for o in outcomes])
    last_s = np.array([np.nan if o.error is not None else o.last_s for o in outcomes])
    gone_s = np.array([o.last_s if o.last_s == o.last_s else end_s for o in outcomes])
    return Table(
        arrival_s=arrival_s,
        prompt_tokens=np.array([o.job.prompt_tokens for o in outcomes], np.int64),
        output_tokens=np.array([o.job.output_tokens for o in outcomes], np.int64),
        first_s=first_s,
        last_s=last_s,
        waited_s=np.where(np.isnan(first_s), gone_s, first_s) - arrival_s,
        met=np.array([v.met for v in verdicts], np.bool_),
        strict=np.array([v.strict_met for v in verdicts], np.bool_),
        missed=[v.missed or "" for v in verdicts],
        slo_class=[o.job.request.slo_class or NONE for o in outcomes],
        preemptions=np.array([o.ended.preemptions if o.ended else 0 for o in outcomes], np.int64),
        relegated=np.array([o.ended is not None and o.ended.relegated for o in outcomes], np.bool_),
    )


def longest_tenth(prompt_tokens: I8) -> I8:
    """Indices of the tenth of requests with the longest prompts, at least one; of equals the later ones."""
    order = np.argsort(prompt_tokens, kind="stable")
    tenth: I8 = order[len(order) - max(round(len(order) / 10), 1) :]
    return tenth
