"""Options of `sim`, `plan` and `bench serve` that a recorded trace answers where they are not given."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexusengine.sim.workload.recording import Recording

TRACE_HELP = (
    "CSV or JSONL, gzipped or not, or lengths:input=DIST,output=DIST; or the files that serve --record-trace wrote"
)
_LEAST_TIMEOUT_S, _LONGEST_PERIOD_S = 1.0, 4.0  # of a simulation; servers allow a little more


def trace_of(words: Sequence[str]) -> str | tuple[str, ...]:
    """The trace that `--trace` names: several are the files of a recording."""
    return words[0] if len(words) == 1 else tuple(words)


def recording_of(trace: str | tuple[str, ...]) -> Recording | None:
    """What a server of ours recorded; None for any other trace. Raises ConfigError."""
    from nexusengine.sim.workload.lengths import PREFIX
    from nexusengine.sim.workload.recording import is_recording, read_recording

    paths = (trace,) if isinstance(trace, str) else trace
    if paths[0].startswith(PREFIX) or not all(map(is_recording, paths)):
        return None
    return read_recording(paths)


def fill(args: argparse.Namespace, recording: Recording | None, usual: Mapping[str, Any]) -> None:
    """Give every option of `usual` that was not given the value that was recorded, else its usual one."""
    known = {} if recording is None else _recorded(recording)
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, known.get(name, value))


def _recorded(recording: Recording) -> dict[str, Any]:
    from nexusengine.sim.cluster import HOPS
    from nexusengine.sim.this import host_s, link_delay_s

    server, workers = recording.server, recording.workers
    known: dict[str, Any] = {
        "classes": "recorded",
        "stated_limit": "recorded",
        "devices": "this",
        "model": _model_of(recording),
        "engine": server.scheduler,
        "router": server.router,
        "perf": server.performance_model,
        "prefix_caching": server.prefix_caching,
        "max_batch_tokens": server.max_batch_tokens,
        "max_running": server.max_running,
        "max_waiting": server.max_waiting,
        "snapshot_period": min(server.snapshot_period, _LONGEST_PERIOD_S),
        "request_timeout": max(server.request_timeout, _LEAST_TIMEOUT_S),
        "scheduler_cost": f"{host_s(recording):.9f}",
        "link_delay": link_delay_s(recording, HOPS),
    }
    if workers:
        known["block_size"] = min(w.block_tokens for w in workers)
        known["max_model_len"] = max(w.max_model_len for w in workers)
    return known


def _model_of(recording: Recording) -> str:
    """Of the profiles of other devices: that of the emulated ones, else the one whose name is in the served name."""
    from nexusengine.profiles.geometry import DEFAULT_MODEL, MODELS

    for worker in recording.workers:
        if worker.device.startswith("emulated:"):
            return worker.device.partition("/")[2] or DEFAULT_MODEL
    served = recording.server.model.rpartition("/")[2].lower()
    return max((name for name in MODELS if name in served), key=len, default=served)
