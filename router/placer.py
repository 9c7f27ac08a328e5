"""Places requests: asks the policy, and enters what it decides in the ledger and at the worker. PURE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from nexusengine.kv.digest import short_hashes
from nexusengine.router.ledger import Entry, Ledger
from nexusengine.router.placement.completion import expected_output
from nexusengine.router.placement.policy import Decision, Hold, Place, PlacementPolicy, PlacementRequest
from nexusengine.router.prefix import PrefixIndex
from nexusengine.router.tenants import ClusterShares
from nexusengine.router.workers import WorkerTable
from nexusengine.types import EngineRequest

MAX_RETRIED = 256
"""Held requests that the policy is asked about at a time."""

BlockHashes = Callable[[EngineRequest, int], Sequence[bytes]]
"""Hashes of the full KV blocks of a request's prompt, for a block size: those that workers give them."""


class Placer:
    """Places requests on workers.

    Args:
        block_hashes: None where no prefix is to be looked up.
    """

    def __init__(
        self,
        policy: PlacementPolicy,
        ledger: Ledger,
        workers: WorkerTable,
        prefixes: PrefixIndex,
        block_hashes: BlockHashes | None,
    ) -> None:
        self._policy, self._ledger, self._workers, self._prefixes = policy, ledger, workers, prefixes
        self._block_hashes = block_hashes if policy.uses_prefixes else None
        self._tenants = ClusterShares()

    @property
    def looks_up_prefixes(self) -> bool:
        """Whether the policy is told what workers hold of a prompt."""
        return self._block_hashes is not None

    def prepare(self, now: float) -> None:
        """Let the policy digest new reports."""
        self._policy.prepare(self._workers.views(self._ledger), now)

    def arrived(self, entry: Entry) -> None:
        """Note that a request came, for the sake of fairness between tenants."""
        self._tenants.arrived(entry.request.tenant)

    def look_at_tenants(self, now: float) -> None:
        """Find anew which tenants have had more than their share."""
        self._tenants.look(self._ledger.entries(), now)

    def any_accepts(self) -> bool:
        """Whether any worker accepts requests now."""
        return any(view.accepts for view in self._workers.views(self._ledger))

    def place(self, entry: Entry, now: float) -> Decision:
        """Ask the policy where a held request goes.

        If to a worker, the entry is dispatched there, and the message is the caller's to send; else it stays held, and
        a refusal is the caller's to answer.
        """
        request, tenant = self._with_cached_tokens(entry), entry.request.tenant
        if self._tenants.over(tenant):
            request = replace(request, over_share=True)
        views = self._workers.views(self._ledger)
        decision = self._policy.place(request, views, now)
        if isinstance(decision, Place):
            worker = self._workers.by_id[decision.worker_id]
            if worker.identity is None:
                raise ValueError(
                    f"policy {self._policy.name!r} placed a request on {decision.worker_id}, which is gone"
                )
            seq, entry.probe = self._workers.dispatched(worker)
            entry.placed_s, entry.first_token_in_s, entry.late = now, decision.first_token_in_s, decision.late
            cached_tokens = entry.placement.cached_tokens.get(decision.worker_id, 0)
            self._ledger.dispatch(entry, worker.identity, seq, cached_tokens)
            if self._tenants.several:
                means = np.array([0.0 if view.load is None else view.load.mean_output_tokens for view in views])
                self._tenants.placed(tenant, request.prompt_tokens, expected_output(request, means))
        return decision

    def first_token(self, entry: Entry, in_time: bool) -> None:
        """Tell the policy, once, what became of a request that was predicted late."""
        if entry.late:
            entry.late = False
            self._policy.observe(in_time)

    def saturated(self, now: float) -> bool:
        """Whether the policy finds that what is late is not worth waiting for."""
        return self._policy.saturated(now)

    def place_held(self, now: float) -> Iterator[tuple[Entry, Decision]]:
        """Try to place the held requests, the first due first, until all others would be held too."""
        for _, entry in zip(range(MAX_RETRIED), self._ledger.held_entries(), strict=False):
            decision = self.place(entry, now)
            yield entry, decision
            if isinstance(decision, Hold) and decision.everyone:
                return

    def _with_cached_tokens(self, entry: Entry) -> PlacementRequest:
        """The request, with what the workers' prefix caches are now believed to hold of its prompt."""
        if self._block_hashes is None or not len(self._prefixes):
            return entry.placement
        cached: dict[str, int] = {}
        for size in self._workers.block_sizes():
            if size not in entry.prefix:
                entry.prefix[size] = short_hashes(self._block_hashes(entry.request, size), size)
            cached |= self._prefixes.shared(entry.prefix[size], size)
        if cached != entry.placement.cached_tokens:
            entry.placement = replace(entry.placement, cached_tokens=cached)
        return entry.placement
