"""Shows that two checkouts behave the same: simulated runs for ten seeds, and the text of the default model.

A refactoring must not change a digit. Only the command line and `Engine` are used, so that the insides may differ.

    git worktree add /tmp/before main
    python scripts/compare_checkouts.py /tmp/before . --seeds 10

Exits with 1 and names the runs that differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LENGTHS = "lengths:input=logn:500:2000,output=logn:150:500"
ONE = f"--trace {LENGTHS} --arrivals gamma:2 --rate 3 --duration 60 --devices l4 --classes mixed"
THREE = f"--trace {LENGTHS} --arrivals gamma:2 --rate 12 --duration 40 --devices a100,l4,t4 --classes mixed"
RUNS = {
    "lens": f"{ONE} --engine lens",
    "lens, bounded": f"{ONE} --engine lens:quantile=1 --kv-tokens 20000 --stated-limit exact",
    "lens, without classes' order": f"{ONE} --engine lens:order=0",
    "paper-lens": f"{ONE} --engine paper-lens",
    "fcfs": f"{ONE} --engine fcfs:budget=512 --kv-tokens 20000",
    "vllm": f"{ONE} --engine vllm",
    "prefill-first": f"{ONE} --engine prefill-first",
    "prism": f"{THREE} --router prism --fault slow:0:10:1.7 --fault crash:1:15:5 --loss 0.05",
    "prism, engines of another order": f"{THREE} --router prism --engine fcfs",
    "paper's router": f"{THREE} --router paper-prism --engine paper-lens",
    "least-outstanding": f"{THREE} --router least-outstanding",
}
TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "mooncake_conversation.jsonl.gz"
if TRACE.is_file():
    WITH_CACHE = f"--trace {TRACE} --rate 2 --duration 40 --devices h100,a100 --prefix-caching --classes mixed"
    RUNS["prism, prefix cache"] = f"{WITH_CACHE} --router prism"
    RUNS["cache-aware, prefix cache"] = f"{WITH_CACHE} --router cache-aware"
MEASURED = ("scheduler_ms_p50", "scheduler_ms_p99", "router_ms_p50", "router_ms_p99")
TEXT = """
from nexusengine import Engine, SamplingParams
prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "1, 2, 3,"]
prompts += ["word " * n for n in (40, 90)]
with Engine("smollm2-135m", devices=["cpu:1"]) as engine:
    for max_tokens in (8, 40):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=1, ignore_eos=True)
        for output in engine.generate(prompts, params):
            print(list(output.token_ids))
"""


def run(checkout: Path, command: list[str]) -> str:
    """What it prints. Raises RuntimeError with the end of its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {' '.join(command)[:200]}\n{done.stderr[-2000:]}")
    return done.stdout


def simulated(checkout: Path, options: str, seed: int) -> str:
    """The report as text, without what was measured on this machine."""
    command = ["-m", "nexusengine.cli.main", "sim", "run", *options.split(), "--seed", str(seed), "--json"]
    report = json.loads(run(checkout, command))
    return json.dumps({name: value for name, value in report.items() if name not in MEASURED}, sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", help="runs whose name contains this")
    parser.add_argument("--no-text", action="store_true", help="simulated runs only")
    given = parser.parse_args()
    before, after = given.before.resolve(), given.after.resolve()
    differ: list[str] = []
    chosen = {name: options for name, options in RUNS.items() if (given.only or "") in name}
    runs = [(name, options, seed) for name, options in chosen.items() for seed in range(given.seeds)]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        pairs = pool.map(
            lambda one: (simulated(before, one[1], one[2]), simulated(after, one[1], one[2])),
            runs,
        )
        for (name, _, seed), (a, b) in zip(runs, pairs, strict=True):
            if a != b:
                differ.append(f"{name}, seed {seed}")
                print(f"differs: {differ[-1]}", flush=True)
    if not given.no_text and not given.only and run(before, ["-c", TEXT]) != run(after, ["-c", TEXT]):
        differ.append("generated text")
        print("differs: generated text")
    print(f"{len(runs)} simulated runs of {len(chosen)} kinds, {len(differ)} differences")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
