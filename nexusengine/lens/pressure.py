"""Whose KV is taken back when blocks run out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nexusengine.lens.deadlines import Deadlines
from nexusengine.lens.view import EngineView


def victims(view: EngineView, deadlines: Deadlines, now: float) -> Iterator[int]:
    """Running slots in the order in which they give way to decodes that lack a block: those whose promise is lost
    first, then the loosest tpot, prompts before those that generate, the newest. Lazy: sorts only if it is asked."""
    c, running = view.columns, view.running
    first_s = np.fmin(c.first_token_s[running], now)  # now, before there is a first token
    lost = c.relegated[running] | (first_s > deadlines.first_due_s[running])
    order = np.lexsort((-c.arrival_s[running], c.generated_tokens[running] > 0, -deadlines.tpot_s[running], ~lost))
    yield from running[order].tolist()
