"""Traces that `nexusengine serve --record-trace` wrote, as the simulator takes them: a set of files, read in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import msgspec

from nexusengine.config import parse_device
from nexusengine.errors import ConfigError
from nexusengine.perf.registry import is_known, rebuild
from nexusengine.recording import format as lines
from nexusengine.sim.workload.entries import Entry, json_rows
from nexusengine.types import SLO

_OWN_END = ("stop", "length")
_USUAL_OUTPUT = 16


@dataclass(frozen=True, slots=True)
class Recording:
    """What a server was asked, and what it did.

    Attributes:
        name: of the first file.
        server: its settings; those of its last start.
        workers: as they were last seen, by name.
        requests: in order of arrival, `arrival_s` counted from the first. Where the first files of a set are gone,
            those that arrived before the first that is there are left out: of them only the longest are known.
        unread: requests that were turned away before their prompts were read: their lengths are not known.
        output_tokens: of each request; what those of its class had on average where it was cut short by the server.
        steps: by worker, those that were sampled in the server's last start; times as those of the requests.
    """

    name: str
    server: lines.Server
    workers: tuple[lines.Worker, ...]
    requests: tuple[lines.Request, ...]
    unread: int
    output_tokens: tuple[int, ...]
    steps: Mapping[str, tuple[lines.Step, ...]]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(map(_entry, self.requests, self.output_tokens))


@dataclass(slots=True)
class _File:
    path: Path
    header: lines.Header
    workers: list[lines.Workers]
    requests: list[lines.Request]


def is_recording(path: str | Path) -> bool:
    """Whether the first line says so. Raises ConfigError if it cannot be read."""
    if ".jsonl" not in Path(path).suffixes:
        return False
    return any(lines.VERSION_KEY in row for _, row in _first(path))


def read_recording(paths: Sequence[str | Path]) -> Recording:
    """Read the files of one recording, or of several one after the other, in any order.

    Raises:
        ConfigError: naming file and line.
    """
    found = tuple(map(Path, paths))
    return _read(found, tuple(_stamp(path) for path in found))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", param="trace") from None
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=2)
def _read(paths: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> Recording:
    files = sorted(map(_read_file, paths), key=lambda f: (f.header.started_unix_s, f.header.part))
    _check_parts(files)
    began_s = files[0].header.started_unix_s
    complete_from_s = {f.header.recording: f.header.opened_s for f in reversed(files)}  # of the first file there is
    requests = [
        msgspec.structs.replace(line, arrival_s=line.arrival_s + (file.header.started_unix_s - began_s))
        for file in files
        for line in file.requests
        if line.arrival_s >= complete_from_s[file.header.recording]
    ]
    requests.sort(key=lambda line: line.arrival_s)
    known = [line for line in requests if line.input_tokens is not None]
    if not known:
        raise ConfigError(f"{paths[0]} has no request in it", param="trace")
    sizes = sorted({line.block_tokens for line in known if line.block_tokens})
    if len(sizes) > 1:
        raise ConfigError(
            f"{paths[0]}: prompts are hashed in blocks of {sizes[0]} and of {sizes[1]} tokens; give files of one block "
            "size",
            param="trace",
        )
    first_s = known[0].arrival_s
    known = [msgspec.structs.replace(line, arrival_s=line.arrival_s - first_s) for line in known]
    last = [file for file in files if file.header.recording == files[-1].header.recording]
    newest = {w.worker: w for file in last for line in file.workers for w in line.workers}
    shift_s = last[0].header.started_unix_s - began_s - first_s
    steps: dict[str, list[lines.Step]] = {name: [] for name in newest}
    for worker in (w for file in last for line in file.workers for w in line.workers):
        steps[worker.worker] += [msgspec.structs.replace(s, at_s=s.at_s + shift_s) for s in worker.sampled]
    return Recording(
        paths[0].name,
        files[-1].header.server,
        tuple(w for _, w in sorted(newest.items())),
        tuple(known),
        len(requests) - len(known),
        tuple(_output_tokens(known)),
        {name: tuple(sorted(found, key=lambda step: step.at_s)) for name, found in steps.items()},
    )


def _check_parts(files: Sequence[_File]) -> None:
    """Raises ConfigError for a file that is there twice, and for one that is missing between others."""
    last: dict[str, _File] = {}
    for file in files:
        before = last.get(file.header.recording)
        if before is not None and file.header.part == before.header.part:
            raise ConfigError(f"{file.path} is the same part of a recording as {before.path}", param="trace")
        if before is not None and file.header.part != before.header.part + 1:
            missing = before.header.part + 1
            raise ConfigError(
                f"part {missing} of the recording is missing between {before.path} (part {before.header.part}) and "
                f"{file.path} (part {file.header.part}); give all its files",
                param="trace",
            )
        last[file.header.recording] = file


def _read_file(path: Path) -> _File:
    file: _File | None = None
    for number, row in json_rows(path):
        where = f"{path}, line {number}"
        try:
            line = lines.parse(row)
            for worker in line.workers if isinstance(line, lines.Workers) else ():
                parse_device(worker.device)
                if worker.learned is not None and is_known(worker.learned.snapshot):
                    rebuild(worker.learned.snapshot)
        except (ValueError, IndexError, ConfigError) as error:  # msgspec's are ValueErrors
            raise ConfigError(f"{where}: not a line of a recorded trace: {error}", param="trace") from None
        if isinstance(line, lines.Header):
            if file is not None:
                raise ConfigError(f"{where}: a second header; give the files one by one", param="trace")
            file = _File(path, line, [], [])
        elif file is None:
            raise ConfigError(f"{where}: the header is missing, the first line of a recorded trace", param="trace")
        elif isinstance(line, lines.Workers):
            file.workers.append(line)
        else:
            file.requests.append(line)
    if file is None:
        raise ConfigError(f"{path} is empty", param="trace")
    return file


def _output_tokens(requests: Sequence[lines.Request]) -> list[int]:
    """As generated, at least 1; where the server ended a request, what those of its class had on average."""
    complete = [line for line in requests if line.ended in _OWN_END]
    overall = fmean(line.output_tokens for line in complete) if complete else _USUAL_OUTPUT
    by_class: dict[str | None, float] = {
        name: fmean(line.output_tokens for line in complete if line.slo_class == name)
        for name in {line.slo_class for line in complete}
    }
    found = []
    for line in requests:
        tokens = line.output_tokens
        if line.ended not in (*_OWN_END, "left"):
            tokens = max(tokens, round(by_class.get(line.slo_class, overall)))
            tokens = min(tokens, line.max_tokens or tokens)
        found.append(max(tokens, 1))
    return found


def _entry(line: lines.Request, output_tokens: int) -> Entry:
    assert line.input_tokens is not None
    return Entry(
        max(line.input_tokens, 1),
        output_tokens,
        line.arrival_s,
        line.hash_ids,
        line.block_tokens,
        answer_ids=line.answer_hash_ids,
        slo=None if line.slo is None else slo_of(line.slo),
        slo_class=line.slo_class,
        max_tokens=line.max_tokens,
        priority=line.priority,
        tenant=line.tenant,
    )


def slo_of(bounds: lines.Bounds) -> SLO:
    e2e_s = None if bounds.e2e_ms is None else bounds.e2e_ms / 1e3
    return SLO(bounds.ttft_ms / 1e3, bounds.tpot_ms / 1e3, e2e_s)


def _first(path: str | Path) -> Sequence[tuple[int, dict[str, object]]]:
    for found in json_rows(Path(path)):
        return [found]
    return []
