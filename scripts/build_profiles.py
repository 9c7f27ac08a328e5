"""Makes nexusengine/profiles/data from the measurements of others: python scripts/build_profiles.py [--output DIR].

Reads ../shared/gpu_profiles and ../shared/step_logs. Times are rounded to 12 bits of mantissa (2e-4), so that the
tables compress; everything else is as measured. The result is the same byte for byte each time.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from profile_sources import joint, kernels, logs, roofline
from profile_sources.common import PROFILES, ROOT, SHARED, Tables

from nexusengine.perf.devices import DATASHEETS
from nexusengine.profiles.geometry import MODELS, kv_capacity_tokens, shards_of

KERNELS = [(device, model) for model in ("llama-3.1-8b", "qwen3-32b") for device in kernels.FOLDERS]
BESIDE = {"h100": 1.0, "h200": 1.0, "b200": 1.0}
BESIDE_FA2 = 2.0
"""Decodes in one FlashAttention 2 call with a chunk, over decodes alone: 1.7 on the RTX PRO 6000, 2.4 on the RTX 4090
(128 decodes of 1,024), about 3 on the A6000; none on the H100 (its step logs)."""


def entry(
    device: str, model: str, kind: str, confidence: str, source: str, licence: str, **more: Any
) -> dict[str, Any]:
    geometry = MODELS[model]
    capacity = kv_capacity_tokens(device, geometry)
    return {
        "device": device,
        "model": model,
        "kind": kind,
        "confidence": confidence,
        "source": source,
        "licence": licence,
        "kv_capacity_tokens": capacity,
        "weights_bytes": geometry.weights_bytes,
        "noise": "pooled",
        **more,
    }


def tabulated() -> list[tuple[dict[str, Any], Tables]]:
    """All profiles that are tables."""
    out = []
    for device, model in joint.FOLDERS:
        e = entry(device, model, "joint", "measured", joint.SOURCE, joint.LICENCE)
        if shards_of(device) > 1:
            e |= {"shards": shards_of(device), "link": device.partition("-tp")[0], "confidence": "composed"}
            e["source"] += "; one GPU's part, collectives as measured between two"
        out.append((e, joint.joint_tables(device, model)))
    for device, model in KERNELS:
        if kv_capacity_tokens(device, MODELS[model]) < 4096:
            continue
        version = kernels.FOLDERS[device].rpartition("vllm-")[2]
        beside = BESIDE.get(device, BESIDE_FA2)
        e = entry(device, model, "split", "composed", f"{kernels.SOURCE} {version}", kernels.LICENCE, beside=beside)
        out.append((e, kernels.kernel_tables(device, MODELS[model])))
    known = DATASHEETS.keys() - {"rtxpro6000"}  # its datasheet came after the tables: they stay as they were shipped
    measured = [(e["device"], MODELS[e["model"]], t) for e, t in out if e["device"] in known]
    share = roofline.efficiencies([m for m in measured if m[1] == MODELS["llama-3.1-8b"]])
    print(share)
    for device in roofline.DEVICES:
        served = roofline.served(device, MODELS["llama-3.1-8b"])
        bits = "" if served.bytes_per_weight == 2 else ", 8-bit weights"
        e = entry(device, "llama-3.1-8b", "split", "roofline", roofline.SOURCE + bits, "", beside=BESIDE_FA2)
        e["kv_capacity_tokens"], e["weights_bytes"] = kv_capacity_tokens(device, served), served.weights_bytes
        out.append((e, roofline.roofline_tables(device, served, share)))
    return out


def build(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    entries = []
    for e, tables in tabulated():
        e["tables"] = f"{e['device']}_{e['model']}.npz"
        arrays: dict[str, Any] = {**tables}  # by names that are no other argument of the function
        np.savez_compressed(output / e["tables"], **arrays)
        entries.append(e)
    noise = {"pooled": logs.pooled_noise(sorted((SHARED / "step_logs").glob("*.jsonl.gz")))}
    for device, model in logs.LOGS:
        fit = logs.fit_of(device, model)
        name = f"{device}/{model}"
        noise[name] = {"decode": list(fit.decode_noise), "mixed": list(fit.mixed_noise)}
        more = {"layers": MODELS[model].layers, "weights_s": list(fit.weights_s), "noise": name}
        entries.append(entry(device, model, "fitted", "resampled", logs.SOURCE, logs.LICENCE, **more))
    (output / "index.json").write_text(json.dumps({"profiles": entries, "noise": noise}, indent=1) + "\n")
    for source in ("llmservingsim", "aiconfigurator"):
        shutil.copyfile(PROFILES / source / "LICENSE", output / f"LICENSE.{source}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "nexusengine" / "profiles" / "data")
    args = parser.parse_args()
    build(args.output)
    total = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{total} bytes in {args.output}")


if __name__ == "__main__":
    main()
