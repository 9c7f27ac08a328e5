"""All workers' forecasts as arrays, one row a worker, kept up to date row by row. PURE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8, Bools
from nexusengine.router.placement.forecast import FIELDS, Forecast, Snapshot, forecast, snapshot
from nexusengine.router.placement.policy import PlacementRequest, WorkerView

_FIRST_WIDTH = 96


class Board:
    """due_s `[W, N]`, ahead_s and slack_s `[W, N + 1]`: as in Forecast; behind a row's end due_s and slack_s are
    infinite and ahead_s stays at the sum. The numbers of a forecast are attributes of the same names, `[W]`.

    takes, warming `[W]`: as in WorkerView. shortest `[W]`: whether the engine serves the shortest prompt first.
    longest `[W]`: prompt and output it can hold, infinite if not known.
    """

    def __init__(self) -> None:
        self.views: list[WorkerView | None] = []
        self._snapshots: list[tuple[Any, Any, Snapshot] | None] = []
        self._width = _FIRST_WIDTH
        self._resize(0)

    def update(self, workers: Sequence[WorkerView], now: float) -> None:
        """Renew the rows whose view is another object than before."""
        if len(workers) != len(self.views):
            self._resize(len(workers))
        views = self.views
        for i, view in enumerate(workers):
            if view is not views[i]:
                self._renew(i, view, now)

    def may(self, request: PlacementRequest) -> Bools | None:
        """The workers that may take the request now `[W]`; None if there is none. One that warms up may if all do."""
        may: Bools = self.takes & (self.longest >= request.prompt_tokens + max(request.max_tokens, 1))
        cool = may & ~self.warming
        if cool.any():
            return cool
        return may if may.any() else None

    def position(self, due_s: float, left: F8 | float) -> npt.NDArray[np.intp]:
        """How many prompts of each worker are served before one that is due at due_s, which may be infinite, and has
        `left` tokens to compute `[W]`."""
        if self.shortest.any():
            keys = np.where(self.shortest, left, due_s)[:, None]
            before: npt.NDArray[np.intp] = np.minimum((self.due_s <= keys).sum(axis=1), self.count)
            return before
        if due_s == np.inf:
            return self.count
        position: npt.NDArray[np.intp] = (self.due_s <= due_s).sum(axis=1)
        return position

    def cached_tokens(self, request: PlacementRequest) -> F8 | float:
        """Of the request's prompt, by worker `[W]`, or 0 of them all; one token is always left to compute."""
        if not request.cached_tokens:
            return 0.0
        cached = np.zeros(len(self.views))
        for worker_id, tokens in request.cached_tokens.items():
            if worker_id in self.index:
                cached[self.index[worker_id]] = min(tokens, request.prompt_tokens - 1)
        return cached

    def _renew(self, i: int, view: WorkerView, now: float) -> None:
        known, before = self._snapshots[i], self.views[i]
        if known is None or known[0] is not view.load or known[1] is not view.info:
            known = self._snapshots[i] = (view.load, view.info, snapshot(view, now))
        one = forecast(known[2], view)
        self._write(i, one)
        self.takes[i], self.warming[i] = view.takes, view.warming
        self.shortest[i] = view.info.traits.order == "shortest"
        self.longest[i] = view.info.max_model_len or np.inf
        if before is None or before.worker_id != view.worker_id:
            if before is not None and self.index.get(before.worker_id) == i:
                del self.index[before.worker_id]
            self.index[view.worker_id] = i
        self.views[i] = view

    def _write(self, i: int, one: Forecast) -> None:
        n = len(one.due_s)
        if n > self._width:
            self._width = 2 * n
            views, snapshots = self.views, self._snapshots
            old = (self.due_s, self.ahead_s, self.slack_s)
            self._make_queues(len(views))
            for new, kept in zip((self.due_s, self.ahead_s, self.slack_s), old, strict=True):
                new[:, : kept.shape[1]] = kept
                new[:, kept.shape[1] :] = kept[:, -1:]
            self.views, self._snapshots = views, snapshots
        self.due_s[i, :n], self.due_s[i, n:] = one.due_s, np.inf
        self.ahead_s[i, : n + 1], self.ahead_s[i, n + 1 :] = one.ahead_s, one.ahead_s[-1]
        self.slack_s[i, : n + 1], self.slack_s[i, n + 1 :] = one.slack_s, np.inf
        self.count[i] = n
        self.numbers[:, i] = one.numbers

    def _resize(self, count: int) -> None:
        self.views = [None] * count
        self._snapshots = [None] * count
        self.index: dict[str, int] = {}
        self.rows = np.arange(count)
        self.count = np.zeros(count, np.intp)
        self.takes, self.warming = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        self.shortest = np.zeros(count, np.bool_)
        self.longest = np.full(count, np.inf)
        self.numbers = np.zeros((len(FIELDS), count))
        (
            self.at_s,
            self.per_token_s,
            self.per_pair_s,
            self.first_step_s,
            self.chunk_token_s,
            self.chunk_tokens,
            self.rest_s,
            self.late_s,
            self.decode_s,
            self.per_kv_s,
            self.tightest_tpot_s,
            self.kv_tokens,
            self.kv_capacity,
            self.mean_output,
        ) = self.numbers
        self._make_queues(count)

    def _make_queues(self, count: int) -> None:
        self.due_s = np.full((count, self._width), np.inf)
        self.ahead_s = np.zeros((count, self._width + 1))
        self.slack_s = np.full((count, self._width + 1), np.inf)
