"""What planning a step costs on one core, on states taken from simulations under overload.

    python benchmarks/plan_cost.py [--policy lens] [--states 60] [--json FILE]

Every state is a copy of policy, view and performance model at an instant of the simulation with about as many running
and waiting requests as asked for; each is planned anew `--repeats` times. The median and the 99th percentile are over
states, each with its fastest repeat, which leaves out what other processes on the machine take.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.perf.online import OnlineModel
from nexusengine.profiles.registry import load_profile
from nexusengine.scheduler.plan import SchedulerPolicy, StepPlan
from nexusengine.scheduler.registry import make_policy
from nexusengine.scheduler.view import EngineView
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.workload.build import Builder, WorkloadSpec

SIZES = ((32, 32, 25.0), (256, 1000, 50.0))
"""Running, waiting, and requests a second that lead there."""
_SPREAD = 0.2
_APART = 5  # plans between two states


@dataclass
class State:
    policy: SchedulerPolicy
    view: EngineView
    now: float


class Tap:
    """A policy that keeps copies of what it was asked."""

    plans_every_step = True

    def __init__(self, policy: SchedulerPolicy, running: int, waiting: int) -> None:
        self.policy, self.name, self.traits = policy, policy.name, policy.traits
        self.running, self.waiting = running, waiting
        self.states: list[State] = []
        self.calls = 0

    def plan(self, view: EngineView, now: float) -> StepPlan:
        near = abs(len(view.running) - self.running) <= _SPREAD * self.running
        near &= abs(len(view.waiting) - self.waiting) <= _SPREAD * self.waiting
        self.calls += 1
        if near and self.calls % _APART == 0:
            policy, frozen = copy.deepcopy((self.policy, view))
            self.states.append(State(policy, frozen, now))
        return self.policy.plan(view, now)


def states_of(spec: str, running: int, waiting: int, rate_rps: float, count: int) -> list[State]:
    """From an overload that fills the queue, on a device that serves as many as are to run."""
    profile = load_profile("h100")
    tap = Tap(make_policy(spec), running, waiting)
    settings = EngineSettings(max_running=running, max_waiting=2 * waiting, max_batch_tokens=8192)
    engine = SimEngine(profile, tap, OnlineModel(), settings, max_model_len=16_384, rng=np.random.default_rng(1))
    lengths = "lengths:input=logn:700:2500,output=logn:150:400"
    workload = Builder(
        WorkloadSpec(trace=lengths, arrivals="poisson", rate_rps=rate_rps, duration_s=120.0, classes="mixed", seed=1)
    ).build()
    now, until_s, pending = 0.0, None, list(reversed(workload.jobs))
    while (pending or engine.has_work) and len(tap.states) < count:
        next_s = pending[-1].request.arrival_s if pending else float("inf")
        if until_s is not None and until_s < next_s:
            now = until_s
            engine.advance(now)
            until_s = engine.begin(now)
            continue
        now = next_s
        engine.advance(now)
        engine.add(pending.pop(), now)
        until_s = engine.interrupt()
        if until_s is None:
            until_s = engine.begin(now)
    return tap.states


def time_states(states: list[State], repeats: int) -> np.ndarray:
    """Seconds `[states, repeats]`."""
    times = np.zeros((len(states), repeats))
    for i, state in enumerate(states):
        for k in range(repeats):
            policy = copy.deepcopy(state.policy)
            view = replace(state.view)
            began_s = time.perf_counter()
            policy.plan(view, state.now)
            times[i, k] = time.perf_counter() - began_s
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["lens", "fcfs"])
    parser.add_argument("--states", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(
        f"{'policy':16} {'running':>8} {'waiting':>8} {'states':>7} {'median us':>10} {'p99 us':>8} {'all, median':>12}"
    )
    for spec in args.policy:
        for running, waiting, rate_rps in SIZES:
            states = states_of(spec, running, waiting, rate_rps, args.states)
            if not states:
                print(f"{spec:16} {running:8} {waiting:8}: the simulation never came near")
                continue
            times = time_states(states, args.repeats)
            fastest = times.min(axis=1)
            row = {
                "policy": spec,
                "running": float(np.mean([len(s.view.running) for s in states])),
                "waiting": float(np.mean([len(s.view.waiting) for s in states])),
                "states": len(states),
                "median_us": 1e6 * float(np.median(fastest)),
                "p99_us": 1e6 * float(np.percentile(fastest, 99)),
                "median_of_all_us": 1e6 * float(np.median(times)),
            }
            results.append(row)
            print(
                f"{spec:16} {row['running']:8.0f} {row['waiting']:8.0f} {row['states']:7} {row['median_us']:10.0f} "
                f"{row['p99_us']:8.0f} {row['median_of_all_us']:12.0f}"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
