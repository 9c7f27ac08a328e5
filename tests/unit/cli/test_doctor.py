"""`nexusengine doctor`, on a machine with or without a GPU."""

from __future__ import annotations

import json

import pytest

from nexusengine import nvml as gpus
from nexusengine.attention.registry import BACKENDS
from nexusengine.cli import doctor
from nexusengine.cli.main import main
from tests.unit.worker.test_gpu import A


def test_json_names_every_backend_with_a_reason_and_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [b["name"] for b in found["attention"]] == list(BACKENDS)
    assert all(b["reason"] for b in found["attention"])
    assert next(b for b in found["attention"] if b["name"] == "sdpa")["available"]
    assert found["cpu"]["threads"] >= 1
    assert found["driver"]["version"] or found["driver"]["reason"]


def test_text_is_useful_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: ())
    monkeypatch.setattr(gpus, "driver_version", lambda: ("", "no library"))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "none, no library" in said
    assert "no GPU can be used: the NVIDIA driver does not answer (no library)" in said


def test_text_shows_memory_and_links_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible", lambda: (A,))
    monkeypatch.setattr(gpus, "topology", lambda found: [["-"]])
    said = doctor.text(doctor.findings())
    assert "cuda:0  H100, sm_90" in said
    assert "cuda:0 reaches: -" in said


def test_advice_names_what_is_missing() -> None:
    torch = {"version": "2.13.0+cpu", "cuda": None}
    one, two = doctor.advice(1, "", torch, [{"name": "sdpa", "available": True}])
    assert "2.13.0+cpu was built without CUDA" in one
    assert "flash-attn" in two
    assert doctor.advice(1, "", {"version": "2.13", "cuda": "13"}, [{"name": "flash3", "available": True}]) == []
