"""In which order prompts are served so that as many first tokens as possible come in time."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8, I4


def by_priority(order: I4, tpot_s: F8, priority: I4) -> I4:
    """`order`, with the places of each class (equal tpot_s) given out anew by priority, highest first. order `[N]`:
    indices into the other two."""
    result = order.copy()
    classes = tpot_s[order]
    for value in np.unique(classes):
        places = np.nonzero(classes == value)[0]
        members = order[places]
        result[places] = members[np.argsort(-priority[members].astype(np.int64), kind="stable")]
    return result
