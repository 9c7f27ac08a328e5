"""What one tenant that floods an engine costs the others, and what counting tenants costs when nobody does. Simulated.

    python -m benchmarks.tenants --traces ../shared/traces --json tenants.json [--seeds 1-2] [--devices h100,mixed]

Eight tenants send requests at a share of what the engine, or a cluster behind PRISM, can serve; in `flood` they send
0.7 of it, and a ninth three times as much. Each case runs with tenants named and without (all requests are then one
tenant's): `share` beside `none`. Attainment is that of the eight.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.engine_workloads import DEVELOPMENT, UNSEEN
from nexusengine.scheduler.fairness import OUTPUT_WEIGHT
from nexusengine.sim.api import SimSpec, simulate
from nexusengine.sim.cluster import Outcome
from nexusengine.sim.job import Job
from nexusengine.sim.verdicts import tabulate
from nexusengine.sim.workload.build import Builder, Workload, WorkloadSpec

TENANTS = 8
CLUSTERS = {"mixed": "h100,2xa100,2xl4", "alike": "4xa100"}
"""By their names in benchmarks/cluster.py."""
FLOOD = "flood"
RATES_RPS = {  # near the goodput of LENS (docs/evaluation.md, evaluation-cluster.md), by workload and device
    ("azure", "mixed"): 50.0,
    ("azure", "alike"): 44.0,
    ("azure", "rtxpro6000"): 10.5,
    ("sharegpt", "rtxpro6000"): 23.6,
    ("mixed", "rtxpro6000"): 12.0,
    ("azure", "h100"): 25.4,
    ("sharegpt", "h100"): 48.8,
    ("mixed", "h100"): 28.0,
    ("azure-2", "h100"): 27.5,
    ("azure-2", "rtxpro6000"): 12.1,
    ("mixed-2", "h100"): 28.0,
    ("mixed-2", "rtxpro6000"): 12.0,
}


@dataclass(frozen=True, slots=True)
class Case:
    """shares: of the tenants, the last of which floods if there is one more than TENANTS. load: of the rate above."""

    load: float
    shares: tuple[float, ...]

    @property
    def floods(self) -> bool:
        return len(self.shares) > TENANTS

    @property
    def names(self) -> list[str]:
        return [f"t{i}" for i in range(TENANTS)] + [FLOOD] * self.floods


EVEN = (1.0,) * TENANTS
ZIPF = tuple(1.0 / rank for rank in range(1, TENANTS + 1))
CASES = {
    "even 0.7": Case(0.7, EVEN),
    "even 1.0": Case(1.0, EVEN),
    "even 1.3": Case(1.3, EVEN),
    "zipf 1.0": Case(1.0, ZIPF),
    "zipf 1.3": Case(1.3, ZIPF),
    "flood": Case(0.7 * 4, (*EVEN, 3.0 * TENANTS)),
}


class TenantBuilder(Builder):
    """A workload whose requests belong to tenants, drawn by their shares.

    Args:
        named: whether the engine is told; otherwise only this benchmark knows.
    """

    def __init__(self, spec: WorkloadSpec, case: Case, named: bool, source: Builder | None = None) -> None:
        super().__init__(spec, source.source if source else None)
        self.case, self.named = case, named
        self.tenant_of: dict[str, str] = {}

    def with_spec(self, spec: WorkloadSpec) -> TenantBuilder:
        """See Builder."""
        return TenantBuilder(spec, self.case, self.named, self)

    def build(self) -> Workload:
        """See Builder."""
        workload = super().build()
        shares = np.array(self.case.shares)
        rng = np.random.default_rng(self.spec.seed)
        drawn = rng.choice(len(shares), len(workload.jobs), p=shares / shares.sum()).tolist()
        names = self.case.names
        self.tenant_of = {j.request.request_id: names[t] for j, t in zip(workload.jobs, drawn, strict=True)}
        if not self.named:
            return workload
        return replace(workload, jobs=tuple(self._owned(job) for job in workload.jobs))

    def _owned(self, job: Job) -> Job:
        return replace(job, request=replace(job.request, tenant=self.tenant_of[job.request.request_id]))


def run(
    trace: Path,
    arrivals: str,
    classes: str,
    duration_s: float,
    device: str,
    rate_rps: float,
    seed: int,
    case: Case,
    named: bool,
    engine: str,
) -> dict[str, float]:
    """One simulation: attainment of the tenants that do not flood and of all, and the widest difference in service."""
    spec = SimSpec(
        trace=str(trace), devices=CLUSTERS.get(device, device), engine=engine, rate_rps=rate_rps * case.load,
        duration_s=duration_s, arrivals=arrivals, classes=classes, seed=seed,
    )  # fmt: skip
    result = simulate(spec, builder=TenantBuilder(spec.workload(131_072), case, named))
    builder = result.builder
    assert isinstance(builder, TenantBuilder)
    tenants = np.array([builder.tenant_of[o.job.request.request_id] for o in result.outcomes])
    met = tabulate(result.outcomes, duration_s).met
    mine = tenants != FLOOD
    return {
        "attainment": float(met[mine].mean()),
        "attainment_all": float(met.mean()),
        "service_min_over_max": _evenness(tenants[mine], [o for o, m in zip(result.outcomes, mine, strict=True) if m]),
    }


def _evenness(tenants: npt.NDArray[np.str_], outcomes: list[Outcome]) -> float:
    """Least share of what they asked for that a tenant got in time, over the largest."""
    got: dict[str, float] = {}
    wanted: dict[str, float] = {}
    met = tabulate(outcomes, 0.0).met
    for tenant, outcome, ok in zip(tenants.tolist(), outcomes, met.tolist(), strict=True):
        tokens = outcome.job.prompt_tokens + OUTPUT_WEIGHT * outcome.job.output_tokens
        wanted[tenant] = wanted.get(tenant, 0.0) + tokens
        got[tenant] = got.get(tenant, 0.0) + ok * tokens
    shares = [got[t] / wanted[t] for t in wanted]
    return min(shares) / max(max(shares), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", default="1-2")
    parser.add_argument("--devices", default="rtxpro6000,h100")
    parser.add_argument("--workloads", default="azure,mixed")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--engine", default="lens")
    args = parser.parse_args()
    low, high = (int(word) for word in (args.seeds.split("-") * 2)[:2])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.workloads.split(","):
            workload = (DEVELOPMENT | UNSEEN)[name]
            trace = workload.make(args.traces, Path(folder))
            for device in args.devices.split(","):
                for case_name in args.cases.split(","):
                    for mode in ("none", "share"):
                        figures = [
                            run(trace, "poisson", workload.classes, workload.duration_s, device,
                                RATES_RPS[name, device], seed, CASES[case_name], mode == "share", args.engine)
                            for seed in range(low, high + 1)
                        ]  # fmt: skip
                        row = {key: float(np.mean([f[key] for f in figures])) for key in figures[0]}
                        rows.append({"workload": name, "device": device, "case": case_name, "tenants": mode, **row})
                        print(
                            f"{name:10s} {device:11s} {case_name:9s} {mode:5s}  attainment {row['attainment']:.3f}"
                            f"  of all {row['attainment_all']:.3f}"
                            f"  least/most served {row['service_min_over_max']:.2f}",
                            flush=True,
                        )
    if args.json:
        args.json.write_text(json.dumps({"simulated": True, "seeds": args.seeds, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
