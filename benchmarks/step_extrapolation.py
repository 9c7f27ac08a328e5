"""Steps larger than any seen: a model that learned from small steps of a device is asked for large ones.

    python -m benchmarks.step_extrapolation [--seeds 1-5] [--train 1024] [--prior device] [--profiles NAME,...]
        [--splitwise FILE] [--json]

On each device profile the model observes `--steps` steps of at most `--train` tokens with the profile's scatter:
decodes alone, and decodes beside chunks of prompts that fill the budget or do not. Then it predicts steps of 2,048,
4,096 and 8,192 tokens of three kinds: one whole prompt, eight whole prompts, and a chunk behind 4,096 tokens of context
beside 64 decodes. Given is the bias, 100 * (predicted - measured) / measured, as a mean over seeds. Beyond the tokens
that a profile's tables hold it goes on by its last slope, so that what is met there is a rule and not a measurement:
the column `tables to` says how far they go. `--splitwise` adds whole prompts of Llama-2-70B as measured.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
from collections import defaultdict
from typing import Any

import numpy as np

from nexusengine.execute.base import ExecutorSpec
from nexusengine.model_config import ModelConfig
from nexusengine.perf.devices import DATASHEETS, Datasheet
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.prior import GENERIC, Prior, roofline
from nexusengine.perf.registry import MODELS, make_model
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.registry import list_profiles, load_profile
from nexusengine.worker.priors import prior_of

SIZES = (2048, 4096, 8192)
KINDS = ("prompt", "eight", "chunk")
TABLES_TO = {"rtxpro6000": 2048, "rtxpro6000-tp2": 2048, "rtx4090": 2048, "l4": 4096, "a10": 4096, "t4": 4096}
LLAMA_2_70B = ModelConfig("llama", 32_000, 8192, 28_672, 80, 64, 8, 128, 4096, 1e-5, 1e4)
_MOST_DECODES, _LONGEST_CONTEXT = 96, 4000


def random_rows(rng: np.random.Generator, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens computed and tokens in the KV cache `[R]` of a step of at most `budget` tokens."""
    decodes = min(int(np.exp(rng.uniform(0.0, np.log(_MOST_DECODES)))), budget)
    counts, contexts = [1] * decodes, rng.integers(1, _LONGEST_CONTEXT, decodes).tolist()
    room = budget - decodes
    while room > 2 and len(counts) < decodes + 3 and rng.random() < 0.5:
        full = rng.random() < 0.5
        q = room if full else int(np.exp(rng.uniform(np.log(2), np.log(room))))
        counts.append(q)
        contexts.append(0 if rng.random() < 0.5 else int(rng.integers(0, _LONGEST_CONTEXT)))
        room -= q
    return np.array(counts, np.int32), np.array(contexts, np.int32)


