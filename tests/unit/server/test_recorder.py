"""The recorder never holds anybody up: what it cannot take is dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nexusengine.config import ServeConfig
from nexusengine.errors import Cancelled, DeadlineExceeded, Overloaded, WorkerLost
from nexusengine.recording.format import Header, Request, Step, Workers, parse
from nexusengine.server import recorder as recorder_module
from nexusengine.server.recorded_request import error_code, how_ended
from nexusengine.server.recorder import Recorder
from nexusengine.server.step_samples import StepSamples
from nexusengine.server.verdict import missed_by
from nexusengine.wire import Cluster, PerfSnapshot, StepRecord, WorkerInfo, WorkerLoad, WorkerState, WorkerStatus

LINE = Request(request=0, arrival_s=1.0, input_tokens=4, output_tokens=2, ended="length")


class Counted:
    def __init__(self) -> None:
        self.written = self.dropped = 0

    def __call__(self, written: int, dropped: int) -> None:
        self.written += written
        self.dropped += dropped


def made(tmp_path: Path, **settings: object) -> Recorder:
    return Recorder(ServeConfig(record_trace=str(tmp_path / "load.jsonl"), **settings))  # type: ignore[arg-type]


def read(path: Path) -> list[Header | Workers | Request]:
    return [parse(json.loads(line)) for line in path.read_text().splitlines()]


def test_a_full_buffer_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_QUEUED_TOKENS", 100)
    recorder, counted = made(tmp_path), Counted()
    recorder._counted = counted  # as `start` does, without the thread that would empty the buffer
    for _ in range(30):
        recorder.put(LINE, [1] * 8, [2] * 2)
    assert counted.dropped == 20
    recorder.start(lambda: None, counted)
    recorder.close(10.0)
    assert (counted.written, counted.dropped) == (10, 20)
    assert sum(isinstance(line, Request) for line in read(tmp_path / "load.jsonl")) == 10


def test_after_its_end_nothing_is_taken_any_more(tmp_path: Path) -> None:
    recorder, counted = made(tmp_path), Counted()
    recorder.start(lambda: None, counted)
    recorder.close(10.0)
    recorder.put(LINE, [1], [])
    assert counted.dropped == 1


def test_every_file_of_a_set_has_a_header_and_the_workers(tmp_path: Path) -> None:
    info = WorkerInfo(
        "w0", "e", 1, "cpu:1", "m", block_size=16, kv_total_blocks=10, max_model_len=160, max_batch_tokens=64
    )
    load = WorkerLoad(0, perf=PerfSnapshot("line", (0.001, 0.01, 0.0), 1.2, 9), counters={"steps": 9.0, "host_s": 0.5})
    cluster = Cluster("r", (WorkerStatus(info, WorkerState.READY, "ready", 1.0, 0, load),))
    recorder = made(tmp_path, record_trace_bytes=3000, record_trace_files=100)
    recorder.start(lambda: cluster, Counted())
    for i in range(20):
        recorder._look_at_workers()
        recorder._write_requests([recorder_module._Item(LINE, list(range(64 + i)), [])] * 5)
    recorder.close(10.0)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3
    headers = []
    for file in files:
        header, workers, *_ = read(file)
        assert isinstance(header, Header)
        assert isinstance(workers, Workers)
        assert workers.workers[0].learned is not None
        assert (workers.workers[0].kv_tokens, workers.workers[0].host_s) == (160, 0.5)
        assert file.stat().st_size <= 3000
        headers.append(header)
    assert len({h.recording for h in headers}) == 1
    assert sorted(h.part for h in headers) == list(range(len(files)))
    assert {h.started_unix_s for h in headers} == {headers[0].started_unix_s}
    requests = [line for file in files for line in read(file) if isinstance(line, Request)]
    assert len(requests) == 100
    assert all(len(line.hash_ids) == 4 or len(line.hash_ids) == 5 for line in requests)


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (Overloaded("x"), "refused"),
        (DeadlineExceeded("x"), "unfinished"),
        (Cancelled("x"), "left"),
        (WorkerLost("x"), "failed"),
        (RuntimeError("x"), "failed"),
    ],
)
def test_an_error_is_an_end(error: Exception, ended: str) -> None:
    missed = missed_by(error)
    assert missed is not None
    assert how_ended(missed, error_code(error)) == ended


def step(number: int, started_s: float) -> StepRecord:
    return StepRecord(number, started_s, 5, 5, 0, 0.0, 100, 0.01, 0.02, 0.015, 0.001, 1, 0, 0, {}, {})


def test_steps_are_sampled_once_evenly_and_in_order() -> None:
    samples = StepSamples(began_s=100.0)
    for turn in range(100):
        samples.add("w0", [step(turn * 10 + i, 100.0 + turn + i / 10) for i in range(-5, 10)])
    kept = samples.take("w0")
    assert len(kept) == 256
    times = [s.at_s for s in kept]
    assert times == sorted(set(times))
    assert kept[0] == Step(kept[0].at_s, 5, 5, 0, 0.0, 100, 15.0)
    assert sum(t < 50 for t in times) / 256 == pytest.approx(0.5, abs=0.15)
    assert samples.take("w0") == ()
