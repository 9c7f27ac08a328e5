"""One command that checks everything a GPU is needed for, in under ten minutes: python scripts/gpu_check.py --json OUT

Needs torch and a checkout, no network, no weights: models have random weights, transformers is the reference. Every
phase has a time limit, is written to OUT at once, and says pass, fail or skip with a reason; the exit status is 1 if
one failed. `--device cpu --tiny` rehearses it. docs/gpus.md says what each phase shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from gpu_phases.common import LARGE, SMALL, TINY, Findings, Setting, Skip, make_executor, prompts_for, serve
from gpu_phases.eight_bits import eight_bits
from gpu_phases.learning import performance_model
from gpu_phases.peers import continuous_batching, logits, reference

from nexusengine.attention.base import FP8, AttentionMeta, AttentionSpec
from nexusengine.attention.registry import BACKENDS, backend_class
from nexusengine.cli import doctor


class OutOfTime(BaseException):
    """Raised wherever a phase is when it has taken twice its time; nothing that looks for failures may swallow it."""


def roofline(at: Setting) -> Findings:
    """Copy bandwidth, matrix products, and what a launch costs."""
    m = 128 if at.tiny else 8192
    x = torch.randn(m, m, device=at.device, dtype=at.dtype)
    gemm_s = at.seconds(lambda: x @ x)
    one = torch.zeros(1, device=at.device)
    launch_s = at.seconds(lambda: [one.add_(1) for _ in range(100)]) / 100
    return {"copy_gb_s": at.copy_gb_s(), "gemm_tflop_s": 2 * m**3 / gemm_s / 1e12, "launch_us": launch_s * 1e6}


def _case(at: Setting, spec: AttentionSpec, rows: list[tuple[int, int]], width: int = 0) -> tuple[Any, ...]:
    """q, caches, meta for rows of (tokens in the cache, queries); unused slots hold NaN."""
    size = spec.block_size
    rows = sorted(rows, key=lambda r: r[1] > 1)
    blocks = [-(-length // size) for length, _ in rows]
    generator = torch.Generator().manual_seed(0)
    shape = (sum(blocks) + 1, size, spec.num_kv_heads, spec.head_dim)
    caches = [torch.full(shape, torch.nan, dtype=torch.float32) for _ in range(2)]
    table = torch.zeros(len(rows), max(*blocks, width), dtype=torch.int32)
    first = 1
    for r, (length, _) in enumerate(rows):
        ids = torch.arange(first, first + blocks[r])
        table[r, : blocks[r]] = ids.int()
        first += blocks[r]
        for cache in caches:
            flat = cache[ids[0] : ids[-1] + 1].view(-1, spec.num_kv_heads, spec.head_dim)
            flat[:length] = torch.randn(length, spec.num_kv_heads, spec.head_dim, generator=generator)
    for cache in caches:
        cache[0] = 0.0
    counts = [count for _, count in rows]
    q = torch.randn(sum(counts), spec.num_heads, spec.head_dim, generator=generator)
    starts = torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32)
    meta = AttentionMeta(
        table.to(at.device),
        torch.tensor([length for length, _ in rows], dtype=torch.int32, device=at.device),
        starts.to(at.device),
        torch.full((sum(counts),), -1, dtype=torch.long, device=at.device),
        [length for length, _ in rows],
        counts,
        sum(count == 1 for count in counts),
        max(length for length, _ in rows),
        max(counts),
    )
    q, k, v = (t.to(at.device, spec.dtype) for t in (q, *caches))
    return q, *((c.to(spec.kv_dtype) for c in (k, v)) if spec.kv_dtype else (k, v)), meta


def _oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta, scale: float) -> torch.Tensor:
    """Float32, row by row."""
    out, k, v = torch.zeros_like(q, dtype=torch.float32), k.float(), v.float()
    at, group = 0, q.shape[1] // k.shape[2]
    for r, (length, count) in enumerate(zip(meta.seq_lens_host, meta.query_lens_host, strict=True)):
        ids = meta.block_table[r, : -(-length // k.shape[1])].long()
        keys, values = (c[ids].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for c in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[at : at + count].float(), keys) * scale
        seen = torch.arange(length, device=q.device) <= torch.arange(length - count, length, device=q.device)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[at : at + count] = torch.einsum("hqk,khd->qhd", weights, values)
        at += count
    return out


def _usable(
    at: Setting, heads: int, kv_heads: int, dim: int, kv_dtype: torch.dtype | None = None
) -> list[tuple[str, Any, AttentionSpec | None, str]]:
    found: list[tuple[str, Any, AttentionSpec | None, str]] = []
    for name in BACKENDS:
        try:
            cls = backend_class(name)
            size = cls.caps().block_sizes[0]
            spec = AttentionSpec(heads, kv_heads, dim, at.dtype, at.device, size, dim**-0.5, kv_dtype=kv_dtype)
            available, reason = cls.supports(spec)
            if kv_dtype and not cls.caps().fp8_cache:
                available, reason = False, "keeps no K and V of 8 bits"
            if available:
                available, reason = cls.probe()
        except Exception as error:
            available, reason = False, repr(error)
        found.append((name, cls, spec if available else None, reason))
    return found


def kernels(at: Setting) -> Findings:
    """Every backend against float32.

    MHA and GQA, head sizes, block edges, prefix hits, mixed batches; K and V of 8 bits where it keeps such.
    """
    shapes = [(4, 4, 64), (8, 2, 64), (8, 2, 80), (8, 2, 128), (8, 1, 256)][: 2 if at.tiny else None]
    found: Findings = {}
    for shape, kept in product(shapes, (None, FP8)):
        limit = 0.03 if at.dtype == torch.bfloat16 else 1e-4
        for name, cls, spec, reason in _usable(at, *shape, kept):
            limit = 0.2 if kept and name == "flash3" else limit  # it rounds q to 8 bits too
            key = f"{name} {shape[0]}/{shape[1]}x{shape[2]}{' 8-bit K and V' if kept else ''}"
            if spec is None or at.late:
                found[key] = f"skipped: {reason if spec is None else 'out of time'}"
                continue
            b = spec.block_size
            worst = 0.0
            for rows in ([(1, 1)], [(b, 1), (b + 1, 1), (b - 1, 1)], [(2 * b, 2 * b)], [(3 * b + 5, 7), (300, 1)]):
                q, k, v, meta = _case(at, spec, rows)
                backend, out = cls(spec), torch.empty_like(q)
                backend.plan(meta)
                backend.run(q, k, v, meta, out)
                worst = max(worst, float((out.float() - _oracle(q, k, v, meta, spec.scale)).abs().max()))
            if not worst <= limit:
                raise AssertionError(f"{key}: off by {worst}, more than {limit}")
            found[key] = worst
    return found


def variants(at: Setting) -> Findings:
    """The same greedy text in chunks, without prefix cache, preempted, without overlap, and without graphs."""
    prompts = [*prompts_for(TINY, 4, 60), *prompts_for(TINY, 2, 60)]
    plain, found = None, {}
    block_bytes = 2 * 16 * TINY.num_kv_heads * TINY.head_dim * TINY.num_layers * 4
    small = {"kv_cache_bytes": 14 * block_bytes, "block_size": 16, "attention_backend": "sdpa"}
    for name, options, serving in (
        ("plain", {"overlap": False, "enforce_eager": True}, {"cached": False}),
        ("chunks", {"overlap": False, "enforce_eager": True}, {"chunk": 17}),
        ("prefix cache", {"overlap": False, "enforce_eager": True}, {"running": 2}),
        ("preempted", {**small, "max_model_len": 128, "overlap": True}, {}),
        ("overlap", {"overlap": True, "enforce_eager": True}, {}),
        ("graphs", {"overlap": True}, {}),
    ):
        executor = make_executor(at, TINY, "float32", **options)
        answers, core, _ = serve(executor, prompts, 48, **serving)
        plain = plain or answers
        replays = executor.graphs.table.replays if executor.graphs else 0
        found[name] = {"preemptions": core.stats().preemptions, "graph_replays": replays}
        executor.close()
        if answers != plain:
            raise AssertionError(f"{name}: the text differs from that of the plain run")
        if name == "preempted" and not core.stats().preemptions:
            raise AssertionError("no request was preempted where there were too few blocks for all")
    return found


def graphs(at: Setting) -> Findings:
    """Decode steps are captured and replayed, within their budget."""
    if at.device.type != "cuda":
        raise Skip("CUDA graphs need CUDA; their bookkeeping and padding are tested with stand-ins")
    executor = make_executor(at, SMALL, "bfloat16", max_running=64)
    if executor.graphs is None:
        raise Skip(f"attention backend {executor.spec.attention_backend} cannot be captured")
    serve(executor, prompts_for(SMALL, 40, 20), 24, running=40)
    table = executor.graphs.table
    found = {
        "captured": [dataclasses.asdict(s) for s in table.captured],
        "refused": {f"{s.rows}x{s.longest}": reason for s, reason in table.refused.items()},
        "used_bytes": table.used_bytes,
        "replays": table.replays,
    }
    executor.close()
    if not table.replays:
        raise AssertionError(f"no step ran as a graph: {found['refused']}")
    return found


_AIMS = {"triton": 0.7, "flash2": 0.85, "flash3": 0.85}
"""Share of the copy bandwidth that decode attention should reach. Falling short is shown and fails nothing."""


def attention_speed(at: Setting) -> Findings:
    """Decode attention as bytes of K and V a second, and as a share of the copy bandwidth measured beside it."""
    copy_gb_s = at.copy_gb_s()
    rows, length = (2, 64) if at.tiny else (32, 8192)
    found: Findings = {}
    for name, cls, spec, reason in _usable(at, 32, 8, 128):
        if spec is None or at.late:
            found[name] = f"skipped: {reason if spec is None else 'out of time'}"
            continue
        q, k, v, meta = _case(at, spec, [(length, 1)] * rows)
        backend, out = cls(spec), torch.empty_like(q)
        backend.plan(meta)
        took_s = at.seconds(lambda run=backend.run, a=(q, k, v, meta, out): run(*a))  # type: ignore[misc]
        gb_s = 2 * rows * length * 8 * 128 * k.element_size() / took_s / 1e9
        found[name] = {"gb_s": gb_s, "share": gb_s / copy_gb_s, "aim": _AIMS.get(name), "us": took_s * 1e6}
    return found


def end_to_end(at: Setting) -> Findings:
    """Throughput, time to the first token and between tokens at several concurrencies.

    Also the performance model's error on the later half of the same run's steps, and the gap between steps.
    """
    found: Findings = {}
    copy_gb_s = at.copy_gb_s()
    shapes = {"tiny": TINY} if at.tiny else {"0.6B": SMALL, "8B": LARGE}
    for shape, config in shapes.items():
        most, length = (4, 24) if at.tiny else (256, 256)
        executor = make_executor(
            at, config, "float32" if at.tiny else "bfloat16", max_running=most, max_batch_tokens=2048
        )
        for users in (1, 4) if at.tiny else (1, 8, 64, 256):
            if at.late:
                found[f"{shape} at {users}"] = "skipped: out of time"
                continue
            tokens = 8 if at.tiny else (128 if users < 64 else 256)
            serve(executor, prompts_for(config, users, 16), 4, running=most)  # warm, graphs of this many rows included
            began = time.perf_counter()
            answers, core, first = serve(executor, prompts_for(config, users, length), tokens, chunk=2048, running=most)
            took_s, records = time.perf_counter() - began, list(core.records)
            late = records[len(records) // 2 :]
            errors = [abs(r.predicted_s - r.device_s) / max(r.device_s, 1e-9) for r in late]
            tpot_s = (took_s - (float(np.median(first)) - began)) / max(tokens - 1, 1)
            found[f"{shape} at {users}"] = {
                "output_tokens_s": sum(map(len, answers)) / took_s,
                "ttft_s": float(np.median(first)) - began,
                "tpot_s": tpot_s,
                "weights_share_of_copy": executor.spec.weights_bytes / tpot_s / 1e9 / copy_gb_s,
                "graph_replays": executor.graphs.table.replays if executor.graphs else 0,
                "device_share": core.stats().device_s / took_s,
                "between_steps_ms": 1e3 * (took_s - core.stats().device_s) / max(core.stats().steps, 1),
                "model_mape": 100 * float(np.mean(errors)),
            }
        executor.close()
    return found


PHASES: dict[str, tuple[Callable[[Setting], Findings], float]] = {
    "roofline": (roofline, 20.0),
    "kernels": (kernels, 60.0),
    "eight_bits": (eight_bits, 30.0),
    "reference": (reference, 45.0),
    "logits": (logits, 30.0),
    "variants": (variants, 45.0),
    "graphs": (graphs, 40.0),
    "attention_speed": (attention_speed, 30.0),
    "performance_model": (performance_model, 60.0),
    "end_to_end": (end_to_end, 130.0),
    "continuous_batching": (continuous_batching, 60.0),
}
"""By name, with the seconds after which a phase begins nothing new; after twice as many it is broken off."""


def run_phase(name: str, at: Setting, left_s: float) -> Findings:
    """One phase's outcome, whatever happens in it. left_s: until the whole check has to be over."""
    phase, limit_s = PHASES[name]
    if left_s < 1.0:
        return {"result": "skip", "reason": "the time for the whole check was over", "took_s": 0.0}
    began_s, most_s = time.monotonic(), min(2 * limit_s, left_s)

    def break_off(number: int, frame: object) -> None:
        raise OutOfTime(f"it had not ended after {most_s:.0f} s")

    before = signal.signal(signal.SIGALRM, break_off)
    signal.setitimer(signal.ITIMER_REAL, most_s)
    try:
        with torch.inference_mode():
            here = dataclasses.replace(at, ends_s=began_s + min(limit_s, left_s))
            outcome: Findings = {"result": "pass", "found": phase(here)}
    except Skip as reason:
        outcome = {"result": "skip", "reason": str(reason)}
    except (Exception, OutOfTime) as error:  # whatever it is, the other phases still tell something
        outcome = {"result": "fail", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    outcome["took_s"] = round(time.monotonic() - began_s, 2)
    gc.collect()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal, no figures")
    parser.add_argument("--json", metavar="OUT", help="write findings here after every phase, profiles beside it")
    parser.add_argument("--only", metavar="PHASE,...", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--limit", type=float, default=570.0, metavar="S", help="seconds for everything")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(PHASES)
    if unknown := [name for name in names if name not in PHASES]:
        parser.error(f"{unknown[0]!r} is no phase; there are {', '.join(PHASES)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} sees no CUDA device; --device cpu --tiny rehearses", file=sys.stderr
        )
        return 2
    ends_s = time.monotonic() + args.limit
    report: Findings = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tiny": args.tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "doctor": doctor.findings(),
        "phases": {},
    }
    for name in names:
        at = Setting(device, args.tiny, Path(args.json) if args.json else None)
        outcome = report["phases"][name] = run_phase(name, at, ends_s - time.monotonic())
        print(f"{outcome['result']:5} {name:20} {outcome['took_s']:7.1f} s  {outcome.get('reason', '')}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1))
    return int(any(p["result"] == "fail" for p in report["phases"].values()))


if __name__ == "__main__":
    sys.exit(main())
