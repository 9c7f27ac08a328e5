"""The lines of a recorded trace.

A file begins with its `Header`; `Workers` lines tell who served, the newest counts; all others are `Request` lines, in
the order in which requests ended. The keys that the simulator's traces have anyway are called as they are there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nexusengine.wire import PerfSnapshot

VERSION = 1
VERSION_KEY, WORKERS_KEY = "nexusengine_trace", "workers"
"""By these keys a line is told to be a Header or a Workers line."""
LARGEST_COUNT = 2**53

Ended = Literal["stop", "length", "left", "refused", "unfinished", "failed"]
"""How a request ended. left: its client went away; unfinished: its time limit was over."""

_Count = Annotated[int, Meta(ge=0, le=LARGEST_COUNT)]
_Tokens = Annotated[int, Meta(ge=0, le=2**31)]
_Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
_Milliseconds = Annotated[float, Meta(ge=0.0, le=1e12)]
_Name = Annotated[str, Meta(max_length=256)]


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the server that a simulation needs; see config.ServeConfig."""

    model: _Name
    devices: Annotated[str, Meta(max_length=65_536)]
    scheduler: _Name
    router: _Name
    performance_model: _Name = "online"
    prefix_caching: bool = True
    max_batch_tokens: Annotated[int, Meta(ge=1, le=2**31)] = 2048
    max_running: Annotated[int, Meta(ge=1, le=2**31)] = 256
    max_waiting: Annotated[int, Meta(ge=1, le=2**31)] = 1024
    snapshot_period: Annotated[float, Meta(gt=0.0, le=1e6)] = 0.1
    request_timeout: Annotated[float, Meta(gt=0.0, le=1e6)] = 600.0


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a file.

    Attributes:
        nexusengine_trace: VERSION.
        recording: drawn at the start of the server; the same in all files of a set.
        part: number of the file in its set, from 0.
        opened_s: when the file was begun, after the beginning of the recording. Every request that arrived later and
            has ended is in it or in a later one.
        started_unix_s: wall-clock time at which the recording began; `arrival_s` counts from there in all its files.
        keyed_by: "random": hashes can only be compared within this recording; "setting": also with others that have
            the same --record-trace-key.
    """

    nexusengine_trace: int
    recording: _Name
    part: _Count
    started_unix_s: Annotated[float, Meta(ge=0.0, le=1e11)]
    server: Server
    opened_s: _Seconds = 0.0
    keyed_by: Literal["random", "setting"] = "random"
    version: _Name = ""


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """The step-time model of a worker, see wire.PerfSnapshot."""

    kind: _Name
    weights: Annotated[tuple[float, ...], Meta(max_length=1024)]
    quantile: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    steps: _Count = 0
    epoch: _Count = 0

    @classmethod
    def of(cls, snapshot: PerfSnapshot) -> Learned:
        return cls(**msgspec.structs.asdict(snapshot))

    @property
    def snapshot(self) -> PerfSnapshot:
        return PerfSnapshot(self.kind, self.weights, self.quantile, self.steps, self.epoch)


class Step(msgspec.Struct, frozen=True, array_like=True):
    """A step that a worker took: when, its composition (see perf.features.StepFeatures), and its duration.

    Attributes:
        at_s: its beginning, after the beginning of the recording.
    """

    at_s: Annotated[float, Meta(ge=-1e9, le=1e9)]
    tokens: _Count
    sequences: _Count
    prefills: _Count
    prefill_attention: Annotated[float, Meta(ge=0.0, le=1e18)]
    decode_kv_tokens: _Count
    ms: Annotated[float, Meta(gt=0.0, le=1e9)]


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that served.

    Attributes:
        device: as in the setting `devices`.
        block_tokens, kv_tokens: in a KV block, and in its KV cache.
        steps, device_s, predicted_s, host_s: since it started: its steps, the seconds they took, the seconds they were
            predicted to take, and the seconds between steps while it had work.
        learned: its step-time model.
        sampled: some of its steps since the line before.
    """

    worker: _Name
    device: _Name
    dtype: _Name = ""
    block_tokens: Annotated[int, Meta(ge=1, le=1024)]
    kv_tokens: Annotated[int, Meta(ge=1, le=LARGEST_COUNT)]
    max_model_len: Annotated[int, Meta(ge=1, le=2**31)]
    max_batch_tokens: Annotated[int, Meta(ge=1, le=2**31)]
    steps: _Count = 0
    device_s: _Seconds = 0.0
    predicted_s: _Seconds = 0.0
    host_s: _Seconds = 0.0
    learned: Learned | None = None
    sampled: Annotated[tuple[Step, ...], Meta(max_length=65_536)] = ()


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    """The workers at `at_s` after the beginning of the recording."""

    at_s: _Seconds
    workers: Annotated[tuple[Worker, ...], Meta(max_length=4096)]


