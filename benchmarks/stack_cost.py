"""What server and router add to the time to the first token, at many short prompts a second.

    python -m benchmarks.stack_cost [--rate 100] [--duration 20] [--rounds 3] [--devices emulated:instant] [--json FILE]

The same requests at the same instants, in turns: over HTTP to `nexusengine serve` (server, router, worker: processes of
their own), and to an engine core in a thread of this process, without any of them. Both have the first of the devices
in common; `emulated:instant` computes nothing, so what is left is the cost of software. Times are from the instant at
which a request was to be sent; what the HTTP client costs counts as the server's. Prompts are token ids: no text is
tokenised. The difference of medians, and of 99th percentiles, is taken in every round; their median is what is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from nexusengine.engine.inproc_client import LocalBackend
from nexusengine.engine.launch import engine_config, make_local
from nexusengine.errors import NexusError
from nexusengine.loadgen.http import Target
from nexusengine.loadgen.items import WorkItem, items_of
from nexusengine.loadgen.prompts import Prompts
from nexusengine.loadgen.record import Record
from nexusengine.loadgen.report import spread
from nexusengine.loadgen.run import offer
from nexusengine.loadgen.server import ServerInfo, ask, own_server
from nexusengine.sim.workload.build import Builder, WorkloadSpec
from nexusengine.types import EngineRequest, SamplingParams, TokenDelta

MOST_MEDIAN_MS, MOST_P99_MS = 2.0, 10.0
_START_AFTER_S = 0.2
_WARM_S = 3.0  # of each round, not counted


class Refused(NexusError):
    """A request of the benchmark got no complete answer."""


def make_items(args: argparse.Namespace) -> list[WorkItem]:
    spec = WorkloadSpec(
        trace=f"lengths:{args.lengths}",
        arrivals="poisson",
        rate_rps=args.rate,
        duration_s=_WARM_S + args.duration,
        classes="interactive",
        seed=args.seed,
        max_tokens=1024,
    )
    return items_of(Builder(spec).build())


def counted(records: Sequence[Record]) -> list[Record]:
    """Those after the warming up. Raises Refused if one of them all is not complete."""
    for record in records:
        if not record.completed:
            raise Refused(f"a request that was to be sent at {record.item.send_at_s:.3f} s: {record.error}")
    return [r for r in records if r.item.send_at_s >= _WARM_S]


def figures_of(records: Sequence[Record]) -> dict[str, float]:
    """In milliseconds: mean, p50, p90, p99 of the time to the first token, and p99 of the client's own lateness."""
    mine = counted(records)
    return {**spread(mine, lambda r: 1e3 * r.ttft_s), "late_p99": spread(mine, lambda r: 1e3 * r.late_s)["p99"]}


async def without_stack(items: Sequence[WorkItem], device: str, seed: int) -> list[Record]:
    """To an engine core in this process."""
    config = engine_config("smollm2-135m", device, {"prefix_caching": False})
    core, _, vocabulary = make_local(config)
    backend = LocalBackend(core, config.model)
    await backend.start()
    prompts = Prompts(vocabulary, seed)
    ids = [prompts.token_ids(i, item).tolist() for i, item in enumerate(items)]
    began_s = time.monotonic() + _START_AFTER_S
    records = [Record(item, began_s + item.send_at_s) for item in items]
    left, all_ended = len(items), asyncio.Event()

    def send(i: int) -> None:
        record, item = records[i], items[i]

        def sink(delta: TokenDelta) -> None:
            nonlocal left
            now = time.monotonic()
            if delta.token_ids:
                record.events += 1
                record.output_tokens += len(delta.token_ids)
                record.last_s = now
                if record.events == 1:
                    record.first_s = now
            if delta.finish_reason is not None:
                record.ended_s = now
                record.error = None if delta.finish_reason == "length" else delta.error_code or delta.finish_reason
                left -= 1
                if not left:
                    all_ended.set()

        record.sent_s = time.monotonic()
        sampling = SamplingParams(seed=seed + i, max_tokens=item.output_tokens, ignore_eos=True)
        backend.submit(EngineRequest(f"r{i}", ids[i], sampling, record.sent_s, slo=item.slo), sink)

    try:
        for i, record in enumerate(records):
            if (wait_s := record.intended_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            send(i)
        await asyncio.wait_for(all_ended.wait(), 60.0)
    finally:
        await backend.close()
    return records


def with_stack(url: str, items: Sequence[WorkItem], info: ServerInfo, seed: int) -> list[Record]:
    return offer(Target(url), items, info, seed=seed, timeout_s=60.0).records


def summary_of(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """added_ms: of each round, and their medians; within: whether these keep both limits."""
    added = {q: [r["with"][q] - r["without"][q] for r in rounds] for q in ("p50", "p99")}
    medians = {q: median(values) for q, values in added.items()}
    return {
        "added_ms": added,
        "added_median_ms": medians,
        "within": medians["p50"] < MOST_MEDIAN_MS and medians["p99"] < MOST_P99_MS,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--duration", type=float, default=20.0, help="seconds counted of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", default="emulated:instant", help="of the server; the engine alone has the first")
    parser.add_argument("--router", default="prism")
    parser.add_argument("--lengths", default="input=20..100,output=8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    items = make_items(args)
    first = args.devices.split(",")[0]
    options = ["--devices", args.devices, "--router", args.router, "--no-prefix-caching", "--log-level", "warning"]
    rounds: list[dict[str, dict[str, float]]] = []
    busy = [os.getloadavg()[0]]
    print(f"{len(items)} requests at {args.rate:g}/s, {args.lengths}; TTFT in ms")
    print(f"{'round':<8}{'':<22}{'mean':>8}{'p50':>8}{'p90':>8}{'p99':>8}{'late p99':>10}")
    with own_server(options) as url:
        info = ask(url)
        for n in range(args.rounds):
            made = {
                "without": figures_of(asyncio.run(without_stack(items, first, args.seed))),
                "with": figures_of(with_stack(url, items, info, args.seed)),
            }
            rounds.append(made)
            for what, f in (("engine alone", made["without"]), ("server and router", made["with"])):
                cells = [f[q] for q in ("mean", "p50", "p90", "p99")]
                print(f"{n:<8}{what:<22}{''.join(f'{c:>8.2f}' for c in cells)}{f['late_p99']:>10.2f}", flush=True)
    busy.append(os.getloadavg()[0])
    summary = summary_of(rounds)
    result = {"options": {k: str(v) for k, v in vars(args).items()}, "load_average": busy, "rounds": rounds, **summary}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    added = summary["added_median_ms"]
    print(
        f"server and router add {added['p50']:.2f} ms to the median and {added['p99']:.2f} ms to the p99: "
        f"{'within' if summary['within'] else 'NOT within'} {MOST_MEDIAN_MS:g} and {MOST_P99_MS:g} ms"
        f" (load average {busy[0]:.1f} to {busy[1]:.1f})"
    )


if __name__ == "__main__":
    main()
