"""One command that checks everything a GPU is needed for, in under ten minutes: python scripts/gpu_check.py --json OUT

Needs torch and a checkout, no network, no weights: models have random weights, transformers is the reference. Every
phase has a time limit, is written to OUT at once, and says pass, fail or skip with a reason; the exit status is 1 if
one failed. `--device cpu --tiny` rehearses it. docs/gpu-check.md says what each phase shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from nexusengine.attention.base import AttentionMeta, AttentionSpec
from nexusengine.attention.registry import BACKENDS, backend_class
from nexusengine.clock import MonotonicClock
from nexusengine.config import parse_device
from nexusengine.core.core import EngineCore
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.lens.fcfs import FCFS
from nexusengine.model_config import ModelConfig
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.registry import make_model
from nexusengine.types import EngineRequest, SamplingParams

TINY = ModelConfig("LlamaForCausalLM", 97, 64, 128, 2, 4, 2, 16, 512, 1e-6, 10_000.0)
SMALL = ModelConfig("LlamaForCausalLM", 151_936, 1024, 3072, 28, 16, 8, 64, 8192, 1e-6, 1_000_000.0)  # about 0.6B
LARGE = ModelConfig("LlamaForCausalLM", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 1e-5, 500_000.0)  # Llama 3 8B's
Findings = dict[str, Any]


class Skip(Exception):
    """The phase cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool
    ends_s: float = float("inf")  # on time.monotonic: when the phase should come to its end

    @property
    def late(self) -> bool:
        return time.monotonic() > self.ends_s

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], runs: int = 10) -> float:
        """Median of `runs`, after two to warm up."""
        took = []
        for i in range(runs + 2):
            self.sync()
            began = time.perf_counter()
            run()
            self.sync()
            if i > 1:
                took.append(time.perf_counter() - began)
        return float(np.median(took))


def roofline(at: Setting) -> Findings:
    """Copy bandwidth, matrix products, and what a launch costs."""
    n = 2**20 if at.tiny else 2**30
    a, b = (torch.zeros(n, dtype=torch.uint8, device=at.device) for _ in range(2))
    copy_s = at.seconds(lambda: b.copy_(a))
    m = 128 if at.tiny else 8192
    x = torch.randn(m, m, device=at.device, dtype=at.dtype)
    gemm_s = at.seconds(lambda: x @ x)
    one = torch.zeros(1, device=at.device)
    launch_s = at.seconds(lambda: [one.add_(1) for _ in range(100)]) / 100
    return {"copy_gb_s": 2 * n / copy_s / 1e9, "gemm_tflop_s": 2 * m**3 / gemm_s / 1e12, "launch_us": launch_s * 1e6}


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
    return q, k, v, meta


def _oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, meta: AttentionMeta, scale: float) -> torch.Tensor:
    """Float32, row by row."""
    out = torch.zeros_like(q, dtype=torch.float32)
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


def _usable(at: Setting, heads: int, kv_heads: int, dim: int) -> list[tuple[str, Any, AttentionSpec | None, str]]:
    found: list[tuple[str, Any, AttentionSpec | None, str]] = []
    for name in BACKENDS:
        try:
            cls = backend_class(name)
            spec = AttentionSpec(heads, kv_heads, dim, at.dtype, at.device, cls.caps().block_sizes[0], scale=dim**-0.5)
            available, reason = cls.supports(spec)
            if available:
                available, reason = cls.probe()
        except Exception as error:
            available, reason = False, repr(error)
        found.append((name, cls, spec if available else None, reason))
    return found


def kernels(at: Setting) -> Findings:
    """Every backend against float32: MHA and GQA, head sizes, block edges, prefix hits, mixed batches."""
    shapes = [(4, 4, 64), (8, 2, 64), (8, 2, 80), (8, 2, 128), (8, 1, 256)][: 2 if at.tiny else None]
    limit = 0.03 if at.dtype == torch.bfloat16 else 1e-4
    found: Findings = {}
    for shape in shapes:
        for name, cls, spec, reason in _usable(at, *shape):
            key = f"{name} {shape[0]}/{shape[1]}x{shape[2]}"
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


def _executor(at: Setting, config: ModelConfig, dtype: str, **options: Any) -> TorchExecutor:
    given = {"max_running": 8, "max_batch_tokens": 256, "max_model_len": min(config.max_position, 4096), **options}
    if at.device.type == "cpu":
        given.setdefault("kv_cache_bytes", 2**24)
    name = "cpu" if at.device.type == "cpu" else f"cuda:{at.device.index or 0}"
    return TorchExecutor.build(
        config, None, parse_device(name), ExecutorOptions(dtype=dtype, seed=1, **given), lambda phase, fraction: None
    )


