"""One engine: LENS beside the baselines, simulated on measured profiles, with equal tuning for all.

    python -m benchmarks.engine --traces ../shared/traces --json engine.json [--devices rtxpro6000,h100]
        [--workloads azure,long,...] [--stages tune,goodput,...] [--seeds 101-103] [--jobs 2] [--plots DIR]

Stages, each using what those before it found: `tune` (token budgets of the static policies, on development seeds and
workloads' first halves), `goodput` (at >= 90 % attainment and >= 75 % of the longest tenth), `curve` (attainment
against rate), `overload` (1.3 times the goodput of the best static policy), `light` (half of it), `wait` (1.2 and 2
times LENS' own goodput), `ablation`. Each result is written to the JSON file as soon as it is known, and a run that is
started again goes on where it was ended. Development was done on seeds 1-5 and on the workloads of DEVELOPMENT;
figures that are reported as unseen come from seeds from 101 on and from the other workloads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine_workloads import DEVELOPMENT, WORKLOADS
from nexusengine.sim.api import SimResult, SimSpec, simulate
from nexusengine.sim.goodput import goodput
from nexusengine.sim.verdicts import tabulate

MAX_BATCH_TOKENS = 8192

STATIC: dict[str, tuple[str, ...]] = {
    "fcfs": tuple(f"fcfs:budget={b}" for b in (512, 1024, 2048, 8192)),
    "vllm": tuple(f"vllm:budget={b}" for b in (512, 1024, 2048, 8192)),
    "prefill-first": tuple(f"prefill-first:budget={b}" for b in (2048, 8192)),
}
"""Policies that know neither promises nor step times; chunked prefill with a budget of 512 is Sarathi's."""
ORDERED: dict[str, tuple[str, ...]] = {
    "edf": tuple(f"edf:budget={b},relegate=1" for b in (512, 2048)),
    "srpt": tuple(f"srpt:budget={b}" for b in (512, 2048)),
}
ABLATIONS: dict[str, tuple[str, str]] = {
    "lens": ("lens", "online"),
    "step limit only": ("lens:order=0", "online"),
    "order only": ("lens:limit=0,budget={budget}", "online"),
    "no coalescing": ("lens:coalescing=0", "online"),
    "upper bounds": ("lens:quantile=1", "online"),
    "no length guard": ("lens:goal_long=0", "online"),
    "no share": ("lens:share=0", "online"),
    "oracle model": ("lens", "oracle"),
    "model 30 % short": ("lens", "scaled:0.7"),
    "model 30 % long": ("lens", "scaled:1.3"),
}
"""Engine policy and performance model; {budget}: the best budget of fcfs."""
CURVE = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6)
KEPT = (
    "offered",
    "attainment",
    "attainment_strict",
    "attainment_longest_decile",
    "attainment_by_prompt_decile",
    "attainment_by_class",
    "attainment_token_weighted",
    "ttft_ms",
    "tpot_ms",
    "worst_wait_s",
    "worst_wait_s_relegated",
    "preemptions",
    "relegated",
    "refused",
    "missed",
    "scheduler_ms_p50",
)


