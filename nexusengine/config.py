"""Settings: one typed table that makes the CLI options, TOML keys, environment names and docs/configuration.md.

A setting's value comes from, strongest first: the command line, NEXUSENGINE_<NAME> in the environment, the TOML file,
the default. Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from nexusengine.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"
ENV_PREFIX = "NEXUSENGINE_"
Quantization = Literal["none", "bf16", "int8", "int4"]
"""How weights are stored: as they are, as bfloat16, with 8 bits, with 4 bits. Activations keep their dtype outside of
the multiplication."""
T = TypeVar("T")


# ---- parsers: text in, value out; a ValueError's message is shown to the user -------------------------------------


def parse_bytes(text: str | int) -> int:
    """`2GiB`, `500M`, `1.5G`, `1048576`: bytes, at least 1. K, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 2GiB or 500M")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    size = int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
    if size < 1:
        raise ValueError(f"{text!r} is no memory at all")
    return size


def parse_bool(text: str | bool) -> bool:
    if isinstance(text, bool):
        return text
    if str(text).lower() in {"1", "true", "yes", "on"}:
        return True
    if str(text).lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str | int], int]:
    """Parser of whole numbers in [low, high]."""

    def parse(text: str | int) -> int:
        try:
            value = int(str(text))
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{value} is not between {low} and {high}")
        return value

    return parse


def seconds(low: float, high: float = 86_400.0) -> Callable[[str | float], float]:
    """Parser of durations in seconds in [low, high]."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number of seconds") from None
        if not low <= value <= high:
            raise ValueError(f"{value} s is not between {low} and {high}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """Parser of one word out of several."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse


def parse_api_key(text: str) -> str:
    """A bearer token as an Authorization header can carry it: visible ASCII characters."""
    if not re.fullmatch(r"[!-~]+", text, re.ASCII):
        wrong = "it is empty" if not text else "it holds spaces or characters that are not ASCII"
        raise ValueError(f"this API key cannot be sent in a header: {wrong}; leave the setting out to ask for none")
    return text


def parse_origins(text: str) -> str:
    """`*`, or origins as browsers send them, separated by commas: https://example.org,http://localhost:3000."""
    origins = [word.strip() for word in text.split(",")]
    wrong = [o for o in origins if o != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,?#]+|null", o)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no origin; write *, or scheme://host:port without a path")
    return ",".join(origins)


# ---- devices ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device a worker runs on: `cuda:N`, `cpu` or `cpu:THREADS`, `emulated:PROFILE`."""

    kind: Literal["cuda", "cpu", "emulated"]
    index: int | None = None
    threads: int | None = None
    profile: str | None = None

    def __str__(self) -> str:
        suffix = {"cuda": self.index, "cpu": self.threads, "emulated": self.profile}[self.kind]
        return self.kind if suffix is None else f"{self.kind}:{suffix}"


def parse_device(text: str) -> DeviceSpec:
    """Raises ConfigError naming the word that is not a device."""
    kind, colon, rest = text.strip().partition(":")
    if kind == "cpu" and not colon:
        return DeviceSpec("cpu")
    if kind == "cpu" and rest.isdigit() and 1 <= int(rest) <= 1024:
        return DeviceSpec("cpu", threads=int(rest))
    if kind == "cuda" and (not colon or rest.isdigit()):
        return DeviceSpec("cuda", index=int(rest or 0))
    if kind == "emulated" and rest:
        return DeviceSpec("emulated", profile=rest)
    raise ConfigError(
        f"{text!r} is not a device; write cuda:N, cpu, cpu:THREADS or emulated:PROFILE, separated by commas",
        param="devices",
    )


def count_cuda_devices() -> int:
    """GPUs the NVIDIA driver shows and CUDA_VISIBLE_DEVICES does not hide; 0 without a driver. No torch."""
    from nexusengine import nvml as gpus

    return len(gpus.visible())


def parse_devices(text: str) -> tuple[DeviceSpec, ...]:
    """`auto` (every GPU, else the CPU) or a comma-separated list. Raises ConfigError."""
    if text.strip() == "auto":
        gpus = count_cuda_devices()
        return tuple(DeviceSpec("cuda", index=i) for i in range(gpus)) or (DeviceSpec("cpu"),)
    devices = tuple(parse_device(word) for word in text.split(",") if word.strip())
    if not devices:
        raise ConfigError("no device given; write auto, cuda:0, cpu, ...", param="devices")
    twice = sorted({str(d) for d in devices if d.kind == "cuda" and devices.count(d) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is listed twice; a GPU has one worker", param="devices")
    return devices


# ---- the table ----------------------------------------------------------------------------------------------------


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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, table: type, *, skip: frozenset[str] = frozenset()) -> None:
    """An option for every setting of `table`. Values stay text until `load` parses them: one place, one message."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(table):
        if f.name in skip:
            continue
        name = f.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        default = "" if f.default is None else f" (default: {f.default})"
        help = (f.metadata["help"] + default).replace("%", "%%")
        if isinstance(f.default, bool):
            group.add_argument(
                flag(f.name), help=help, dest=f.name, default=None, action=argparse.BooleanOptionalAction
            )
        else:
            metavar = f.metadata["metavar"] or f.name.rsplit("_", 1)[-1].upper()
            group.add_argument(flag(f.name), help=help, dest=f.name, default=None, metavar=metavar)


def load(
    table: type[T],
    given: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    toml_file: str | Path | None = None,
) -> T:
    """Build `table` from `given` (None means not given), the environment and a TOML file.

    Raises ConfigError naming the setting, where it came from and what it should be.
    """
    environ = os.environ if environ is None else environ
    from_file = _read_toml(Path(toml_file)) if toml_file else {}
    fields = {f.name: f for f in dataclasses.fields(table)}  # type: ignore[arg-type]
    unknown = sorted(set(from_file) - set(fields))
    if unknown:
        raise ConfigError(f"{toml_file}: unknown setting {unknown[0]!r}", param=unknown[0])
    values: dict[str, Any] = {}
    for name, f in fields.items():
        env = ENV_PREFIX + name.upper()
        sources = [
            (flag(name), given.get(name)),
            (env, environ.get(env)),
            (f"{name} in {toml_file}", from_file.get(name)),
        ]
        for source, raw in sources:
            if raw is None:
                continue
            try:
                values[name] = f.metadata["parse"](raw)
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(f"{source}: {error}", param=name) from None
            break
    return table(**values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text("utf-8-sig")).items()}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", param="config") from None


def markdown(table: type) -> str:
    """The settings of `table` as a Markdown table: docs/configuration.md is made of this."""
    lines = ["| option | environment | default | what it is |", "|---|---|---|---|"]
    for f in dataclasses.fields(table):
        default = "" if f.default is None else f"`{f.default}`"
        lines.append(f"| `{flag(f.name)}` | `{ENV_PREFIX}{f.name.upper()}` | {default} | {f.metadata['help']} |")
    return "\n".join(lines) + "\n"
