"""Plans of LENS, for tests: made for a view, and read as tokens by slot."""

from __future__ import annotations

from nexusengine.scheduler.lens.policy import Lens
from nexusengine.scheduler.plan import StepPlan
from nexusengine.scheduler.validate import plan_problem
from nexusengine.scheduler.view import EngineView


def plan(view: EngineView, now: float = 0.0, policy: Lens | None = None, **options: float) -> StepPlan:
    policy = policy or Lens(**options)
    policy._seen_tokens = 8192  # as if large steps had been seen
    result = policy.plan(view, now)
    assert plan_problem(result, view) is None
    return result


def computed(p: StepPlan) -> dict[int, int]:
    return dict(zip(p.slots.tolist(), p.counts.tolist(), strict=True))