class Bounds(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An SLO for this request's prompt."""

    ttft_ms: Annotated[float, Meta(ge=1.0, le=86_400_000.0)]
    tpot_ms: Annotated[float, Meta(ge=0.1, le=3_600_000.0)]
    e2e_ms: Annotated[float, Meta(ge=1.0, le=86_400_000.0)] | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One generation; a request for n choices is n of them.

    Attributes:
        request: number of the HTTP request; the choices of one have the same.
        arrival_s: at the server, after the beginning of the recording.
        input_tokens: None if the request was turned away before its prompt was read.
        output_tokens: that were generated, with a stop token.
        max_tokens: that the client stated.
        slo_class: as named in the configuration, "custom" for an SLO in numbers; None without an SLO.
        tenant: keyed hash of `user` or of the API key.
        block_tokens, hash_ids: keyed hashes of the prompt's full blocks, each of everything up to its end.
        answer_hash_ids: of the full blocks that follow, with the answer.
        cached_tokens: of the prompt, found in the prefix cache.
        queue_ms, ttft_ms, tpot_ms, e2e_ms: by the server's clock from arrival: to the first step, to the first token,
            for each further token, to the last.
        met, met_strict, missed: the verdict; None without an SLO.
        error: code of the error that it ended with.
    """

    request: _Count
    arrival_s: _Seconds
    input_tokens: _Tokens | None
    output_tokens: _Tokens
    ended: Ended
    max_tokens: _Tokens | None = None
    slo_class: _Name | None = msgspec.field(name="class", default=None)
    slo: Bounds | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    tenant: _Name | None = None
    worker: _Name | None = None
    cached_tokens: _Tokens = 0
    preemptions: _Count = 0
    queue_ms: _Milliseconds | None = None
    ttft_ms: _Milliseconds | None = None
    tpot_ms: _Milliseconds | None = None
    e2e_ms: _Milliseconds | None = None
    met: bool | None = None
    met_strict: bool | None = None
    missed: _Name | None = None
    error: _Name | None = None
    block_tokens: Annotated[int, Meta(ge=0, le=1024)] = 0
    hash_ids: tuple[_Count, ...] = ()
    answer_hash_ids: tuple[_Count, ...] = ()


Line = Header | Workers | Request
_encoder = msgspec.json.Encoder()


def encode(line: Line) -> bytes:
    """One line, with its end."""
    return _encoder.encode(line) + b"\n"


def parse(row: dict[str, Any]) -> Line:
    """The line that a JSON object is. Raises msgspec.ValidationError, or ValueError for another version."""
    if VERSION_KEY in row:
        header = msgspec.convert(row, Header)
        if header.nexusengine_trace != VERSION:
            raise ValueError(f"a trace of version {header.nexusengine_trace}; this version reads {VERSION}")
        return header
    if WORKERS_KEY in row:
        return msgspec.convert(row, Workers)
    return msgspec.convert(row, Request)