# ---- one task -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """key: of its result in the JSON file. rate_rps: of single simulations; None: search for the goodput from
    first_rate_rps by `growth`, see sim.goodput."""

    key: tuple[str, ...]
    spec: SimSpec
    seeds: tuple[int, ...]
    rate_rps: float | None
    precision: float = 0.02
    first_rate_rps: float = 1.0
    growth: float = 2.0


def run(task: Task) -> dict[str, Any]:
    if task.rate_rps is None:
        found = goodput(
            task.spec,
            seeds=task.seeds,
            precision=task.precision,
            first_rate_rps=task.first_rate_rps,
            growth=task.growth,
        )
        return {"goodput_rps": found.rate_rps, "tried": len(found.tried), "seeds": list(task.seeds)}
    done = [simulate(replace(task.spec, rate_rps=task.rate_rps, seed=seed)) for seed in task.seeds]
    runs = [d.metrics for d in done]
    result: dict[str, Any] = {"rate_rps": task.rate_rps, "seeds": list(task.seeds)}
    for name in KEPT:
        values = [m[name] for m in runs]
        result[name] = values if isinstance(values[0], dict | list) else float(np.mean([v or 0.0 for v in values]))
    result["worst_wait_s"] = max(m["worst_wait_s"] for m in runs)
    result["worst_wait_of_bound"] = max(_wait_of_bound(d) for d in done)
    return result


def _wait_of_bound(result: SimResult) -> float:
    """The longest wait of a relegated request, for its first token or its end, as a share of 3 TTFTs and 60 s."""
    outcomes = result.outcomes
    rows = tabulate(outcomes, float(np.nanmax([o.last_s for o in outcomes])))
    bounds_s = np.array([3.0 * slo.ttft_s + 60.0 if (slo := o.job.request.slo) else np.inf for o in outcomes])
    return float((rows.waited_s / bounds_s)[rows.relegated].max(initial=0.0))


# ---- stages -------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
        self._paths: dict[str, Path] = {}

    def spec(self, device: str, workload: str, engine: str, perf: str = "online") -> SimSpec:
        w = WORKLOADS[workload]
        if workload not in self._paths:
            self._paths[workload] = w.make(self.args.traces, self.folder)
        return SimSpec(
            trace=str(self._paths[workload]),
            devices=device,
            arrivals=w.arrivals,
            classes=w.classes,
            duration_s=self.args.duration or w.duration_s,
            engine=engine,
            perf=perf,
            max_batch_tokens=MAX_BATCH_TOKENS,
        )

    def found(self, *key: str) -> Any:
        return self.results.get("|".join(key))

    def do(self, tasks: list[Task]) -> None:
        """Those whose result is not known yet."""
        missing = [t for t in tasks if self.found(*t.key) is None]
        if self.args.jobs > 1:
            with ProcessPoolExecutor(self.args.jobs) as pool:
                for task, result in zip(missing, pool.map(run, missing), strict=True):
                    self._keep(task, result)
        else:
            for task in missing:
                self._keep(task, run(task))

    def _keep(self, task: Task, result: dict[str, Any]) -> None:
        self.results["|".join(task.key)] = result
        text = json.dumps(self.results, indent=0)
        self.args.json.write_text(text + "\n")
        short = {k: v for k, v in result.items() if isinstance(v, int | float)}
        print("|".join(task.key), {k: float(f"{v:.4g}") for k, v in short.items()}, flush=True)

    def _search(
        self,
        stage: str,
        device: str,
        workload: str,
        engine: str,
        seeds: tuple[int, ...],
        guess_rps: float,
        growth: float,
        precision: float,
    ) -> Task:
        spec = self.spec(device, workload, engine)
        return Task((stage, device, workload, engine), spec, seeds, None, precision, guess_rps, growth)

    def tuned(self, device: str, workload: str, family: str) -> str:
        """The options with the highest goodput; of equals the first."""
        specs = {**STATIC, **ORDERED}[family]
        rates = {s: (self.found("tune", device, workload, s) or {}).get("goodput_rps", 0.0) for s in specs}
        return max(rates, key=lambda s: rates[s])

    def best_static(self, device: str, workload: str) -> tuple[str, float]:
        """The best of the static families at its tuned budget, and its goodput."""
        rates = {}
        for family in STATIC:
            spec = self.tuned(device, workload, family)
            rates[spec] = self.found("goodput", device, workload, spec)["goodput_rps"]
        best = max(rates, key=lambda s: rates[s])
        return best, rates[best]

    def policies(self, device: str, workload: str) -> list[str]:
        return [*(self.tuned(device, workload, f) for f in (*STATIC, *ORDERED)), "paper-lens", "lens"]

    def stage(self, name: str, device: str, workload: str) -> list[Task]:
        args = self.args

        def at(label: str, engine: str, rate_rps: float, perf: str = "online") -> Task:
            spec = self.spec(device, workload, engine, perf)
            return Task((name, device, workload, label), spec, args.seeds, rate_rps)

        if name == "tune":
            return [
                self._search(name, device, workload, s, args.tune_seeds, WORKLOADS[workload].guess_rps, 1.5, 0.05)
                for specs in (STATIC | ORDERED).values()
                for s in specs
            ]
        if name == "goodput":
            tuned = {s: self.found("tune", device, workload, s) for s in self.policies(device, workload)}
            rates = {s: t["goodput_rps"] for s, t in tuned.items() if t}
            other = max(*rates.values(), WORKLOADS[workload].guess_rps / 10)
            return [
                self._search(name, device, workload, s, args.seeds, rates.get(s) or other, 1.1, 0.02) for s in tuned
            ]
        best, rate_rps = self.best_static(device, workload)
        if not rate_rps and name in ("overload", "light", "curve"):
            return []  # these are at shares of the goodput of a policy that reaches it at no rate
        lens_rps = self.found("goodput", device, workload, "lens")["goodput_rps"]
        budget = self.tuned(device, workload, "fcfs").partition("budget=")[2]
        if name == "overload":
            return [at(s, s, 1.3 * rate_rps) for s in self.policies(device, workload)]
        if name == "light":
            return [
                at(f"{s}@0.5", s, 0.5 * rate_rps)
                for s in dict.fromkeys((self.tuned(device, workload, "fcfs"), "fcfs:budget=2048", "lens"))
            ]
        if name == "wait":
            return [at(f"lens@{part}", "lens", part * lens_rps) for part in (1.2, 2.0)]
        if name == "curve":
            chosen = dict.fromkeys((best, self.tuned(device, workload, "srpt"), "paper-lens", "lens"))
            return [at(f"{s}@{part}", s, part * rate_rps) for s in chosen for part in CURVE]
        if name == "ablation":
            return [at(label, spec.format(budget=budget), lens_rps, perf) for label, (spec, perf) in ABLATIONS.items()]
        raise SystemExit(f"unknown stage {name!r}")


STAGES = ("tune", "goodput", "overload", "light", "wait", "curve", "ablation")


# ---- tables and plots ---------------------------------------------------------------------------------------------


def tables(bench: Bench) -> None:
    cases = [(d, w) for d in bench.args.devices for w in bench.args.workloads]
    known = [c for c in cases if bench.found("goodput", *c, "lens")]
    print("\nGoodput, requests/s")
    ratios = []
    for device, workload in known:
        best, rate = bench.best_static(device, workload)
        rates = {
            s: bench.found("goodput", device, workload, s)["goodput_rps"] for s in bench.policies(device, workload)
        }
        ratios.append(rates["lens"] / rate if rate else np.inf)
        others = ", ".join(f"{s} {r:.3g}" for s, r in rates.items() if s not in ("lens", best))
        print(f"{device:11} {workload:14} lens {rates['lens']:6.2f}  {best} {rate:.2f}  {ratios[-1]:.2f}x  ({others})")
    finite = [r for r in ratios if r < np.inf]
    if finite:
        print(f"mean of {len(finite)}: {np.mean(finite):.2f}x, least {min(finite):.2f}x")
    _overload_table(bench, known)
    _light_table(bench, known)
    print(
        "\nWorst wait, seconds (of a relegated request, as a share of 3 TTFTs + 60 s), at 1.2 and 2 times LENS' goodput"
    )
    for case in known:
        waits = [bench.found("wait", *case, f"lens@{part}") for part in (1.2, 2.0)]
        if all(waits):
            cells = (
                f"{w['worst_wait_s']:6.0f} ({w.get('worst_wait_of_bound', np.nan):.2f} of 3 TTFTs + 60 s; "
                f"refused {w['refused']:.0f} of {w['offered']:.0f})"
                for w in waits
            )
            print(f"{case[0]:11} {case[1]:14} {'  '.join(cells)}")
    print("\nAblation, attainment (longest tenth) at LENS' goodput")
    for case in known:
        found = {a: bench.found("ablation", *case, a) for a in ABLATIONS}
        if all(found.values()):
            row = "  ".join(
                f"{a} {c['attainment']:.3f} ({c['attainment_longest_decile']:.2f})" for a, c in found.items()
            )
            print(f"{case[0]:11} {case[1]:14} {row}")


def _overload_table(bench: Bench, cases: list[tuple[str, str]]) -> None:
    print("\nAttainment at 1.3 times the goodput of the best static policy")
    gains, over_paper = [], []
    for device, workload in cases:
        found = {s: bench.found("overload", device, workload, s) for s in bench.policies(device, workload)}
        if not all(found.values()):
            continue
        met = {s: f["attainment"] for s, f in found.items()}
        best, _ = bench.best_static(device, workload)
        gains.append(met["lens"] - met[best])
        over_paper.append(met["lens"] - met["paper-lens"])
        row = "  ".join(
            f"{s.partition(':')[0]} {m:.3f} ({found[s]['attainment_longest_decile']:.2f})" for s, m in met.items()
        )
        print(f"{device:11} {workload:14} {row}")
    if gains:
        print(f"LENS above the best static: mean {100 * np.mean(gains):.1f} points, least {100 * min(gains):.1f}")
        print(f"LENS above paper-lens: mean {100 * np.mean(over_paper):.1f} points, least {100 * min(over_paper):.1f}")


def _light_table(bench: Bench, cases: list[tuple[str, str]]) -> None:
    print("\nLENS over fcfs at half the goodput of the best static policy: ratios of TTFT p50, p99, TPOT p50, p99")
    for device, workload in cases:
        lens = bench.found("light", device, workload, "lens@0.5")
        for fcfs in dict.fromkeys((bench.tuned(device, workload, "fcfs"), "fcfs:budget=2048")):
            other = bench.found("light", device, workload, f"{fcfs}@0.5")
            if lens and other:
                ratios = [
                    np.mean([m[q] for m in lens[k]]) / np.mean([m[q] for m in other[k]])
                    for k in ("ttft_ms", "tpot_ms")
                    for q in ("p50", "p99")
                ]
                cells = "  ".join(f"{r:.3f}" for r in ratios)
                print(f"{device:11} {workload:14} against {fcfs:18} {cells}")


def plots(bench: Bench, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for device in bench.args.devices:
        cases = [w for w in bench.args.workloads if bench.found("curve", device, w, f"lens@{CURVE[0]}")]
        if not cases:
            continue
        figure, axes = pyplot.subplots(1, len(cases), figsize=(3.6 * len(cases), 3.4), squeeze=False, sharey=True)
        for axis, workload in zip(axes[0], cases, strict=True):
            best, _ = bench.best_static(device, workload)
            for spec in dict.fromkeys((best, bench.tuned(device, workload, "srpt"), "paper-lens", "lens")):
                points = [bench.found("curve", device, workload, f"{spec}@{part}") for part in CURVE]
                if all(points):
                    x, y = zip(*((p["rate_rps"], 100 * p["attainment"]) for p in points), strict=True)
                    axis.plot(x, y, marker="o", markersize=3, label=spec)
            axis.axhline(90, color="0.6", linewidth=0.8, linestyle="--")
            axis.set_title(workload, fontsize=10)
            axis.set_xlabel("requests/s")
            axis.legend(frameon=False, fontsize=6)
        axes[0][0].set_ylabel(f"attainment on {device}, %")
        figure.tight_layout()
        figure.savefig(folder / f"engine_{device}.png", dpi=120)
        pyplot.close(figure)


def _numbers(text: str) -> tuple[int, ...]:
    first, _, last = text.partition("-")
    return tuple(range(int(first), int(last or first) + 1))


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the traces")
    parser.add_argument("--json", type=Path, required=True, help="results, read and added to")
    parser.add_argument("--devices", type=_names, default=["rtxpro6000", "h100"])
    parser.add_argument("--workloads", type=_names, default=list(DEVELOPMENT), help=", ".join(WORKLOADS))
    parser.add_argument("--stages", type=_names, default=list(STAGES), help=", ".join(STAGES))
    parser.add_argument("--seeds", type=_numbers, default=(101, 102, 103), help="FIRST-LAST")
    parser.add_argument("--tune-seeds", type=_numbers, default=(1,), help="FIRST-LAST, of the budgets")
    parser.add_argument("--duration", type=float, help="seconds of arrivals, in place of each workload's own")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="folder for the curves")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for device in args.devices:
            for workload in args.workloads:
                for stage in args.stages:
                    bench.do(bench.stage(stage, device, workload))
        tables(bench)
        if args.plots:
            plots(bench, args.plots)


if __name__ == "__main__":
    main()
