"""A measured run of vLLM, as files: the requests that were sent, the settings of the engine, what was measured."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nexusengine.arrays import F8
from nexusengine.errors import ConfigError
from nexusengine.kv.hashing import block_hashes

BLOCK_TOKENS = 16
_LARGEST_GRAPH = 512


@dataclass(frozen=True, slots=True)
class Sent:
    """A request. blocks: ids of the content of its prompt's full blocks of 16 tokens, equal where all before is too."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Settings of an engine, in vLLM's words; defaults are vLLM 0.19's.

    Attributes:
        kv_tokens, max_model_len: None for what the profile and the requests say.
        cudagraph_capture_sizes: None for vLLM's own choice, see `graph_sizes`.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = True
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    block_size: int = BLOCK_TOKENS
    kv_tokens: int | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    cudagraph_capture_sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured latencies by request, in the order they were sent; seconds.

    Attributes:
        ttft: from when the engine's core took the request from its queue to its first token.
        tpot: mean time of each token after that, NaN where there is none.
        e2e: to the last token.
    """

    ttft_s: F8
    tpot_s: F8
    e2e_s: F8

    @classmethod
    def of(cls, queued_s: F8, first_s: F8, last_s: F8, output_tokens: F8) -> Measured:
        with np.errstate(invalid="ignore", divide="ignore"):
            tpot_s = np.where(output_tokens > 1, (last_s - first_s) / (output_tokens - 1), np.nan)
        return cls(first_s - queued_s, tpot_s, last_s - queued_s)


def read_workload(path: str | Path) -> list[Sent]:
    """Read JSON lines, gzip or not, in either of two forms.

    `arrival_s, input_tokens, output_tokens, hash_ids`, or the generator's own `arrival_time_ns, input_toks,
    output_toks, input_tok_ids`. Raises ConfigError naming file and line.
    """
    sent: list[Sent] = []
    names: dict[bytes, int] = {}
    for number, row in _lines(Path(path)):
        try:
            if "arrival_s" in row:
                ids = tuple(int(i) for i in row.get("hash_ids") or ())
                sent.append(Sent(float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]), ids))
            else:
                hashes = block_hashes(np.array(row.get("input_tok_ids") or (), np.int32), BLOCK_TOKENS, b"")
                ids = tuple(names.setdefault(h, len(names)) for h in hashes)
                at_s = float(row["arrival_time_ns"]) / 1e9
                sent.append(Sent(at_s, int(row["input_toks"]), int(row["output_toks"]), ids))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: not a request: {error!r}", param="workload") from None
        if sent[-1].input_tokens < 1 or sent[-1].output_tokens < 1:
            raise ConfigError(f"{path}, line {number}: a request has at least one token each way", param="workload")
    if not sent:
        raise ConfigError(f"{path} has no request in it", param="workload")
    return sent


def read_measured(path: str | Path, sent: list[Sent]) -> Measured:
    """Of the folder of a run, or of its requests.jsonl itself. Raises ConfigError where it is not of this workload."""
    file = _requests_file(Path(path))
    rows = [row for _, row in _lines(file)]
    if len(rows) != len(sent):
        raise ConfigError(f"{file} has {len(rows)} requests, the workload has {len(sent)}", param="measured")
    rows.sort(key=lambda row: _number_of(str(row.get("request_id", ""))))
    for row, request in zip(rows, sent, strict=True):
        if (row.get("input_toks"), row.get("output_toks")) != (request.input_tokens, request.output_tokens):
            raise ConfigError(
                f"{file}: {row.get('request_id')} has {row.get('input_toks')} + {row.get('output_toks')} tokens, the "
                f"workload has {request.input_tokens} + {request.output_tokens} there",
                param="measured",
            )
    try:
        columns = [
            np.array([float(row[key]) for row in rows])
            for key in ("queued_ts", "first_token_ts", "last_token_ts", "output_toks")
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file}: a request has no {error}", param="measured") from None
    return Measured.of(*columns)


def read_settings(path: str | Path) -> VllmSettings:
    """From meta.json beside the measurements; what it does not say stays vLLM's default."""
    file = Path(path)
    meta_file = (file if file.is_dir() else file.parent) / "meta.json"
    if not meta_file.exists():
        return VllmSettings()
    try:
        meta = json.loads(meta_file.read_text())
    except ValueError as error:
        raise ConfigError(f"{meta_file} is not JSON: {error}", param="measured") from None
    return settings_of(meta)


def settings_of(meta: Mapping[str, Any]) -> VllmSettings:
    """The resolved configuration counts before the arguments given; the KV cache is what was allocated."""
    resolved = meta.get("resolved_config") or {}
    scheduler, cache = resolved.get("scheduler_config") or {}, resolved.get("cache_config") or {}
    places = [scheduler, cache, resolved.get("model_config") or {}, meta.get("kv_cache") or {}]
    places.append(meta.get("engine_kwargs") or {})
    found: dict[str, Any] = {}
    for name in VllmSettings.__dataclass_fields__:
        values = [place[name] for place in places if isinstance(place, Mapping) and place.get(name) is not None]
        if values and isinstance(values[0], bool | int):
            found[name] = values[0]
    captured = (resolved.get("compilation_config") or {}).get("cudagraph_capture_sizes")
    if isinstance(captured, list):
        found["cudagraph_capture_sizes"] = tuple(sorted(int(size) for size in captured))
    settings = replace(VllmSettings(), **found)
    blocks = (meta.get("kv_cache") or {}).get("num_gpu_blocks") or cache.get("num_gpu_blocks")
    if isinstance(blocks, int):
        settings = replace(settings, kv_tokens=(blocks - 1) * settings.block_size)  # one is the null block
    return settings


def graph_sizes(settings: VllmSettings) -> tuple[int, ...]:
    """The token counts that have a CUDA graph, increasing: those that were captured.

    Where they are not known, vLLM's own choice: 1, 2, 4, then every 8 to 248, then every 16, up to twice max_num_seqs
    and 512 at most.
    """
    if settings.enforce_eager:
        return ()
    if settings.cudagraph_capture_sizes is not None:
        return settings.cudagraph_capture_sizes
    largest = min(2 * settings.max_num_seqs, _LARGEST_GRAPH)
    return tuple(size for size in (1, 2, 4, *range(8, 256, 8), *range(256, _LARGEST_GRAPH + 1, 16)) if size <= largest)


def _requests_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("requests.jsonl.gz", "requests.jsonl"):
        if (path / name).exists():
            return path / name
    raise ConfigError(f"{path} has no requests.jsonl in it", param="measured")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}, line {number}: not an object")
                    yield number, row
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON lines: {error}") from None


def _number_of(request_id: str) -> int:
    """bench-17 is the 17th sent; 0 for all where ids are of another kind, which keeps their order."""
    number = request_id.rpartition("-")[2]
    return int(number) if number.isdigit() else 0