def large_rows(kind: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A step of `tokens` tokens of a kind in KINDS."""
    if kind == "prompt":
        return np.array([tokens], np.int32), np.zeros(1, np.int32)
    if kind == "eight":
        return np.full(8, tokens // 8, np.int32), np.zeros(8, np.int32)
    counts = np.array([1] * 64 + [tokens - 64], np.int32)
    return counts, np.array([1024] * 64 + [4096], np.int32)


def prior_as_worker(profile: DeviceProfile) -> Prior:
    """The prior of a worker on an emulated device of this profile."""
    name, weights_bytes = profile.identity.name, profile.identity.weights_bytes
    spec = ExecutorSpec(f"emulated:{name}", "bfloat16", 16, 2, 16, 16, 16, "", weights_bytes, 0)
    return prior_of(spec, None)


def biases(
    profile: DeviceProfile, prior: Prior, name: str, seed: int, steps: int, budget: int
) -> dict[tuple[str, int], float]:
    """Percent, by kind and tokens."""
    rng, model = np.random.default_rng(seed), make_model(name, prior)
    for _ in range(steps):
        counts, contexts = random_rows(rng, budget)
        factor = float(profile.noise(rng.random(1), bool((counts > 1).any()))[0])
        model.observe(StepFeatures.of(counts, contexts), profile.step_s(counts, contexts) * factor)
    result = {}
    for kind in KINDS:
        for tokens in SIZES:
            counts, contexts = large_rows(kind, tokens)
            predicted_s = model.predict(StepFeatures.of(counts, contexts)).mean_s
            result[kind, tokens] = 100.0 * (predicted_s / profile.step_s(counts, contexts) - 1.0)
    return result


def of_profile(spec: str, args: argparse.Namespace) -> dict[str, Any]:
    profile = load_profile(spec)
    prior = prior_as_worker(profile) if args.prior == "device" else GENERIC
    found = [biases(profile, prior, args.model, seed, args.steps, args.train) for seed in args.seeds]
    mean = {f"{kind} {tokens}": float(np.mean([f[kind, tokens] for f in found])) for kind, tokens in found[0]}
    return {"device": spec, "tables_to": TABLES_TO.get(profile.identity.device, 8192), **mean}


def of_splitwise(path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Learned from the prompt phases of at most `--train` tokens and from the token phases; medians over repeats."""
    prompts: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    decodes: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            if row["model"] != "llama2-70b" or row["hardware"].endswith("pcap"):
                continue
            device = f"{row['hardware']} x{row['tensor_parallel']}"
            q, n = int(row["prompt_size"]), int(row["batch_size"])
            if n == 1:
                prompts[device][q].append(float(row["prompt_time"]) / 1e3)
            decodes[device].append((n, q, float(row["token_time"]) / 1e3))
    rows = []
    for device, by_tokens in sorted(prompts.items()):
        sheet = DATASHEETS[device.partition("-")[0]]
        shards = int(device.rpartition("x")[2])
        several = Datasheet(shards * sheet.bandwidth_gb_s, shards * sheet.tflops)
        prior = roofline(several, LLAMA_2_70B) if args.prior == "device" else GENERIC
        model, rng = make_model(args.model, prior), np.random.default_rng(args.seeds[0])
        small = [(q, s) for q, times in by_tokens.items() for s in times if q <= args.train]
        for _ in range(args.steps):
            if rng.random() < 0.5:
                q, s = small[rng.integers(len(small))]
                model.observe(StepFeatures(q, 1, 1, q * q / 2, 0), s)
            else:
                n, context, s = decodes[device][rng.integers(len(decodes[device]))]
                model.observe(StepFeatures(n, n, 0, 0.0, n * (context + 1)), s)
        found: dict[str, Any] = {"device": f"Llama-2-70B {device}", "tables_to": max(by_tokens)}
        for q in SIZES:
            if q in by_tokens:
                predicted_s = model.predict(StepFeatures(q, 1, 1, q * q / 2, 0)).mean_s
                found[f"prompt {q}"] = 100.0 * (predicted_s / float(np.median(by_tokens[q])) - 1.0)
        rows.append(found)
    return rows


def seeds_of(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("1-5"))
    parser.add_argument("--train", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--prior", choices=("generic", "device"), default="generic", help="what is known of the device")
    parser.add_argument("--model", choices=sorted(MODELS), default="online")
    parser.add_argument("--profiles", default="")
    parser.add_argument("--splitwise", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    specs = args.profiles.split(",") if args.profiles else [info.identity.name for info in list_profiles()]
    rows = [of_profile(spec, args) for spec in specs if spec != "-"]
    rows += of_splitwise(args.splitwise, args) if args.splitwise else []
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    columns = [f"{kind} {tokens}" for kind in KINDS for tokens in SIZES]
    print(f"{'device':34}{'tables to':>10}" + "".join(f"{c:>13}" for c in columns))
    for row in rows:
        cells = "".join(f"{row[c]:>+13.1f}" if c in row else f"{'-':>13}" for c in columns)
        print(f"{row['device']:34}{row['tables_to']:>10}{cells}")


if __name__ == "__main__":
    main()
