"""What is believed of a device before its first step: by its name, by what its driver says, and by the model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from nexusengine.execute.base import ExecutorSpec
from nexusengine.model_config import ModelConfig, StoredWeights
from nexusengine.perf.devices import DATASHEETS, Hardware, datasheet_from
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import EIGHT_BILLION, GENERIC, roofline
from nexusengine.profiles.geometry import emulated_geometry
from nexusengine.profiles.registry import load_profile
from nexusengine.worker import priors
from nexusengine.worker.gpu import PINNED
from nexusengine.worker.priors import hardware_of, prior_of

GEOMETRY = ModelConfig("llama", 49_152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e4)
STEPS = (  # tokens computed and tokens in the KV cache, row by row
    ([1], [128]),
    ([1], [1024]),
    ([1] * 8, [1024] * 8),
    ([1] * 32, [512] * 32),
    ([1] * 128, [512] * 128),
    ([1] * 64, [4096] * 64),
    ([16], [0]),
    ([64] + [1] * 8, [0] + [512] * 8),
    ([256] + [1] * 8, [0] + [512] * 8),
    ([512], [2048]),
    ([1024] + [1] * 32, [0] + [512] * 32),
    ([2048], [0]),
    ([2048], [8192]),
)
PINNED_GPU = {PINNED: "1", "CUDA_VISIBLE_DEVICES": "GPU-1"}
DRIVER_SAYS = {  # NVML's cores, clocks in MHz and bus in bits, from the cards' public specifications
    "t4": Hardware(2560, (7, 5), 1590, 5001, 256),
    "a100": Hardware(6912, (8, 0), 1410, 1593, 5120),
    "a10": Hardware(9216, (8, 6), 1695, 6251, 384),
    "l4": Hardware(7424, (8, 9), 2040, 6251, 192),
    "l40s": Hardware(18176, (8, 9), 2520, 9001, 384),
    "rtx4090": Hardware(16384, (8, 9), 2520, 10501, 384, consumer=True),
    "h100": Hardware(16896, (9, 0), 1830, 2619, 5120),
    "rtxpro6000": Hardware(24064, (12, 0), 2617, 14001, 512),
}


def spec(device: str, name: str = "", dtype: str = "bfloat16", weights_bytes: int = 0) -> ExecutorSpec:
    return ExecutorSpec(device, dtype, 16, 10, 64, 64, 100, "x", weights_bytes, 0, name)


def measured_and_predicted(profile_name: str, model: OnlineModel) -> list[tuple[float, float]]:
    profile, both = load_profile(profile_name), []
    for counts, contexts in STEPS:
        q, ctx = np.array(counts, np.int32), np.array(contexts, np.int32)
        both.append((profile.step_s(q, ctx), model.predict(StepFeatures.of(q, ctx)).mean_s))
    return both


@pytest.mark.parametrize(
    ("driver", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", "h100/llama-3.1-8b"),
        ("NVIDIA H200", "h200/llama-3.1-8b"),
        ("NVIDIA B200", "b200/llama-3.1-8b"),
        ("NVIDIA A100-SXM4-80GB", "a100/llama-3.1-8b"),
        ("NVIDIA L40S", "l40s/llama-3.1-8b"),
        ("NVIDIA A10G", "a10/llama-3.1-8b"),
        ("NVIDIA L4", "l4/llama-3.1-8b"),
        ("NVIDIA GeForce RTX 4090", "rtx4090/llama-3.1-8b"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000/llama-3.1-8b"),
        ("NVIDIA H100 80GB HBM3", "h100/qwen3-32b"),
        ("NVIDIA H200", "h200/qwen3-32b"),
        ("NVIDIA B200", "b200/qwen3-32b"),
        ("NVIDIA A100-SXM4-80GB", "a100/qwen3-32b"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000/qwen3-32b"),
        ("NVIDIA H100 80GB HBM3", "h100/llama-3.2-3b"),
        ("NVIDIA A100-SXM4-80GB", "a100/llama-3.2-3b"),
        ("NVIDIA L4", "l4/llama-3.2-3b"),
        ("NVIDIA RTX A6000", "a6000/llama-3.1-8b"),
    ],
)
def test_step_times_before_the_first_step_are_within_a_factor_of_two(driver: str, profile: str) -> None:
    geometry = emulated_geometry(profile)
    assert geometry is not None
    weights = load_profile(profile).identity.weights_bytes
    by_name = prior_of(spec("cuda:0", driver, weights_bytes=weights), geometry)
    emulated = prior_of(spec(f"emulated:{profile}", weights_bytes=weights), GEOMETRY)
    for prior in (by_name, emulated):
        for measured_s, predicted_s in measured_and_predicted(profile, OnlineModel(prior)):
            assert 0.5 < predicted_s / measured_s < 2.0


@pytest.mark.parametrize("device", sorted(DRIVER_SAYS))
def test_a_gpu_without_a_datasheet_is_taken_for_what_its_driver_says(device: str) -> None:
    sheet = datasheet_from(DRIVER_SAYS[device])
    assert sheet is not None
    assert sheet.bandwidth_gb_s == pytest.approx(DATASHEETS[device].bandwidth_gb_s, rel=0.1)
    assert sheet.tflops == pytest.approx(DATASHEETS[device].tflops, rel=0.1)
    prior = prior_of(spec("cuda:0", "NVIDIA Q9000"), EIGHT_BILLION, PINNED_GPU, lambda _: DRIVER_SAYS[device])
    if device != "t4":  # its profile's weights have 8 bits
        for measured_s, predicted_s in measured_and_predicted(f"{device}/llama-3.1-8b", OnlineModel(prior)):
            assert 0.5 < predicted_s / measured_s < 2.0


def test_a_gpu_of_which_neither_name_nor_driver_says_anything_is_a_generic_one() -> None:
    unknown = spec("cuda:0", "NVIDIA Q9000")
    assert prior_of(unknown, GEOMETRY, PINNED_GPU, lambda _: None) is GENERIC
    assert prior_of(unknown, GEOMETRY, {}, lambda _: DRIVER_SAYS["h100"]) is GENERIC, "which GPU is not known"
    no_clock = dataclasses.replace(DRIVER_SAYS["h100"], memory_mhz=0.0)
    assert prior_of(unknown, GEOMETRY, PINNED_GPU, lambda _: no_clock) is GENERIC
    assert prior_of(spec("cuda:0", "NVIDIA L4"), None) is GENERIC


def test_the_driver_is_asked_for_cores_clocks_and_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Nvml(SimpleNamespace):
        NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
            asked.append(uuid)
            return uuid

        def nvmlDeviceGetCudaComputeCapability(self, _: str) -> tuple[int, int]:
            return 8, 9

        def nvmlDeviceGetNumGpuCores(self, _: str) -> int:
            return 16384

        def nvmlDeviceGetMaxClockInfo(self, _: str, kind: int) -> int:
            return {1: 2520, 2: 10501}[kind]

        def nvmlDeviceGetMemoryBusWidth(self, _: str) -> int:
            return 384

        def nvmlDeviceGetName(self, _: str) -> str:
            return "NVIDIA GeForce RTX 4090"

    class Driver:
        def __enter__(self) -> Nvml:
            return Nvml()

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(priors, "driver", Driver)
    assert hardware_of("GPU-1") == DRIVER_SAYS["rtx4090"]
    assert asked == ["GPU-1"]


def test_without_a_driver_nothing_is_known() -> None:
    assert hardware_of("GPU-1") is None


def test_the_prior_comes_from_the_device_and_the_model() -> None:
    step = StepFeatures(1, 1, 0, 0.0, 100)
    h100, l4, cpu = (
        OnlineModel(prior_of(s, GEOMETRY)).predict(step).mean_s
        for s in (
            spec("cuda:0", "NVIDIA H100 80GB HBM3"),
            spec("cuda:0", "NVIDIA L4"),
            spec("cpu:2", dtype="float32"),
        )
    )
    assert h100 < l4 < cpu
    assert prior_of(spec("emulated:l4"), GEOMETRY) == roofline(DATASHEETS["l4"], EIGHT_BILLION)


def test_an_emulated_model_whose_shape_is_not_known_is_not_taken_for_the_one_whose_tokenizer_is_served() -> None:
    assert prior_of(spec("emulated:rtxpro6000/qwen3-30b-a3b"), GEOMETRY) is GENERIC


def test_weights_and_k_and_v_of_8_bits_are_believed_to_take_half_the_memory_s_time() -> None:
    plain = ExecutorSpec("cuda:0", "bfloat16", 16, 10, 64, 64, 100, "x", 0, 0, device_name="NVIDIA L4")
    narrow = dataclasses.replace(plain, weights_bytes=EIGHT_BILLION.num_parameters, kv_dtype="float8_e4m3fn")
    stored = dataclasses.replace(EIGHT_BILLION, stored=StoredWeights("fp8"))
    assert prior_of(narrow, stored) == roofline(DATASHEETS["l4"], stored, 1.0, 1)
    assert prior_of(plain, EIGHT_BILLION) == roofline(DATASHEETS["l4"], EIGHT_BILLION, 2, 2)
