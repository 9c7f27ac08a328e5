"""The settings, each with its default, its parser and its text for the user."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nexusengine.config.parsers import (
    one_of,
    parse_api_key,
    parse_bool,
    parse_bytes,
    parse_origins,
    parse_secret,
    parse_trace_file,
    seconds,
    whole,
)

DEFAULT_MODEL = "smollm2-135m"
Quantization = Literal["none", "bf16", "int8", "int4"]
"""How weights are stored: as they are, as bfloat16, with 8 bits, with 4 bits. Activations keep their dtype outside of
the multiplication."""


def setting(
    default: Any, help: str, *, parse: Callable[[Any], Any] = str, group: str, metavar: str | None = None
) -> Any:
    """A dataclass field with what is needed to read it from text and to document it."""
    return dataclasses.field(
        default=default, metadata={"help": help, "parse": parse, "group": group, "metavar": metavar}
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine: model, memory, scheduling. Used by `Engine(...)` and by every worker."""

    model: str = setting(
        DEFAULT_MODEL,
        "short name (see nexusengine models), Hugging Face repository (OWNER/NAME, OWNER/NAME:Q4_K_M), directory "
        "or .gguf file",
        group="model",
        metavar="M",
    )
    revision: str | None = setting(None, "branch, tag or commit of the repository", group="model")
    devices: str = setting(
        "auto",
        "auto, or a list: cuda:0,cuda:1 / cpu / cpu:2,cpu:2 / emulated:h100,emulated:l4",
        group="model",
        metavar="D",
    )
    generation_config: str = setting(
        "model",
        "where a request's missing sampling parameters come from: model (its generation_config.json or GGUF keys), or "
        "none (OpenAI's defaults)",
        parse=one_of("model", "none"),
        group="model",
    )
    dtype: str = setting(
        "auto",
        "type of weights and, by default, KV cache: float32, float16, bfloat16, or auto: the checkpoint's on a GPU, "
        "float32 on a CPU",
        parse=one_of("auto", "float32", "float16", "bfloat16"),
        group="model",
    )
    quantization: str = setting(
        "none",
        "how weights are stored on a CPU: none, bf16, int8 or int4 (see docs/cpu.md for what each costs in quality)",
        parse=one_of("none", "bf16", "int8", "int4"),
        group="model",
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt + output in tokens; default: the model's, or what the KV cache holds",
        parse=whole(16),
        group="memory",
    )
    kv_cache_memory: int | None = setting(
        None,
        "memory for the KV cache of each worker, e.g. 2GiB; default: chosen from what is free",
        parse=parse_bytes,
        group="memory",
    )
    kv_cache_dtype: str = setting(
        "auto",
        "type of the KV cache: auto is the weights', fp8 has 8 bits (compute capability 8.9; see docs/cuda.md)",
        parse=one_of("auto", "fp8"),
        group="memory",
    )
    block_size: int | None = setting(
        None, "tokens in a KV block; default: what the attention backend prefers", parse=whole(1, 1024), group="memory"
    )
    prefix_caching: bool = setting(True, "reuse KV blocks of equal prompt beginnings", parse=parse_bool, group="memory")
    max_batch_tokens: int = setting(2048, "most tokens computed in a step", parse=whole(16, 65_536), group="scheduling")
    max_running: int = setting(
        256, "most sequences with KV at a time in a worker", parse=whole(1, 4096), group="scheduling"
    )
    max_waiting: int = setting(1024, "most requests waiting in a worker", parse=whole(1, 100_000), group="scheduling")
    scheduler: str = setting(
        "lens",
        "engine policy: lens, fcfs, vllm, sarathi, prefill-first, edf, srpt or paper-lens; with options, "
        "NAME:key=value,... (see docs/lens.md)",
        group="scheduling",
        metavar="NAME",
    )
    slo_classes: str | None = setting(
        None,
        "TOML file with the latency classes that requests can name; default: interactive, standard and batch",
        group="scheduling",
        metavar="FILE",
    )
    performance_model: str = setting(
        "online",
        "how step times are predicted: online, or paper-surface, line, line2 for comparison",
        parse=one_of("online", "paper-surface", "line", "line2"),
        group="scheduling",
        metavar="NAME",
    )
    calibrate: bool = setting(
        True, "measure a few made-up steps at the start, for up to two seconds", parse=parse_bool, group="scheduling"
    )
    step_times: str | None = setting(
        None,
        "folder where workers keep what they learn of step times, for their next start; none: keep nothing; default: "
        "step-times in the cache folder",
        group="scheduling",
        metavar="DIR",
    )
    step_log: str | None = setting(
        None,
        "append the composition and duration of every step to FILE.jsonl.gz, with several workers one file each",
        group="scheduling",
        metavar="FILE",
    )
    async_scheduling: bool = setting(
        True, "plan a step while the one before runs, on devices beside the host", parse=parse_bool, group="scheduling"
    )
    enforce_eager: bool = setting(False, "run decode steps without CUDA graphs", parse=parse_bool, group="model")
    attention_backend: str | None = setting(
        None,
        "attention backend, one of those that nexusengine doctor lists; default: the best that works here",
        group="model",
    )
    seed: int = setting(0, "seed of the noise of emulated devices", parse=whole(0), group="model")


