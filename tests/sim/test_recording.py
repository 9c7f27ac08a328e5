"""Recorded traces in the simulator: read as they were written, and refused with file and line where they are broken."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexusengine.cli.main import main
from nexusengine.errors import ConfigError
from nexusengine.perf.registry import make_model
from nexusengine.recording import format as lines
from nexusengine.sim.api import SimSpec, simulate
from nexusengine.sim.compare import compare
from nexusengine.sim.this import expand
from nexusengine.sim.workload.build import Builder, WorkloadSpec
from nexusengine.sim.workload.recording import read_recording
from tests.support.recordings import header, request, sample, worker, workload, write

COUNTS = st.integers(1, 3000)
BOUNDS = st.none() | st.builds(
    lines.Bounds,
    ttft_ms=st.floats(1.0, 1e6),
    tpot_ms=st.floats(0.1, 1e5),
    e2e_ms=st.none() | st.floats(1.0, 1e7),
)


@st.composite
def recorded_requests(draw: st.DrawFn) -> list[lines.Request]:
    found = []
    for i in range(draw(st.integers(1, 12))):
        prompt, output = draw(COUNTS), draw(COUNTS)
        ids = draw(
            st.lists(st.integers(0, 2**53 - 1), min_size=(prompt + output) // 16, max_size=(prompt + output) // 16)
        )
        slo = draw(BOUNDS)
        found.append(
            request(
                i,
                arrival_s=draw(st.floats(0.0, 1e6)),
                input_tokens=prompt,
                output_tokens=output,
                max_tokens=draw(st.none() | st.integers(output, 4000)),
                slo=slo,
                slo_class=None if slo is None else draw(st.sampled_from(["interactive", "custom", "été"])),
                priority=draw(st.integers(-100, 100)),
                tenant=draw(st.none() | st.just("0f" * 8)),
                block_tokens=16,
                hash_ids=tuple(ids[: prompt // 16]),
                answer_hash_ids=tuple(ids[prompt // 16 :]),
                ended=draw(st.sampled_from(["stop", "length", "left"])),
            )
        )
    return found


@settings(max_examples=80, deadline=None)
@given(requests=recorded_requests())
def test_what_is_read_is_what_was_written(
    requests: list[lines.Request], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("t") / "load.jsonl", [header(), *requests])
    jobs = workload(path).jobs
    first_s = min(line.arrival_s for line in requests)
    for job, line in zip(jobs, sorted(requests, key=lambda line: line.arrival_s), strict=True):
        asked = job.request
        assert asked.arrival_s == pytest.approx(line.arrival_s - first_s, abs=1e-6)
        assert (job.prompt_tokens, job.output_tokens) == (line.input_tokens, line.output_tokens)
        assert (asked.sampling.max_tokens, asked.priority) == (line.max_tokens, line.priority)
        assert (asked.slo_class, job.request.tenant) == (line.slo_class, line.tenant)
        if line.slo is None:
            assert asked.slo is None
        else:
            assert asked.slo is not None
            assert asked.slo.ttft_s == pytest.approx(line.slo.ttft_ms / 1e3)
            assert asked.slo.tpot_s == pytest.approx(line.slo.tpot_ms / 1e3)
            assert asked.slo.e2e_s == (None if line.slo.e2e_ms is None else pytest.approx(line.slo.e2e_ms / 1e3))
        ids = line.hash_ids + line.answer_hash_ids
        assert [int.from_bytes(name, "little") for name in job.block_names(16)] == list(ids)


def test_a_set_of_files_is_one_trace_in_whatever_order_it_is_given(tmp_path: Path) -> None:
    requests = [request(i, arrival_s=float(i)) for i in range(9)]
    files = [
        write(tmp_path / f"p{part}.jsonl", [header(part=part), *requests[3 * part : 3 * part + 3]]) for part in range(3)
    ]
    later = write(tmp_path / "b.jsonl", [header(recording="b", started_unix_s=1100.0), request(0, arrival_s=2.0)])
    whole = workload(*files, later)
    assert [job.request.arrival_s for job in whole.jobs] == [*map(float, range(9)), 102.0]
    shuffled = [files[2], later, files[0], files[1]]
    assert workload(*shuffled) == whole
    with pytest.raises(ConfigError, match="same part"):
        workload(files[0], files[1], files[0])


def test_where_files_are_gone_nothing_is_read_of_which_only_a_part_is_known(tmp_path: Path) -> None:
    parts = []
    for part in range(4):
        ended = [request(i, arrival_s=10.0 * part + i - 2.0) for i in range(1 if part == 0 else 0, 9)]
        ended = [line for line in ended if line.arrival_s >= 0.0]
        content: list[lines.Line] = [header(part=part, opened_s=10.0 * part), *ended]
        parts.append(write(tmp_path / f"p{part}.jsonl", content))
    assert len(workload(*parts).jobs) == 7 + 3 * 9
    kept = workload(*parts[2:]).jobs
    assert len(kept) == 7 + 9
    assert kept[0].request.arrival_s == 0.0
    with pytest.raises(ConfigError, match=r"part 1 of the recording is missing between .*p0.jsonl .* and .*p2.jsonl"):
        workload(parts[0], parts[2])


def test_speed_and_rate_squeeze_time_and_nothing_else(tmp_path: Path) -> None:
    path = sample(tmp_path / "load.jsonl")
    own, fast = workload(path), workload(path, speed=2.0)
    for a, b in zip(own.jobs, fast.jobs, strict=True):
        assert b.request.arrival_s == pytest.approx(a.request.arrival_s / 2)
        assert b.request.slo == a.request.slo
    assert workload(path, rate_rps=own.notes["rate_rps"] * 3).duration_s == pytest.approx(own.duration_s / 3, rel=0.05)


def test_slos_can_be_overridden(tmp_path: Path) -> None:
    jobs = workload(sample(tmp_path / "load.jsonl"), classes="batch").jobs
    assert {job.request.slo_class for job in jobs} == {"batch"}
    assert jobs[0].request.slo is not None
    assert jobs[0].request.slo.tpot_s == 0.5


def test_a_load_can_be_offered_without_slos(tmp_path: Path) -> None:
    for trace in (sample(tmp_path / "load.jsonl"), "lengths:input=10,output=5"):
        spec = WorkloadSpec(trace=trace, arrivals="poisson", rate_rps=5.0, duration_s=4.0, classes="none")
        jobs = Builder(spec).build().jobs
        assert jobs
        assert all(job.request.slo is None and job.request.slo_class is None for job in jobs)


def test_what_was_cut_short_gets_the_length_of_its_class(tmp_path: Path) -> None:
    known = [request(i, output_tokens=n, slo_class="a") for i, n in enumerate((10, 30))]
    cut = [
        request(3, output_tokens=0, slo_class="a", ended="refused"),
        request(4, output_tokens=25, slo_class="b", ended="failed"),
        request(5, output_tokens=0, slo_class="a", ended="refused", max_tokens=8),
        request(6, output_tokens=0, slo_class="a", ended="left"),
    ]
    unread = request(7, input_tokens=None, ended="refused")
    path = write(tmp_path / "load.jsonl", [header(), *known, *cut, unread])
    recording = read_recording([path])
    assert recording.output_tokens == (10, 30, 20, 25, 8, 1)
    assert recording.unread == 1


# ---- broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rows: [*rows[:3], '{"request": 1'], "line 4: not JSON"),
        (lambda rows: rows[1:], "line 1"),
        (lambda rows: [*rows, rows[0]], "a second header"),
        (lambda rows: [rows[0].replace('"nexusengine_trace":1', '"nexusengine_trace":99')], "version 99"),
        (lambda rows: [rows[0]], "has no request in it"),
        (lambda rows: [*rows, "[1]"], "not a JSON object"),
        (
            lambda rows: [*rows, '{"request":1,"arrival_s":-1,"input_tokens":1,"output_tokens":1,"ended":"stop"}'],
            "$.arrival_s",
        ),
        (
            lambda rows: [*rows, '{"request":1,"arrival_s":NaN,"input_tokens":1,"output_tokens":1,"ended":"stop"}'],
            "arrival_s",
        ),
        (
            lambda rows: [*rows, '{"request":1,"arrival_s":1,"input_tokens":1e30,"output_tokens":1,"ended":"stop"}'],
            "input_tokens",
        ),
        (
            lambda rows: [*rows, '{"request":1,"arrival_s":1,"input_tokens":1,"output_tokens":1,"ended":"fine"}'],
            "$.ended",
        ),
        (lambda rows: [rows[0], rows[1].replace('"cpu:1"', '"gpu?"'), *rows[2:]], "line 2"),
        (lambda rows: [rows[0], rows[1].replace('"kv_tokens":16000', '"kv_tokens":0'), *rows[2:]], "kv_tokens"),
        (lambda rows: [*rows, rows[2].replace("{", '{"block_tokens":32,', 1).replace('"block_tokens":16,', "")], "32"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_line(tmp_path: Path, edit: Any, words: str) -> None:
    path = tmp_path / "load.jsonl"
    content: list[lines.Line] = [header(), lines.Workers(at_s=1.0, workers=(worker(),))]
    content.append(request(0, block_tokens=16, hash_ids=(1, 2, 3)))
    rows = [lines.encode(line).decode().rstrip() for line in content]
    path.write_text("\n".join(edit(rows)) + "\n")
    with pytest.raises(ConfigError) as caught:
        workload(str(path))
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_random_damage_gives_a_workload_or_one_error_that_names_the_file(tmp_path: Path) -> None:
    path, rng = tmp_path / "load.jsonl", random.Random(5)
    whole = Path(sample(tmp_path / "whole.jsonl", 6)).read_bytes()
    said: list[str] = []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 40)]
            elif kind == 2:
                data[at:at] = rng.choice([b"9" * 20, b"-", b"null", b"\xff", b"[[[[", b'"', b"\n", b"1e999"])
            else:
                del data[at:]
        path.write_bytes(data)
        try:
            workload(str(path))
        except ConfigError as error:
            said.append(error.message)
    assert len(said) > 100
    assert [message for message in said if str(path) not in message] == []


# ---- the devices that served ----------------------------------------------------------------------------------------


def test_this_stands_for_the_recorded_workers(tmp_path: Path) -> None:
    recording = read_recording([sample(tmp_path / "load.jsonl")])
    assert expand(["this"], recording) == ["this:w0", "this:w1"]
    assert expand(["this-w1", "l4"], recording) == ["this:w0", "l4"]
    assert expand(["this:w1", "this:w1"], recording) == ["this:w1", "this:w1"]
    for wrong, words in ((["this:w7"], "w0, w1"), (["this-w7"], "w0, w1"), (["this-w0-w1"], "no device is left")):
        with pytest.raises(ConfigError, match=words):
            expand(wrong, recording)
    with pytest.raises(ConfigError, match="was not recorded"):
        expand(["this"], None)


SPEC = SimSpec(
    trace="", devices="this", classes="recorded", stated_limit="recorded", engine="fcfs", router="round-robin"
)


def test_a_learned_device_takes_the_time_that_its_worker_learned(tmp_path: Path) -> None:
    result = simulate(replace(SPEC, trace=sample(tmp_path / "load.jsonl"), noise=False, devices="this:w0"))
    assert result.metrics["tpot_ms"]["p50"] == pytest.approx(11.0, rel=0.1)
    assert result.metrics["workers"][0]["device"] == "cpu:1"


def test_an_emulated_device_is_its_profile(tmp_path: Path) -> None:
    emulated = worker("w0", "emulated:l4", learned=None, kv_tokens=4096)
    path = write(tmp_path / "load.jsonl", [header(), lines.Workers(at_s=0.0, workers=(emulated,)), request(0)])
    ours = simulate(replace(SPEC, trace=path, noise=False)).metrics
    profile = simulate(replace(SPEC, trace=path, noise=False, devices="l4")).metrics
    assert ours["tpot_ms"] == profile["tpot_ms"]
    assert ours["workers"][0]["kv_capacity_tokens"] == 4096


def test_sampled_steps_set_the_level_and_its_changes(tmp_path: Path) -> None:
    def took(at_s: float) -> lines.Step:
        slower = 1.5 if at_s < 10 else 3.0
        return lines.Step(at_s, 1, 1, 0, 0.0, 100, 11.0 * slower)

    steps = tuple(took(i / 10) for i in range(200))
    described = lines.Workers(at_s=20.0, workers=(worker(sampled=steps),))
    path = write(tmp_path / "load.jsonl", [header(), *[request(i, input_tokens=1) for i in range(40)], described])
    spec = replace(SPEC, trace=path, devices="this:w0")
    steady, changing = compare(spec, steady=True), compare(spec)
    assert steady["simulated"]["tpot_ms"]["mean"] == pytest.approx(11.0 * 2.25, rel=0.1)
    assert changing["simulated"]["tpot_ms"]["p90"] == pytest.approx(33.0, rel=0.1)
    low, high = changing["assumed"]["slowness_over_time"]
    assert high / low == pytest.approx(2.0, rel=0.05)


def test_the_model_of_another_version_is_learned_anew_from_the_sampled_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = msgspec.structs.replace(lines.Learned.of(make_model().snapshot()), kind="online-0", steps=9)
    steps = tuple(lines.Step(i / 10, 1, 1, 0, 0.0, 100, 25.0) for i in range(200))
    described = lines.Workers(at_s=20.0, workers=(worker(learned=other, sampled=steps),))
    content: list[lines.Line] = [header(), *[request(i, input_tokens=1) for i in range(9)], described]
    path = write(tmp_path / "load.jsonl", content)
    assert simulate(replace(SPEC, trace=path)).metrics["tpot_ms"]["mean"] == pytest.approx(25.0, rel=0.05)
    bare = lines.Workers(at_s=20.0, workers=(worker(learned=other),))
    path = write(tmp_path / "bare.jsonl", [*content[:-1], bare])
    assert main(["sim", "run", "--trace", path]) == 1
    assert "name other devices" in capsys.readouterr().err
    assert main(["sim", "run", "--trace", path, "--devices", "l4", "--model", "llama-3.1-8b"]) == 0


def test_prefixes_are_reused_as_they_were(tmp_path: Path) -> None:
    ids = tuple(range(100, 106))
    chat = [
        request(0, input_tokens=40, output_tokens=60, block_tokens=16, hash_ids=ids[:2], answer_hash_ids=ids[2:]),
        request(1, arrival_s=60.0, input_tokens=110, block_tokens=16, hash_ids=ids),
    ]
    path = write(tmp_path / "load.jsonl", [header(), lines.Workers(at_s=0.0, workers=(worker(),)), *chat])
    hits = simulate(replace(SPEC, trace=path, prefix_caching=True)).metrics["prefix_hit_rate"]
    assert hits == pytest.approx(6 * 16 / 150)
