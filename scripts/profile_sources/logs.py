"""Steps of a real engine under load: fits, and how steps scatter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from nexusengine.perf.features import StepFeatures
from nexusengine.perf.step_log import read_steps
from nexusengine.profiles.fit import Fit, fit_steps, quantiles, scatter_of
from profile_sources.common import SHARED

SOURCE = "steps of vLLM measured by the authors of arXiv 2509.23384, github.com/KevinCheung2259/vllm"
LICENCE = "Apache-2.0"
LOGS = {  # device and model of the profile
    ("a6000", "llama-3.1-8b"): "a6000_llama31_8b_budget*.jsonl.gz",
    ("h100", "qwq-32b-fp8"): "h100_qwq32b_fp8_budget*.jsonl.gz",
}


def logs_of(device: str, model: str) -> list[Path]:
    return sorted((SHARED / "step_logs").glob(LOGS[device, model]))


def read_log(path: Path) -> tuple[list[StepFeatures], np.ndarray]:
    steps = list(read_steps(path))
    return [step.features for step in steps], np.array([step.ms / 1e3 for step in steps])


def pooled_noise(logs: list[Path]) -> dict[str, list[float]]:
    """Quantiles of the scatter of all logs together, each log as heavy as another."""
    parts: dict[str, list[np.ndarray]] = {"decode": [], "mixed": []}
    for path in logs:
        for kind, factors in zip(parts, scatter_of(*read_log(path)), strict=True):
            parts[kind].append(np.quantile(factors, np.linspace(0.001, 0.999, 1000)))
    return {kind: np.round(quantiles(np.concatenate(p)), 4).tolist() for kind, p in parts.items()}


def fit_of(device: str, model: str) -> Fit:
    """Of all logs of a device together; the scatter of each log about its own fit."""
    features: list[StepFeatures] = []
    took_s: list[np.ndarray] = []
    for path in logs_of(device, model):
        f, t = read_log(path)
        features += f
        took_s.append(t)
    fit = fit_steps(features, np.concatenate(took_s))
    noise = pooled_noise(logs_of(device, model))
    rounded = tuple(float(f"{w:.5g}") for w in fit.weights_s)
    return replace(fit, weights_s=rounded, decode_noise=tuple(noise["decode"]), mixed_noise=tuple(noise["mixed"]))
