"""Compares composed profiles with measurements they were not made of: python scripts/validate_profiles.py [--json].

1. The deployments of silicon_sample.csv in ../shared/gpu_profiles/aiconfigurator on one GPU with a dense model, by
   TensorRT-LLM, vLLM and SGLang under a constant number of requests. Each is simulated: that many requests of that
   length, each replaced when it ends, first come first served with 8,192 tokens a step, no noise, nothing of any server
   around it. Points that two terms of the profiles were calibrated on (profile_sources.kernels) are counted apart.
2. The steps of vLLM in the logs of QwQ-32B on an H100 in ../shared/step_logs, each against fp8 kernels composed.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
from profile_sources.common import PROFILES, table
from profile_sources.kernels import kernel_tables
from profile_sources.logs import logs_of

from nexusengine.perf.registry import make_model
from nexusengine.perf.step_log import read_steps
from nexusengine.profiles.assemble import SAME, assemble
from nexusengine.profiles.base import DeviceProfile, ProfileIdentity
from nexusengine.profiles.geometry import MODELS, Geometry, kv_capacity_tokens
from nexusengine.profiles.noise import Noise
from nexusengine.scheduler.registry import make_policy
from nexusengine.sim.engine import EngineSettings, SimEngine
from nexusengine.sim.job import make_job

MODEL_OF = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
}
GEOMETRIES = {**MODELS, "llama-3.1-70b": Geometry(8192, 28672, 80, 64, 8, 128, 128256)}
DEVICE_OF = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200"}
ROUNDS = 4
STEP_TOKENS = 8192
WARM_UP, EVERY = 5, 7
CALIBRATED = ("h100", "llama-3.1-8b", False)


def profile_of(device: str, model: str, fp8: bool) -> DeviceProfile:
    geometry = replace(GEOMETRIES[model], bytes_per_weight=1 if fp8 else 2)
    tables = kernel_tables(device, geometry, "fp8" if fp8 else "bfloat16")
    capacity = kv_capacity_tokens(device, geometry)
    identity = ProfileIdentity(device, model, "", "composed", capacity, geometry.weights_bytes)
    still = Noise([1.0, 1.0], [1.0, 1.0])
    return assemble(identity, {"kind": "split", "beside": 1.0}, tables, geometry, SAME, still)


def closed_loop(profile: DeviceProfile, requests: int, prompt: int, output: int) -> tuple[float, float]:
    """Means of TTFT and TPOT in milliseconds, of `requests` at a time; the first of each place are left out, because
    they all begin at once."""
    settings = EngineSettings(max_running=requests, max_waiting=requests, max_batch_tokens=STEP_TOKENS, noise=False)
    engine = SimEngine(
        profile,
        make_policy("fcfs"),
        make_model("line"),
        settings,
        max_model_len=prompt + output + 16,
        rng=np.random.default_rng(0),
    )
    started = 0

    def start(now: float) -> None:
        nonlocal started
        engine.add(make_job(str(started), now, prompt, output), now)
        started += 1

    for _ in range(requests):
        start(0.0)
    until_s = engine.begin(0.0)
    seen = 0
    while until_s is not None:
        engine.advance(until_s)
        for _ in engine.ended[seen:]:
            if started < ROUNDS * requests:
                start(until_s)
        seen = len(engine.ended)
        until_s = engine.begin(until_s)
    later = [e for e in engine.ended if int(e.job.request.request_id) >= requests]
    ttft = [e.first_token_s - e.job.request.arrival_s for e in later]
    tpot = [(e.ended_s - e.first_token_s) / (output - 1) for e in later]
    return 1e3 * float(np.mean(ttft)), 1e3 * float(np.mean(tpot))


def points() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for r in table(PROFILES / "aiconfigurator" / "silicon_sample.csv.gz"):
        model, device = MODEL_OF.get(r["model_path"]), DEVICE_OF.get(r["system"])
        if (
            model is None
            or device is None
            or r["mode"] != "agg"
            or r["tp_size"] != "1"
            or r["pp_size"] not in ("", "1")
        ):
            continue
        if r["gemm_quant_mode"] not in ("", "fp8", "fp8_block", "bfloat16"):
            continue
        out.append(
            {
                "number": sum((p["device"], p["model"], p["fp8"]) == CALIBRATED for p in out),
                "device": device,
                "model": model,
                "backend": r["backend"],
                "fp8": r["gemm_quant_mode"].startswith("fp8"),
                "requests": int(r["batch_size"]),
                "prompt": int(r["isl"]),
                "output": int(r["osl"]),
                "ttft_ms": float(r["silicon_ttft_ms"]),
                "tpot_ms": float(r["silicon_tpot_ms"]),
            }
        )
    return out


def steps_of_logs() -> list[dict[str, Any]]:
    profile = profile_of("h100", "qwq-32b-fp8", True)
    rows = []
    for path in logs_of("h100", "qwq-32b-fp8"):
        errors: dict[bool, list[float]] = {False: [], True: []}
        for number, step in enumerate(read_steps(path)):
            if number >= WARM_UP and number % EVERY == 0:
                counts, contexts = np.array(step.q, np.int32), np.array(step.ctx, np.int32)
                errors[bool(counts.max() > 1)].append(1e3 * profile.step_s(counts, contexts) / step.ms - 1)
        rows.append(
            {
                "log": path.name,
                "steps": sum(map(len, errors.values())),
                "decode_median_pct": round(100 * float(np.median(errors[False])), 1),
                "mixed_median_pct": round(100 * float(np.median(errors[True])), 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--points", action="store_true", help="print every point")
    args = parser.parse_args()
    profiles: dict[tuple[str, str, bool], DeviceProfile] = {}
    errors: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for p in points():
        key = (p["device"], p["model"], p["fp8"])
        if key not in profiles:
            profiles[key] = profile_of(*key)
        profile = profiles[key]
        if p["requests"] * (p["prompt"] + p["output"]) > profile.identity.kv_capacity_tokens:
            continue  # they waited for one another; that is not what is compared
        ttft, tpot = closed_loop(profile, p["requests"], p["prompt"], p["output"])
        calibrated = (p["device"], p["model"], p["fp8"]) == CALIBRATED and not p["number"] % 2
        errors[(*key, p["backend"], calibrated)].append((ttft / p["ttft_ms"] - 1, tpot / p["tpot_ms"] - 1))
        if args.points:
            print(p, f"simulated {ttft:.1f} {tpot:.2f}")
    rows: list[dict[str, Any]] = []
    for (device, model, fp8, backend, calibrated), pairs in sorted(errors.items()):
        ttft_errors, tpot_errors = np.array(pairs).T
        rows.append(
            {
                "device": device,
                "model": model,
                "weights": "fp8" if fp8 else "bf16",
                "backend": backend,
                "calibrated_on": calibrated,
                "points": len(pairs),
                "tpot_median_abs_pct": round(100 * float(np.median(np.abs(tpot_errors))), 1),
                "tpot_median_pct": round(100 * float(np.median(tpot_errors)), 1),
                "ttft_median_abs_pct": round(100 * float(np.median(np.abs(ttft_errors))), 1),
                "ttft_median_pct": round(100 * float(np.median(ttft_errors)), 1),
            }
        )
    rows += steps_of_logs()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
