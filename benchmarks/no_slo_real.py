"""Requests without an SLO on a real server: does LENS cost anything beside FCFS with 2,048 tokens a step?

    python -m benchmarks.no_slo_real [--devices cpu:1,cpu:2] [--rounds 5] [--json FILE]

SmolLM2-135M behind `nexusengine serve`. For each device the schedulers take turns, each round on fresh servers that
have been warmed up, with the same requests: a prompt of 600 tokens alone, four equal prompts at once (as n = 4 choices
come), and crowds of 8 and 32. The table holds medians over rounds, and of the ratios of neighbouring runs. One core is
left to client, server and router with `cpu:1` on two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from nexusengine.errors import Unavailable
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ask, own_server

SCHEDULERS = ("lens", "fcfs:budget=2048")
WARM_UP_SEED = 987_654
_LONE_TOKENS, _LONE_TIMES = 600, 3


def crowd(count: int, seed: int) -> list[WorkItem]:
    """So many requests at once, with prompts of 64 to 400 tokens and answers of 16 to 64."""
    rng = np.random.default_rng(seed)
    rows = zip(rng.integers(64, 401, count).tolist(), rng.integers(16, 65, count).tolist(), strict=True)
    return [WorkItem(0.0, prompt, output) for prompt, output in rows]


class Client:
    """Sends loads to one server."""

    def __init__(self, url: str) -> None:
        self._target, self._info = Target(url), ask(url)

    def records(self, items: list[WorkItem], seed: int) -> list[Record]:
        """Raises Unavailable if one of them was not answered."""
        records = offer(self._target, items, self._info, seed=seed).records
        for record in records:
            if record.error:
                raise Unavailable(f"a request failed: {record.error}")
        return records

    def warm_up(self) -> None:
        """Prompts of all lengths beside decodes, so that the performance model has seen them."""
        lengths = [int(16 * 1.6**k) for k in range(10)]
        self.records([WorkItem(0.15 * i, n, 24) for i, n in enumerate([*lengths, *reversed(lengths)])], WARM_UP_SEED)


def measure(client: Client, crowds: list[int], seed: int) -> dict[str, float]:
    """Seconds, and output tokens a second, by name."""
    lone = [client.records([WorkItem(0.0, _LONE_TOKENS, 8)], seed + k)[0] for k in range(_LONE_TIMES)]
    found = {"lone_ttft_s": statistics.median(r.ttft_s for r in lone)}
    choices = client.records([WorkItem(0.0, 300, 32)] * 4, seed)
    found["four_last_ttft_s"] = max(r.ttft_s for r in choices)
    found["four_done_s"] = max(r.e2e_s for r in choices)
    for count in crowds:
        records = client.records(crowd(count, seed), seed)
        ttft_s = [r.ttft_s for r in records]
        found[f"{count}_tokens_per_s"] = sum(r.output_tokens for r in records) / max(r.e2e_s for r in records)
        found[f"{count}_ttft_p50_s"] = float(np.percentile(ttft_s, 50))
        found[f"{count}_ttft_p99_s"] = float(np.percentile(ttft_s, 99))
        found[f"{count}_tpot_p50_s"] = float(np.percentile([r.tpot_s for r in records], 50))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=lambda text: text.split(","), default=["cpu:1", "cpu:2"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schedulers", type=lambda text: text.split(";"), default=list(SCHEDULERS))
    parser.add_argument("--crowds", type=lambda text: [int(n) for n in text.split(",")], default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = []
    for device in args.devices:
        for number in range(args.rounds):
            for scheduler in args.schedulers if number % 2 == 0 else args.schedulers[::-1]:
                options = ["--model", args.model, "--devices", device, "--scheduler", scheduler]
                with own_server([*options, "--no-prefix-caching", "--log-level", "warning"]) as url:
                    client = Client(url)
                    client.warm_up()
                    found = measure(client, args.crowds, args.seed + 100 * number)
                runs.append({"device": device, "round": number, "scheduler": scheduler, **found})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        print(table(runs, device, args.schedulers), flush=True)
    if args.json:
        result = {"benchmark": "no_slo_real", "cores": os.cpu_count(), "runs": runs}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def table(runs: list[dict[str, object]], device: str, schedulers: list[str]) -> str:
    """Medians of each scheduler, and the median over rounds of the first over the second."""
    mine = {s: [r for r in runs if (r["device"], r["scheduler"]) == (device, s)] for s in schedulers}
    first, second = (sorted(mine[s], key=lambda r: int(str(r["round"]))) for s in schedulers)
    names = [key for key in first[0] if key not in ("device", "round", "scheduler")]
    lines = [f"{device:20} {schedulers[0]:>18} {schedulers[1]:>18} {'ratio':>8}"]
    for name in names:
        a, b = ([float(str(r[name])) for r in rows] for rows in (first, second))
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        lines.append(f"{name:20} {statistics.median(a):18.3f} {statistics.median(b):18.3f} {ratio:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
