"""Files of traces: how they are read, and which are refused; those of ../shared."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.sim.workload.build import Builder, WorkloadSpec
from nexusengine.sim.workload.entries import Trace, read_trace
from tests.support.workloads import arrivals, build, lengths

SHARED = Path(__file__).parents[2].parent / "shared" / "traces"
needs_traces = pytest.mark.skipif(not SHARED.exists(), reason="../shared/traces is not here")


# ---- files -------------------------------------------------------------------------------------------------------


def test_csv_and_jsonl_zipped_or_not_are_the_same_trace(conv: Path, tmp_path: Path) -> None:
    trace = read_trace(conv)
    zipped = tmp_path / "conv.csv.gz"
    zipped.write_bytes(gzip.compress(conv.read_bytes()))
    lines = tmp_path / "conv.jsonl"
    rows = [
        {"arrival_s": e.arrival_s, "input_tokens": e.input_tokens, "output_tokens": e.output_tokens}
        for e in trace.entries
    ]
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert read_trace(zipped).entries == read_trace(lines).entries == trace.entries
    assert trace.entries[0].arrival_s == 0.0
    assert trace.length_s == pytest.approx(200.0)


def test_the_originals_of_the_azure_and_mooncake_traces_are_understood(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:05.9799600,9,1\n"
    )
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [4, 9]}\n')
    assert [(e.arrival_s, e.input_tokens, e.output_tokens) for e in read_trace(azure).entries] == [
        (0, 374, 44),
        (2, 9, 1),
    ]
    entry = read_trace(mooncake).entries[0]
    assert (entry.input_tokens, entry.output_tokens, tuple(entry.block_ids), entry.block_tokens) == (
        700,
        5,
        (4, 9),
        512,
    )


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.csv", "arrival_s,input_tokens\n0,5\n", "line 2: output_tokens is missing"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n0,5,6\n1,-3,6\n", "line 3: input_tokens must be .* '-3'"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n0,5,6\n1,3\n", "line 3: has not as many fields"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\nsoon,5,6\n", "line 2: arrival_s must be .* 'soon'"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n0,5,6\n,5,6\n", "some requests have an arrival_s"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n", "no request"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", "line 2: TIMESTAMP"),
        ("a.jsonl", '{"input_tokens": 5, "output_tokens": 6}\n{"input', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", '{"input_tokens": 5.5, "output_tokens": 6}\n', "line 1: input_tokens must be"),
        ("a.jsonl", '{"input_tokens": 5, "output_tokens": 6, "hash_ids": "x"}\n', "line 1: hash_ids"),
        ("a.jsonl", '{"session": 1, "input_tokens": 5, "output_tokens": 6, "hash_runs": [[1]]}\n', "line 1: hash_runs"),
        ("a.csv", f"input_tokens,output_tokens\n{2**63},6\n", "line 2: input_tokens must be .* '9223372036854775808'"),
        ("a.jsonl", f'{{"input_tokens": 5, "output_tokens": {2**53 + 1}}}\n', "line 1: output_tokens must be"),
        ("a.jsonl", f'{{"input_tokens": 5, "output_tokens": {10**400}}}\n', "line 1: output_tokens must be"),
        ("a.jsonl", f'{{"arrival_s": {10**400}, "input_tokens": 5, "output_tokens": 6}}\n', "line 1: arrival_s must"),
        ("a.jsonl", f'{{"input_tokens": 5, "output_tokens": 6, "hash_ids": [{2**64}]}}\n', "line 1: hash_ids"),
        ("a.csv", "arrival_s,input_tokens,output_tokens\n0,5,6\n1e300,5,6\n", "arrive over 1e.300 s; at most 1e.09 s"),
        ("a.csv.gz", "not gzip", "is not CSV"),
        ("a.jsonl", '{"rate_windows": [], "dataset_windows": {}}\n{"rate_windows": 3}\n', "line 2: not a client model"),
    ],
)
def test_a_bad_trace_is_refused_with_file_and_line(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        build(path)
    assert str(path) in caught.value.message or path.name in caught.value.message


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    rows = '{"input_tokens": 5, "output_tokens": 6}\n' if "json" in name else "input_tokens,output_tokens\r\n5,6\r\n"
    content = rows.encode("utf-8-sig")
    assert content.startswith(b"\xef\xbb\xbf")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (entry,) = read_trace(tmp_path / name).entries
    assert (entry.input_tokens, entry.output_tokens) == (5, 6)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"rate_rps": 1e-9}, "arrive over 9.9e.10 s; at most 1e.09 s are simulated"),
        ({"rate_rps": 1.0, "duration_s": 1e10}, "duration must be at most 1e.09 s, got 1e.10"),
        ({"rate_rps": 1.0, "duration_s": 1e8}, "1 requests/s for 1e.08 s are more than 5000000 requests"),
        ({"rate_rps": 1e9, "duration_s": 1e3, "arrivals": "poisson"}, "more than 5000000 requests"),
    ],
)
def test_more_time_or_requests_than_can_be_simulated_are_refused(
    conv: Path, spec: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build(conv, **spec)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.csv: No such file"):
        build(tmp_path / "nowhere.csv")


# ---- the traces of ../shared -------------------------------------------------------------------------------------


@needs_traces
def test_the_azure_hour_is_offered_as_it_was() -> None:
    workload = build(SHARED / "azure2023_conv.csv.gz")
    assert len(workload.jobs) == 19366
    assert np.mean(lengths(workload), axis=0) == pytest.approx((1155, 211), abs=1)
    assert workload.notes["rate_rps"] == pytest.approx(5.53, abs=0.01)
    assert workload.notes["prompts_clipped"] == 0


@needs_traces
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mooncake_conversation.jsonl.gz", {"duration_s": 60.0}),
        ("sharegpt_lengths_llama2.csv.gz", {"arrivals": "gamma:2", "rate_rps": 5.0, "duration_s": 60.0}),
        ("arxiv_summarization_lengths_llama2.csv.gz", {"arrivals": "poisson", "rate_rps": 5.0, "duration_s": 60.0}),
        ("servegen/m_small.jsonl.gz", {"rate_rps": 5.0, "duration_s": 600.0}),
        ("servegen/deepseek_r1.jsonl.gz", {"rate_rps": 5.0, "duration_s": 600.0}),
    ],
)
def test_every_shared_trace_makes_a_workload(name: str, spec: dict[str, object]) -> None:
    one, again = build(SHARED / name, **spec), build(SHARED / name, **spec)
    assert one.jobs == again.jobs
    at_s = arrivals(one)
    assert (np.diff(at_s) >= 0).all()
    assert at_s[-1] < one.duration_s
    other = Builder(WorkloadSpec(trace=str(SHARED / name), seed=1, **spec)).build()  # type: ignore[arg-type]
    assert lengths(other) != lengths(one)


@needs_traces
def test_mooncake_prompts_share_blocks_as_its_readme_says() -> None:
    trace = read_trace(SHARED / "mooncake_conversation.jsonl.gz")
    assert isinstance(trace, Trace)
    seen: set[int] = set()
    hits = total = 0
    for entry in trace.entries:
        total += len(entry.block_ids)
        leading = 0
        while leading < len(entry.block_ids) and entry.block_ids[leading] in seen:
            leading += 1
        hits += leading
        seen.update(entry.block_ids)
    assert hits / total == pytest.approx(0.366, abs=0.005)
    assert replace(trace.entries[0], think_s=0.0).block_tokens == 512
