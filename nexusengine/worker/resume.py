"""A worker's step-time model when it begins to serve: calibrated, and with what the last one like it had learned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from nexusengine.obs.logs import get_logger
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import Prior
from nexusengine.worker.model_store import Remembered

Measured = tuple[StepFeatures, float]
_COUNTS_FOR = 16.0
"""Steps of each kind for which a model of just now counts; 16 new ones weigh as much."""
_AGREES, _LIKE, _MOST_UNLIKE = math.log(3.0), math.log(2.0), 0.2
log = get_logger("step times")


def resumed(remembered: Remembered, prior: Prior, measured: Sequence[Measured]) -> OnlineModel | None:
    """The model that goes on from what is remembered and has observed what calibration measured.

    It is believed if calibration took as long as it says within a factor of 3 at the median, since neighbours may have
    come or gone, and if of the single steps no more than a fifth are off by another factor of two. It is then made as
    slow as calibration was.

    Args:
        measured: steps of calibration with their seconds; none: it is believed unseen.

    Returns:
        None if it is not believed, which is logged.
    """
    model, steps = OnlineModel(prior), _COUNTS_FOR * remembered.freshness
    try:
        model.resume(remembered.state, steps)
        if measured:
            off = [math.log(seconds / model.predict(features).mean_s) for features, seconds in measured]
            middle = statistics.median(off)
            unlike = sum(abs(one - middle) > _LIKE for one in off) / len(off)
            if abs(middle) > _AGREES or unlike > _MOST_UNLIKE:
                raise ValueError(
                    f"calibration took {math.exp(middle):.2f} times as long as it says, {unlike:.0%} of steps far off"
                )
            model.resume(remembered.state, steps, slower=math.exp(middle))
    except ValueError as error:
        log.info("what was kept of step times is not used: %s", error)
        return None
    for features, seconds in measured:
        model.observe(features, seconds)
    return model
