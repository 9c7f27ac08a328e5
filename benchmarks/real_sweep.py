"""Which settings serve llama-server best on this machine, under the load of benchmarks/real.py?

    python -m benchmarks.real_sweep --trace ../shared/traces/sharegpt_lengths_llama2.csv.gz --json quiet.json
    python -m benchmarks.real_sweep --trace ... --noise busy --json busy.json
    python -m benchmarks.real ... --llama-settings quiet.json busy.json

Each setting is changed alone, the others as in real_llama.BY_NOISE; then the best values together. Every run has a
fresh server, warmed up, and the same requests as the others of its round, at --load times the capacity of that base
(half of that beside neighbours, who take half of the machine). The settings that keep most promises (those of real.py)
are chosen; among equals those with the lower TTFT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.real_bench import add_arguments, line, prepare, say, started
from benchmarks.real_llama import BY_NOISE, SETTINGS
from benchmarks.real_report import Promise, Run, promise_of, summary_of
from benchmarks.real_systems import LLAMA, NOISES, System, neighbours

Settings = dict[str, Any]


def one_at_a_time(base: Settings) -> list[Settings]:
    """The base, and with each other value of one setting."""
    return [base, *(base | {name: v} for name, values in SETTINGS.items() for v in values if v != base[name])]


def together(base: Settings, runs: Sequence[Run]) -> Settings:
    """Of each setting the value that kept most promises, where others were those of the base."""
    kept = {row["system"]: row["attainment"] for row in summary_of(runs)}

    def best(name: str) -> Any:
        values = (base[name], *(v for v in SETTINGS[name] if v != base[name]))
        return max(values, key=lambda v: kept[json.dumps(base | {name: v})])

    return {name: best(name) for name in SETTINGS}


def chosen(runs: Sequence[Run]) -> Settings:
    rows = summary_of(runs)
    best: Settings = json.loads(max(rows, key=lambda r: (r["attainment"], -(r["ttft_ms_p50"] or 0.0)))["system"])
    return best


def run(args: argparse.Namespace, settings: Settings, promise: Promise, rate_rps: float, round_: int) -> Run:
    args.llama_settings = {args.noise: settings}
    system, seed = System(LLAMA, noise=args.noise), args.seed + round_
    with started(args, [system]) as bench, neighbours(NOISES[args.noise]):
        figures = bench.run(system, bench.items(rate_rps, args.duration, seed), promise, seed)
    of = {"noise": args.noise, "layout": "", "system": json.dumps(settings), "load": args.load, "round": round_}
    made = {**of, "rate_rps": rate_rps, **figures}
    say(line(made))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--noise", choices=sorted(NOISES), default="quiet")
    parser.add_argument("--load", type=float, default=0.8, help="rate over the capacity of the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of arrivals in a run")
    args = parser.parse_args(argv)
    if not args.trace:
        parser.error("--trace is missing")
    began_s, runs = time.monotonic(), list[Run]()
    result = {"benchmark": "real_sweep", **prepare(args)}
    base, system = BY_NOISE[args.noise], System(LLAMA, noise=args.noise)
    args.llama_settings = {args.noise: base}
    with started(args, [system]) as bench:
        promise = promise_of(bench.idle(system), args.ttft_factor, args.tpot_factor)
        rate_rps = args.load * bench.capacity_rps(system) / (2 if NOISES[args.noise] else 1)
    tried = one_at_a_time(base)
    for round_ in range(args.rounds):
        runs += [run(args, settings, promise, rate_rps, round_) for settings in tried]
        if round_ == 0 and (best := together(base, runs)) not in tried:
            tried.append(best)
            runs.append(run(args, best, promise, rate_rps, round_))
    result |= {"chosen": chosen(runs), "promise": asdict(promise), "rate_rps": rate_rps}
    result |= {"took_s": time.monotonic() - began_s, "summary": summary_of(runs), "runs": runs}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["summary"]:
        ttft, tpot = row["ttft_ms_p50"], row["tpot_ms_p50"]
        print(
            f"{100 * row['attainment']:5.1f} % TTFT {ttft} TPOT {tpot} {row['output_tokens_per_s']}/s {row['system']}"
        )
    print(f"chosen: {json.dumps(result['chosen'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
