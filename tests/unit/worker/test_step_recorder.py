"""Step logs of a running core: whole at any time, bounded, and readable by the replay."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from nexusengine.cli.main import main
from nexusengine.clock import VirtualClock
from nexusengine.core.engine_core import EngineCore
from nexusengine.errors import ConfigError
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.step_log import read_steps
from nexusengine.wire import StepRecord
from nexusengine.worker.step_recorder import StepRecorder
from tests.support.fakes import make_core, request, run


def recorded(path: Path, **options: int) -> tuple[EngineCore, StepRecorder]:
    core = make_core(clock=VirtualClock())
    recorder = StepRecorder(path, **options)
    core.on_step = recorder.write
    for name, prompt in (("a", 30), ("b", 7), ("c", 1)):
        core.add(request(name, list(range(prompt)), 6))
    run(core)
    recorder.close()
    return core, recorder


def features(record: StepRecord) -> StepFeatures:
    return StepFeatures(**{name: getattr(record, name) for name in StepFeatures._fields})


def test_every_step_is_logged_with_what_each_sequence_computed(tmp_path: Path) -> None:
    core, recorder = recorded(tmp_path / "s.jsonl.gz")
    steps = list(read_steps(tmp_path / "s.jsonl.gz"))
    assert len(steps) == recorder.written == core.stats().steps
    assert sum(sum(s.q) for s in steps) == core.stats().computed_tokens
    assert [s.features for s in steps] == [features(r) for r in core.records]
    assert [s.ms for s in steps] == [pytest.approx(1e3 * r.device_s) for r in core.records]
    assert [s.t for s in steps] == sorted(s.t for s in steps)
    assert recorder.dropped == 0
    recorder.close()


def test_a_log_is_continued_not_overwritten(tmp_path: Path) -> None:
    once = recorded(tmp_path / "s.jsonl.gz")[1].written
    recorded(tmp_path / "s.jsonl.gz")
    assert len(list(read_steps(tmp_path / "s.jsonl.gz"))) == 2 * once


def test_a_log_that_is_full_stays_whole_and_stops_growing(tmp_path: Path) -> None:
    _, recorder = recorded(tmp_path / "s.jsonl.gz", most_bytes=100)
    assert recorder.written == 0
    assert (tmp_path / "s.jsonl.gz").stat().st_size == 0


def test_a_queue_that_is_full_drops_steps_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexusengine.worker.step_recorder._QUEUE_STEPS", 2)
    goes_on = threading.Event()
    append = StepRecorder._append

    def slow(self: StepRecorder, member: bytes, steps: int) -> bool:
        goes_on.wait(20.0)
        return append(self, member, steps)

    monkeypatch.setattr(StepRecorder, "_append", slow)
    monkeypatch.setattr("nexusengine.worker.step_recorder._BATCH_STEPS", 1)
    core = make_core(clock=VirtualClock())
    recorder = StepRecorder(tmp_path / "s.jsonl.gz")
    core.on_step = recorder.write
    core.add(request("a", [1, 2, 3], 20))
    run(core)
    assert recorder.dropped >= core.stats().steps - 4
    goes_on.set()
    recorder.close()
    assert recorder.written + recorder.dropped == core.stats().steps
    assert len(list(read_steps(tmp_path / "s.jsonl.gz"))) == recorder.written


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the step log"):
        StepRecorder(tmp_path / "none" / "s.jsonl.gz")


def test_record_writes_a_log_that_replay_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(tmp_path / "s.jsonl.gz")
    command = ["perf", "record", "--devices", "emulated:instant", "--output", log, "--requests", "12"]
    assert main([*command, "--max-prompt", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["requests"] == 12
    assert result["live_mape"] > 0.0
    assert main(["perf", "replay", log, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == result["steps"]
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "1", "--requests", "2"], "not both"),
        (["--seconds", "-1"], "not between 0 and 86400"),
        (["--devices", "emulated:h100,emulated:l4"], "one device at a time"),
    ],
)
def test_a_recording_that_cannot_be_made_is_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(tmp_path / "s.jsonl.gz")
    assert main(["perf", "record", "--devices", "emulated:instant", "--output", log, *options]) == 1
    assert said in capsys.readouterr().err
