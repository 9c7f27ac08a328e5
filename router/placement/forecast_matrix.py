"""All workers' forecasts as arrays, one row a worker, kept up to date row by row. PURE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8, Bools
from nexusengine.router.placement.alike import Kind, kind_of, models_of
from nexusengine.router.placement.forecast import Estimates, Forecast, Snapshot, forecast, snapshot
from nexusengine.router.placement.policy import PlacementRequest, WorkerView
from nexusengine.wire import PerfSnapshot

_FIRST_WIDTH = 96


class ForecastMatrix:
    """Forecasts of W workers, for queues of up to N prompts.

    Attributes:
        views: the views that the rows were made of.
        forecasts: one a row; None before the first update.
        index: row by worker id.
        rows: `[W]`, 0 to W - 1.
        estimates: `[W]` each, as in Forecast.
        keys: `[W, N]`, as in Forecast; infinite after a row's end.
        ahead_s: `[W, N + 1]`, as in Forecast; after a row's end the sum.
        slack_s: `[W, N + 1]`, as in Forecast; infinite after a row's end.
        count: `[W]`, prompts in each queue.
        accepts, slow_start: `[W]`, as in WorkerView.
        kinds: `[W]`, a number for each kind of worker (see alike.kind_of).
        shortest_first: `[W]`, whether the engine serves the shortest prompt first.
        max_tokens: `[W]`, prompt and output that a sequence can have, infinite if not known.
    """

    def __init__(self) -> None:
        self._width = _FIRST_WIDTH
        self._kinds: dict[Kind, int] = {}
        self._resize(0)

    def update(self, workers: Sequence[WorkerView], now: float) -> None:
        """Renew the rows whose view is another object than before."""
        if len(workers) != len(self.views):
            self._resize(len(workers))
        views = self.views
        changed = [i for i, view in enumerate(workers) if view is not views[i]]
        if changed:
            models = models_of(workers)
            for i in changed:
                self._renew(i, workers[i], models[i], now)

    def eligible(self, request: PlacementRequest) -> Bools | None:
        """The workers that may take the request now `[W]`; None if there is none. One in slow start may if all are."""
        able: Bools = self.accepts & (self.max_tokens >= request.prompt_tokens + max(request.max_tokens, 1))
        settled = able & ~self.slow_start
        if np.count_nonzero(settled):
            return settled
        return able if np.count_nonzero(able) else None

    def position(self, due_s: float, left: F8 | float) -> npt.NDArray[np.intp]:
        """How many prompts of each worker are served before a request.

        Args:
            due_s: timestamp its first token is due, may be infinite.
            left: `[W]`, tokens it has to compute.

        Returns:
            `[W]`.
        """
        if np.count_nonzero(self.shortest_first):
            keys = np.where(self.shortest_first, left, due_s)[:, None]
            before: npt.NDArray[np.intp] = np.minimum((self.keys <= keys).sum(axis=1), self.count)
            return before
        if due_s == np.inf:
            return self.count
        position: npt.NDArray[np.intp] = (self.keys <= due_s).sum(axis=1)
        return position

    def cached_tokens(self, request: PlacementRequest) -> F8 | float:
        """Tokens of the request's prompt in each worker's prefix cache `[W]`, or 0 for all.

        One token is always left to compute.
        """
        if not request.cached_tokens:
            return 0.0
        cached = np.zeros(len(self.views))
        for worker_id, tokens in request.cached_tokens.items():
            if worker_id in self.index:
                cached[self.index[worker_id]] = min(tokens, request.prompt_tokens - 1)
        return cached

    def _renew(self, i: int, view: WorkerView, perf: PerfSnapshot | None, now: float) -> None:
        known, before = self._snapshots[i], self.views[i]
        if known is None or known.load is not view.load or known.info is not view.info or known.perf is not perf:
            known = self._snapshots[i] = snapshot(view, now, perf)
        row = self.forecasts[i] = forecast(known, view)
        self._write(i, row)
        self.accepts[i], self.slow_start[i] = view.accepts, view.slow_start
        self.shortest_first[i] = view.info.traits.order == "shortest"
        self.kinds[i] = self._kinds.setdefault(kind_of(view), len(self._kinds))
        self.max_tokens[i] = view.info.max_model_len or np.inf
        if before is None or before.worker_id != view.worker_id:
            if before is not None and self.index.get(before.worker_id) == i:
                del self.index[before.worker_id]
            self.index[view.worker_id] = i
        self.views[i] = view

    def _write(self, i: int, row: Forecast) -> None:
        n = len(row.keys)
        if n > self._width:
            self._widen(2 * n)
        self.keys[i, :n], self.keys[i, n:] = row.keys, np.inf
        self.ahead_s[i, : n + 1], self.ahead_s[i, n + 1 :] = row.ahead_s, row.ahead_s[-1]
        self.slack_s[i, : n + 1], self.slack_s[i, n + 1 :] = row.slack_s, np.inf
        self.count[i] = n
        self._numbers[:, i] = row.estimates

    def _resize(self, count: int) -> None:
        self.views: list[WorkerView | None] = [None] * count
        self._snapshots: list[Snapshot | None] = [None] * count
        self.forecasts: list[Forecast | None] = [None] * count
        self.index: dict[str, int] = {}
        self.rows = np.arange(count)
        self.count = np.zeros(count, np.intp)
        self.accepts, self.slow_start = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        self.shortest_first = np.zeros(count, np.bool_)
        self.kinds = np.zeros(count, np.intp)
        self.max_tokens = np.full(count, np.inf)
        self._numbers = np.zeros((len(Estimates._fields), count))
        self.estimates: Estimates[F8] = Estimates(*self._numbers)
        self._make_queues(count)

    def _make_queues(self, count: int) -> None:
        self.keys = np.full((count, self._width), np.inf)
        self.ahead_s = np.zeros((count, self._width + 1))
        self.slack_s = np.full((count, self._width + 1), np.inf)

    def _widen(self, width: int) -> None:
        """Make room for queues of `width` prompts."""
        before, keys, ahead_s, slack_s = self._width, self.keys, self.ahead_s, self.slack_s
        self._width = width
        self._make_queues(len(self.views))
        self.keys[:, :before] = keys
        self.ahead_s[:, : before + 1], self.ahead_s[:, before + 1 :] = ahead_s, ahead_s[:, -1:]
        self.slack_s[:, : before + 1] = slack_s