def _serve(
    executor: TorchExecutor, prompts: list[list[int]], tokens: int, *, chunk: int = 256, cached: bool = True,
    running: int = 8,
) -> tuple[list[list[int]], EngineCore, list[float]]:  # fmt: skip
    """Greedy answers, the core, and the instants of each request's first token and end."""
    core = EngineCore(
        executor, FCFS(chunk), make_model(), clock=MonotonicClock(), max_running=running, max_waiting=len(prompts),
        prefix_caching=cached, hash_key=b"k",
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=tokens, ignore_eos=True)
        core.add(EngineRequest(str(i), prompt, sampling, core.clock.now()))
    answers: list[list[int]] = [[] for _ in prompts]
    first: dict[str, float] = {}
    while core.has_work:
        for delta in core.step():
            if delta.error_message:
                raise AssertionError(f"request {delta.request_id}: {delta.error_message}")
            first.setdefault(delta.request_id, time.perf_counter())
            answers[int(delta.request_id)] += delta.token_ids
    return answers, core, list(first.values())


def _prompts(config: ModelConfig, count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, config.vocab_size, max(length - 3 * i, 4)).tolist() for i in range(count)]


def reference(at: Setting) -> Findings:
    """Greedy text of the engine in float32 is transformers'."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skip(f"transformers is not installed ({error})") from None
    c = TINY
    executor = _executor(at, c, "float32")
    with torch.inference_mode():
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
                head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position,
                tie_word_embeddings=c.tie_embeddings, eos_token_id=None, bos_token_id=None, pad_token_id=0,
            )
        ).eval()  # fmt: skip
        _same_weights(theirs, c)
        theirs = theirs.to(at.device)
        prompts = _prompts(c, 3, 30)
        answers, _, _ = _serve(executor, prompts, 12)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt], device=at.device)
            expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
            if answer != expected:
                raise AssertionError(f"greedy text is {answer}, transformers says {expected}")
    executor.close()
    return {"prompts": len(prompts), "tokens_each": 12}


def _same_weights(theirs: Any, c: ModelConfig) -> None:
    """Their model gets the random weights that seed 1 gives ours: drawn in the same order."""
    generator = torch.Generator().manual_seed(1)
    own = dict(theirs.named_parameters())

    def draw(name: str) -> None:
        own[name].copy_(torch.empty(own[name].shape).normal_(0.0, 0.02, generator=generator))

    draw("model.embed_tokens.weight")
    for i in range(c.num_layers):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
            draw(f"model.layers.{i}.{part}.weight")
    if not c.tie_embeddings:
        draw("lm_head.weight")


def variants(at: Setting) -> Findings:
    """The same greedy text in chunks, without prefix cache, preempted, without overlap, and without graphs."""
    prompts = [*_prompts(TINY, 4, 60), *_prompts(TINY, 2, 60)]
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
        executor = _executor(at, TINY, "float32", **options)
        answers, core, _ = _serve(executor, prompts, 48, **serving)  # type: ignore[arg-type]
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
    executor = _executor(at, SMALL, "bfloat16", max_running=64)
    if executor.graphs is None:
        raise Skip(f"attention backend {executor.spec.attention_backend} cannot be captured")
    _serve(executor, _prompts(SMALL, 40, 20), 24, running=40)
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


def attention_speed(at: Setting) -> Findings:
    """Decode attention as bytes of K and V a second, beside the copy bandwidth of phase roofline."""
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
        found[name] = {"gb_s": 2 * rows * length * 8 * 128 * k.element_size() / took_s / 1e9, "us": took_s * 1e6}
    return found


def end_to_end(at: Setting) -> Findings:
    """Throughput, time to the first token and between tokens at several concurrencies; the performance model's error
    on the later half of the same run's steps; the gap between steps."""
    found: Findings = {}
    shapes = {"tiny": TINY} if at.tiny else {"0.6B": SMALL, "8B": LARGE}
    for shape, config in shapes.items():
        most, length = (4, 24) if at.tiny else (256, 256)
        executor = _executor(at, config, "float32" if at.tiny else "bfloat16", max_running=most, max_batch_tokens=2048)
        for users in (1, 4) if at.tiny else (1, 8, 64, 256):
            if at.late:
                found[f"{shape} at {users}"] = "skipped: out of time"
                continue
            tokens = 8 if at.tiny else (128 if users < 64 else 256)
            _serve(executor, _prompts(config, min(users, 4), 16), 4, running=most)  # warm
            began = time.perf_counter()
            answers, core, first = _serve(executor, _prompts(config, users, length), tokens, chunk=2048, running=most)
            took_s, records = time.perf_counter() - began, list(core.records)
            late = records[len(records) // 2 :]
            errors = [abs(r.predicted_s - r.device_s) / max(r.device_s, 1e-9) for r in late]
            found[f"{shape} at {users}"] = {
                "output_tokens_s": sum(map(len, answers)) / took_s,
                "ttft_s": float(np.median(first)) - began,
                "tpot_s": (took_s - (float(np.median(first)) - began)) / max(tokens - 1, 1),
                "device_share": core.stats().device_s / took_s,
                "between_steps_ms": 1e3 * (took_s - core.stats().device_s) / max(core.stats().steps, 1),
                "model_mape": 100 * float(np.mean(errors)),
            }
        executor.close()
    return found


def performance_model(at: Setting) -> Findings:
    """The model learns from one grid of steps and is scored on mixed steps it has not seen."""
    from nexusengine.serve.calibrate import _batch, _Shape

    config = TINY if at.tiny else SMALL
    executor = _executor(at, config, "float32" if at.tiny else "bfloat16", max_running=64, max_batch_tokens=1024)
    model = make_model()
    grid = [_Shape(d, c, p, pc) for d in (0, 1, 8, 32) for c in (128, 512) for p in (0, 128, 512) for pc in (0, 512)]
    held_out = [_Shape(d, 256, p, 256) for d in (4, 16) for p in (64, 256)]

    def measure(shape: _Shape) -> tuple[StepFeatures, float] | None:
        if not shape.decodes + shape.chunk or (batch := _batch(executor, shape, 64)) is None:
            return None
        took = []
        for _ in range(2 if at.tiny else 6):
            executor.submit(batch)
            took.append(executor.collect().device_s)
        return StepFeatures.of(batch.counts, batch.starts), float(np.median(took[1:]))

    taught = [m for m in map(measure, grid[:: 4 if at.tiny else 1]) if m is not None]
    for _ in range(5):
        for features, took_s in taught:
            model.observe(features, took_s)
    scored = [m for m in map(measure, held_out) if m is not None]
    executor.close()
    errors = [abs(model.predict(f).mean_s - took_s) / took_s for f, took_s in scored]
    return {"taught": len(taught), "held_out": len(scored), "mape": 100 * float(np.mean(errors)) if errors else None}


PHASES: dict[str, tuple[Callable[[Setting], Findings], float]] = {
    "roofline": (roofline, 30.0),
    "kernels": (kernels, 90.0),
    "reference": (reference, 60.0),
    "variants": (variants, 60.0),
    "graphs": (graphs, 60.0),
    "attention_speed": (attention_speed, 40.0),
    "performance_model": (performance_model, 60.0),
    "end_to_end": (end_to_end, 150.0),
}
"""By name, with the seconds after which a phase begins nothing new."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal, no figures")
    parser.add_argument("--json", metavar="OUT", help="write findings here after every phase")
    parser.add_argument("--only", metavar="PHASE,...", help=f"of {', '.join(PHASES)}")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} sees no CUDA device; --device cpu --tiny rehearses", file=sys.stderr
        )
        return 2
    report: Findings = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tiny": args.tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "phases": {},
    }
    for name in args.only.split(",") if args.only else PHASES:
        phase, limit_s = PHASES[name]
        began_s = time.monotonic()
        outcome: Findings = {}
        try:
            with torch.inference_mode():
                outcome = {"result": "pass", "found": phase(Setting(device, args.tiny, began_s + limit_s))}
        except Skip as reason:
            outcome = {"result": "skip", "reason": str(reason)}
        except Exception as error:  # whatever it is, the other phases still tell something
            outcome = {"result": "fail", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        outcome["took_s"] = round(time.monotonic() - began_s, 2)
        report["phases"][name] = outcome
        print(f"{outcome['result']:5} {name:18} {outcome['took_s']:7.1f} s  {outcome.get('reason', '')}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any(p["result"] == "fail" for p in report["phases"].values()))


if __name__ == "__main__":
    sys.exit(main())
