"""Which file a worker keeps its step times in, and whether it keeps any."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from nexusengine.config import EngineConfig
from nexusengine.errors import ConfigError
from nexusengine.execute.base import ExecutorSpec
from nexusengine.model_config import ModelConfig
from nexusengine.perf.prior import EIGHT_BILLION, GENERIC
from nexusengine.worker.build import store_of
from nexusengine.worker.model_store import ModelStore, folder_of, kind_of, processor


def spec(**changes: object) -> ExecutorSpec:
    plain = ExecutorSpec("cuda:0", "bfloat16", 16, 10, 64, 64, 100, "fa2", 10**9, 0, device_name="NVIDIA L4")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_gpus_of_one_type_share_a_file_and_whatever_changes_step_times_has_its_own(tmp_path: Path) -> None:
    def path(s: ExecutorSpec, geometry: ModelConfig = EIGHT_BILLION, eager: bool = False) -> Path:
        return ModelStore(tmp_path, kind_of(s, geometry, GENERIC, eager=eager)).path

    assert path(spec(device="cuda:1")) == path(spec())
    others = [
        path(spec(device_name="NVIDIA L40S")),
        path(spec(dtype="float16")),
        path(spec(kv_dtype="float8_e4m3fn")),
        path(spec(weights_bytes=10**8)),
        path(spec(attention_backend="torch")),
        path(spec(device="cpu:2", device_name="")),
        path(spec(device="cpu:1", device_name="")),
        path(spec(), dataclasses.replace(EIGHT_BILLION, num_layers=16)),
        path(spec(), eager=True),
    ]
    assert len({path(spec()), *others}) == len(others) + 1


def test_the_folder_is_the_setting_or_in_the_cache_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEXUSENGINE_CACHE", str(tmp_path))
    assert folder_of(None) == tmp_path / "step-times"
    assert folder_of("/x/y") == Path("/x/y")
    assert folder_of("none") is None
    assert store_of(EngineConfig(step_times="none"), spec(), EIGHT_BILLION) is None
    assert store_of(EngineConfig(), spec(device="emulated:l4"), EIGHT_BILLION) is None
    assert store_of(EngineConfig(), spec(), EIGHT_BILLION) is not None


def test_without_a_home_folder_nothing_is_kept_and_the_worker_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NEXUSENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    with caplog.at_level(logging.INFO):
        assert folder_of(None) is None
    assert "no home folder" in caplog.text


def test_a_folder_of_a_user_who_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_times is '~nobody-here/x'"):
        folder_of("~nobody-here/x")


def test_a_processor_is_called_as_the_kernel_calls_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert processor(info) == "Some CPU @ 2 GHz"
    assert processor(tmp_path / "none") == "cpu"
