"""The entries of a trace file, before anything is drawn: CSV or JSON lines, gzipped or not.

CSV and JSONL need `input_tokens` and `output_tokens`, and may have `arrival_s` (seconds; empty: a trace of lengths).
JSONL may also have `hash_ids` (ids of the prompt's blocks of 512 tokens). The names of the originals of the Azure and
Mooncake traces are understood too. Sessions (`session`, `think_s`, `hash_runs` of 64-token blocks) are closed loops.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from nexusengine.errors import ConfigError
from nexusengine.sim.workload.runs import Runs
from nexusengine.types import SLO

MOONCAKE_BLOCK_TOKENS, SESSION_BLOCK_TOKENS = 512, 64
LARGEST_COUNT = 2**53
"""Largest token count or block id: whole numbers up to here are exact in float64, and sums of many fit into int64."""
_INPUT = ("input_tokens", "input_length", "prompt_tokens", "ContextTokens")
_OUTPUT = ("output_tokens", "output_length", "completion_tokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of a trace.

    Attributes:
        arrival_s: None in a trace of lengths.
        block_ids: of its prompt, block_tokens each.
        answer_ids: of the full blocks that follow, with its answer, where that is known.
        slo, slo_class, max_tokens, priority, tenant: as the client asked, where that was recorded.
    """

    input_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    block_ids: Sequence[int] = ()
    block_tokens: int = 0
    think_s: float = 0.0
    answer_ids: Sequence[int] = ()
    slo: SLO | None = None
    slo_class: str | None = None
    max_tokens: int | None = None
    priority: int = 0
    tenant: str | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """name: of the file. entries in order of arrival, or sessions of entries: one of the two is empty."""

    name: str
    entries: tuple[Entry, ...] = ()
    sessions: tuple[tuple[Entry, ...], ...] = ()

    @property
    def timed(self) -> bool:
        return bool(self.entries) and self.entries[0].arrival_s is not None

    @property
    def length_s(self) -> float:
        """From the first arrival to one mean gap after the last; 0 without arrivals."""
        if not self.timed:
            return 0.0
        span_s = float(self.entries[-1].arrival_s or 0.0) - float(self.entries[0].arrival_s or 0.0)
        return span_s * len(self.entries) / max(len(self.entries) - 1, 1)


def read_trace(path: str | Path) -> Trace:
    """Raises ConfigError naming the file and the line."""
    path = Path(path)
    rows = json_rows(path) if ".jsonl" in path.suffixes else _csv_rows(path)
    entries: list[Entry] = []
    sessions: dict[str, list[Entry]] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if "session" in row:
            sessions.setdefault(str(row["session"]), []).append(_session_entry(row, where))
        else:
            entries.append(_entry(row, where))
    if entries and sessions:
        raise ConfigError(f"{path} mixes sessions and single requests", param="trace")
    if not entries and not sessions:
        raise ConfigError(f"{path} has no request in it", param="trace")
    timed = [e.arrival_s for e in entries if e.arrival_s is not None]
    if timed and len(timed) < len(entries):
        raise ConfigError(f"{path}: some requests have an arrival_s and some have none", param="trace")
    if timed:
        first_s = min(timed)
        entries = [_moved(e, -first_s) for e in sorted(entries, key=lambda e: e.arrival_s or 0.0)]
    return Trace(path.name, tuple(entries), tuple(map(tuple, sessions.values())))


def open_text(path: str | Path) -> IO[str]:
    """Raises ConfigError if it cannot be opened."""
    try:
        # utf-8-sig: spreadsheets put a byte-order mark before the first column's name
        if str(path).endswith(".gz"):
            return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        return open(path, encoding="utf-8-sig", newline="")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", param="trace") from None


def _moved(entry: Entry, by_s: float) -> Entry:
    assert entry.arrival_s is not None
    return replace(entry, arrival_s=entry.arrival_s + by_s)


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_text(path) as file:
        try:
            reader = csv.DictReader(file)
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(
                        f"{path}, line {reader.line_num}: has not as many fields as the first line", param="trace"
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
            raise ConfigError(f"{path} is not CSV: {error}", param="trace") from None


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object). Raises ConfigError naming file and line."""
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}, line {number}: not a JSON object", param="trace")
                    yield number, row
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not JSON: {error}", param="trace") from None
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise ConfigError(f"{path} is not JSON lines: {error}", param="trace") from None


def _entry(row: Mapping[str, Any], where: str) -> Entry:
    ids = row.get("hash_ids") or ()
    if not isinstance(ids, list | tuple) or not all(map(_is_count, ids)):
        raise ConfigError(f"{where}: hash_ids must be a list of whole numbers from 0 to 2**53", param="trace")
    return Entry(
        _tokens(row, _INPUT, where, 1),
        _tokens(row, _OUTPUT, where, 1),
        _arrival_s(row, where),
        tuple(ids),
        MOONCAKE_BLOCK_TOKENS if ids else 0,
    )


def _session_entry(row: Mapping[str, Any], where: str) -> Entry:
    runs: list[tuple[int, int]] = []
    for run in row.get("hash_runs") or ():
        if not (isinstance(run, list) and len(run) == 2 and all(map(_is_count, run))):
            raise ConfigError(f"{where}: hash_runs must be [first, count] pairs, got {run!r}", param="trace")
        runs.append((run[0], run[1]))
    return Entry(
        _tokens(row, _INPUT, where, 1),
        _tokens(row, _OUTPUT, where, 1),
        None,
        Runs(runs),
        SESSION_BLOCK_TOKENS if runs else 0,
        _number(row.get("think_s") or 0.0, "think_s", where),
    )


def _tokens(row: Mapping[str, Any], names: tuple[str, ...], where: str, at_least: int) -> int:
    """Zero output tokens, as some traces have, count as one."""
    for name in names:
        if name in row:
            value = row[name]
            try:
                number = int(value)
            except (TypeError, ValueError):
                number = -1
            if not _is_count(number) or isinstance(value, bool | float):
                shown = reprlib.repr(value)
                raise ConfigError(f"{where}: {name} must be a whole number from 0 to 2**53, got {shown}", param="trace")
            return max(number, at_least)
    raise ConfigError(f"{where}: {names[0]} is missing; there are: {', '.join(map(str, row))}", param="trace")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def _arrival_s(row: Mapping[str, Any], where: str) -> float | None:
    if "TIMESTAMP" in row:  # Azure's own files: date and time
        try:
            return datetime.fromisoformat(str(row["TIMESTAMP"])).replace(tzinfo=UTC).timestamp()
        except ValueError:
            raise ConfigError(f"{where}: TIMESTAMP is not a date and time: {row['TIMESTAMP']!r}") from None
    if "timestamp" in row:  # Mooncake's own files: milliseconds
        return _number(row["timestamp"], "timestamp", where) / 1000
    value = row.get("arrival_s")
    return None if value in (None, "") else _number(value, "arrival_s", where)


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigError(f"{where}: {name} must be a number >= 0, got {value!r}", param="trace")
    return number
