"""Requests without an SLO, simulated: does LENS cost anything beside FCFS with 2,048 tokens a step?

    python -m benchmarks.no_slo [--profiles h100,rtxpro6000,FILE.json] [--loads 0.3,...] [--seeds 1-2] [--json FILE]

One engine of each profile, loads in shares of its capacity, which is what FCFS serves a second of a queue that stands
from the beginning. Above 1 the queue grows to the end of arrivals, and is then worked off. Both policies serve the same
requests on steps that scatter alike. The table shows LENS over FCFS: tokens a second from the first arrival to the last
token, and percentiles of TTFT and TPOT. The default profiles hold one recorded on one core of a CPU (SmolLM2-135M).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.registry import load_profile
from nexusengine.scheduler.registry import make_policy
from nexusengine.sim.alone import serve_alone
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.job import Job
from nexusengine.sim.models import make_sim_model
from nexusengine.sim.workload.build import Builder, WorkloadSpec

CPU = str(Path(__file__).parent / "data" / "cpu1_smollm2-135m.json")
LENGTHS = {
    False: "lengths:input=logn:700:2500,output=logn:150:400",
    True: "lengths:input=logn:100:400,output=logn:24:64",
}
"""Of requests; True: for profiles of the user's own, which are recorded on slow devices with small models."""
BUDGET = 2048
LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5)
FIGURES = ("tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")


def jobs_of(lengths: str, rate_rps: float, count: int, seed: int, arrivals: str) -> list[Job]:
    """About `count` requests without an SLO."""
    spec = WorkloadSpec(
        trace=lengths, arrivals=arrivals, rate_rps=rate_rps, duration_s=count / rate_rps, max_tokens=8192, seed=seed
    )
    jobs = Builder(spec).build().jobs
    return [replace(job, request=replace(job.request, slo=None, slo_class=None)) for job in jobs]


def serve(profile: DeviceProfile, policy: str, jobs: Sequence[Job], seed: int, kv_tokens: int | None) -> SimEngine:
    """An engine that has served all of `jobs`."""
    settings = EngineSettings(max_waiting=len(jobs), max_batch_tokens=BUDGET, kv_tokens=kv_tokens)
    engine = SimEngine(
        profile,
        make_policy(policy),
        make_sim_model("online", profile),
        settings,
        max_model_len=16_384,
        rng=np.random.default_rng(seed),
    )
    return serve_alone(engine, jobs)


def figures(engine: SimEngine) -> dict[str, float]:
    ended = engine.ended
    arrival_s = np.array([e.job.request.arrival_s for e in ended])
    first_s = np.array([e.first_token_s for e in ended])
    last_s = np.array([e.ended_s for e in ended])
    tokens = np.array([e.output_tokens for e in ended])
    several = tokens > 1
    tpot_s = (last_s - first_s)[several] / (tokens[several] - 1)
    ttft_s = first_s - arrival_s
    return {
        "tokens_per_s": float(tokens.sum() / (last_s.max() - arrival_s.min())),
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "tpot_p50_s": float(np.percentile(tpot_s, 50)),
        "tpot_p99_s": float(np.percentile(tpot_s, 99)),
        "steps": float(engine.stats.steps),
        "preemptions": float(engine.stats.preemptions),
    }


def capacity_rps(profile: DeviceProfile, lengths: str, count: int) -> float:
    jobs = jobs_of(lengths, 1e3, count, 0, "poisson")
    engine = serve(profile, f"fcfs:budget={BUDGET}", jobs, 0, None)
    return len(jobs) / max(e.ended_s for e in engine.ended)


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    profile, rows = load_profile(name), []
    lengths = args.lengths or LENGTHS[name.endswith(".json")]
    capacity = capacity_rps(profile, lengths, args.requests)
    for load in args.loads:
        by_policy: dict[str, dict[str, float]] = {}
        for policy in (args.policy, f"fcfs:budget={BUDGET}"):
            found = []
            for seed in args.seeds:
                jobs = jobs_of(lengths, load * capacity, args.requests, seed, args.arrivals)
                found.append(figures(serve(profile, policy, jobs, seed, args.kv_tokens)))
            by_policy[policy] = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        lens, fcfs = by_policy.values()
        ratios = {key: lens[key] / fcfs[key] for key in FIGURES}
        rows.append({"profile": Path(name).stem, "load": load, "capacity_rps": capacity, "ratios": ratios} | by_policy)
        cells = "  ".join(f"{ratios[key]:10.3f}" for key in FIGURES)
        print(f"{Path(name).stem:20} {load:5.2f}  {cells}", flush=True)
    return rows


def numbers(text: str) -> tuple[int, ...]:
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=lambda text: text.split(","), default=["h100", "rtxpro6000", CPU])
    parser.add_argument("--loads", type=lambda text: [float(x) for x in text.split(",")], default=list(LOADS))
    parser.add_argument("--policy", default="lens", help="compared with fcfs:budget=2048")
    parser.add_argument("--lengths", help="of requests, as of bench serve; default by profile")
    parser.add_argument("--arrivals", default="poisson", help="or gamma:CV")
    parser.add_argument("--requests", type=int, default=600, help="in a run, about")
    parser.add_argument("--kv-tokens", type=int, help="KV capacity, to see what happens where it is short")
    parser.add_argument("--seeds", type=numbers, default=(1, 2), help="FIRST-LAST")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{'LENS over FCFS':20} {'load':>5}  " + "  ".join(f"{key:>10}" for key in FIGURES))
    rows = [row for name in args.profiles for row in compare(name, args)]
    shares = [abs(row["ratios"][key] - 1.0) for row in rows for key in FIGURES]
    print(f"furthest from 1: {100 * max(shares):.1f} %")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
