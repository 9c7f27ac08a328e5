"""What LENS can be told; everything else is a constant beside the rule that uses it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nexusengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LensOptions:
    """`--scheduler lens:NAME=value,...`; the ablations of docs/evaluation.md switch parts off with them.

    Attributes:
        order: 0 serves prompts in order of arrival and relegates nobody.
        limit: 0 limits a step by `budget` tokens instead of by time.
        budget: tokens a step may compute; 0: as many as fit.
        quantile: how far limits are drawn from the predicted mean (0) to its upper bound (1).
        coalescing: steps with prompts are put together until what mixing costs is at most 1 / coalescing of what they
            have beyond the decodes; 0: never.
        goal_long: share of the longest tenth of prompts to serve in time; 0: they are deferred like others.
        share: of the time for prompts that goes to those who wait far beyond their turn.
        shed_s: a relegated request is refused a little before it is older than 3 TTFTs and this; 0: never.
    """

    order: float = 1
    limit: float = 1
    budget: float = 0
    quantile: float = 0
    coalescing: float = 10
    goal_long: float = 0.75
    share: float = 0.03
    shed_s: float = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"lens: {field.name} must be a number >= 0, got {value}", param="scheduler")