@dataclass(frozen=True, slots=True)
class ServeConfig(EngineConfig):
    """Settings of `nexusengine serve`: an engine behind a router and an HTTP server."""

    served_model_name: str | None = setting(None, "name clients use; default: the value of --model", group="http")
    host: str = setting("127.0.0.1", "address to listen on", group="http")
    port: int = setting(8000, "port to listen on; 0 takes a free one", parse=whole(0, 65_535), group="http")
    api_key: str | None = setting(None, "ask clients for this bearer token", parse=parse_api_key, group="http")
    cors_origins: str | None = setting(
        None,
        "origins whose web pages may call this server, e.g. https://example.org,http://localhost:3000, or *",
        parse=parse_origins,
        group="http",
    )
    max_body_bytes: int = setting(8 * 2**20, "largest request body", parse=parse_bytes, group="http")
    max_buffered_bytes: int = setting(
        256 * 2**20,
        "most bytes of request bodies being received at a time; bodies up to 64 KiB are always accepted",
        parse=parse_bytes,
        group="http",
    )
    header_timeout: float = setting(
        30.0, "seconds a connection has to send the headers of a request", parse=seconds(0.1), group="http"
    )
    sse_keepalive: float = setting(
        5.0,
        "seconds without output after which a stream gets an SSE comment, so that proxies keep it open; 0: never",
        parse=seconds(0.0),
        group="http",
    )
    max_requests: int = setting(4096, "most requests in the server at a time", parse=whole(1, 1_000_000), group="http")
    request_timeout: float = setting(
        600.0, "seconds after which a request is aborted", parse=seconds(0.1), group="http"
    )
    default_slo_class: str | None = setting(
        None,
        "class of requests that ask for no SLO, or none; default: standard if there is such a class, else none",
        group="scheduling",
    )
    debug_endpoints: bool = setting(
        False,
        "serve /debug/steps and /debug/requests/ID, which show lengths and times of everybody's requests",
        parse=parse_bool,
        group="http",
    )
    nexus_verdict: bool = setting(
        False,
        "put the nexus object (SLO, latencies, met or missed) into every reply, not only where asked for",
        parse=parse_bool,
        group="http",
    )
    record_trace: str | None = setting(
        None,
        "write a line for every request to FILE.jsonl, without text, for nexusengine sim, plan and bench serve (see "
        "docs/planning.md)",
        parse=parse_trace_file,
        group="recording",
        metavar="FILE",
    )
    record_trace_bytes: int = setting(
        256 * 2**20,
        "size at which that file is rotated, e.g. 64MiB",
        parse=parse_bytes,
        group="recording",
    )
    record_trace_files: int = setting(
        8, "most files of it that are kept, with the newest", parse=whole(1, 100_000), group="recording", metavar="N"
    )
    record_trace_key: str | None = setting(
        None,
        "secret of the hashes in it, at least 16 characters, better given in the environment; default: drawn at each "
        "start and never written, so that hashes can be compared within one recording only",
        parse=parse_secret,
        group="recording",
    )
    router: str = setting(
        "prism",
        "placement policy of the router: prism, round-robin, rr-veto, least-requests (or least-outstanding), "
        "least-tokens, p2c, capacity-weighted, cache-aware, lmetric or paper-prism (see docs/prism.md)",
        group="scheduling",
        metavar="NAME",
    )
    max_held: int = setting(
        4096, "most requests the router holds while no worker can take them", parse=whole(0), group="scheduling"
    )
    snapshot_period: float = setting(
        0.1, "seconds between a worker's reports to the router", parse=seconds(0.005, 10.0), group="scheduling"
    )
    drain_timeout: float = setting(
        30.0,
        "seconds that running requests have to finish after SIGTERM",
        parse=seconds(0.0, 3600.0),
        group="processes",
    )
    start_timeout: float = setting(
        600.0, "seconds a worker has to load its model", parse=seconds(1.0), group="processes"
    )
    max_restarts: int = setting(
        5, "restarts of one process within five minutes before serve gives up", parse=whole(0, 1000), group="processes"
    )
    runtime_dir: str | None = setting(
        None, "folder for sockets; default: a private one, removed at the end", group="processes"
    )
    log_level: str = setting(
        "info",
        "how much is logged: debug, info, warning or error",
        parse=one_of("debug", "info", "warning", "error"),
        group="processes",
    )

    @property
    def public_name(self) -> str:
        """The model's name in messages and replies, which are UTF-8; a file's name need not be."""
        name = self.served_model_name or self.model
        return name.encode(errors="backslashreplace").decode()
