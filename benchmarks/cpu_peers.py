"""The same model, prompts and lengths through nexusengine and what a user without a GPU would take instead.

Every peer runs in an environment of its own, made on first use under --environments, and in a process of its own; one
that cannot be installed or run is left out with the reason. The measurements go round by round through all systems, so
that a busy moment of the machine meets each of them; figures are medians over the rounds.

    python -m benchmarks.cpu_peers --json peers.json --minutes 20     # the whole; again the same command goes on
    python -m benchmarks.cpu_peers --systems machine,nexusengine,llama-cpp-python --rounds 3
    python -m benchmarks.cpu_peers --tiny                # a minute: whether everything runs, no figures to quote
    python -m benchmarks.cpu_peers --settings sweep.json # every peer with what cpu_peer_sweep.py found best

All systems are loaded at once, some 25 GB in all: where there is less, name a part of them, ours among each.

Columns: output tokens/s of `--requests` requests of `--input` tokens in and `--output` out, submitted at once; tokens/s
of one request alone; milliseconds until the first token of a prompt of 512 tokens; peak resident memory. A second table
sets the ratios beside the targets (cpu_targets.py); for it the machine itself is measured in the same rounds. With
--json, what is there of the same work is kept: an interrupted run is continued, and --rounds counts those of before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu_peer_process import (
    COLUMNS,
    ROUND_LIMIT_S,
    START_LIMIT_S,
    Peer,
    Settings,
    add_arguments,
    environment,
    prepared,
    wanted,
    write,
)
from benchmarks.cpu_targets import target_table


@dataclass
class Result:
    """Of one system and variant. columns: a number for each round, by name; failure says why there are none. settings:
    of the system, by column."""

    system: str
    variant: str
    columns: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None
    settings: dict[str, Settings] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return max(map(len, self.columns.values()), default=0)


@dataclass(frozen=True)
class Measured:
    """A process that measures some columns with the settings that serve those best."""

    peer: Peer
    columns: tuple[str, ...]


def started(
    given: argparse.Namespace, work: dict[str, Any], chosen: dict[str, dict[str, Settings]]
) -> Iterator[tuple[Result, list[Measured]]]:
    """Each system and variant that was asked for, loaded and warm, or with the reason why not."""
    for system, variants in wanted(given):
        try:
            python = environment(system, Path(given.environments))
        except RuntimeError as error:
            yield Result(system.name, "", failure=f"cannot be installed: {error}"), []
            continue
        for variant in variants:
            best = chosen.get(f"{system.name}/{variant}", {})
            settings = {column: best.get(column, system.defaults) for column in COLUMNS}
            result = Result(system.name, variant, settings=settings if system.settings else {})
            groups: list[Measured] = []
            try:
                for one in distinct(settings.values()):
                    peer = Peer(python, system.name, variant, work, one)
                    groups.append(Measured(peer, tuple(c for c in COLUMNS if settings[c] == one)))
                    peer.ask("warm", START_LIMIT_S)
            except RuntimeError as error:
                result.failure = f"cannot be run: {error}"
                for group in groups:
                    group.peer.close()
                groups = []
            yield result, groups


def distinct(settings: Iterable[Settings]) -> list[Settings]:
    found: list[Settings] = []
    for one in settings:
        if one not in found:
            found.append(one)
    return found


def settings_table(results: list[Result]) -> str:
    """What each system was run with, by column where they differ."""
    lines = ["| system | weights | measured | settings |", "|---|---|---|---|"]
    for r in results:
        for one in distinct(r.settings.values()):
            columns = ", ".join(c for c in COLUMNS if r.settings[c] == one)
            given = ", ".join(f"{name}={value}" for name, value in one.items())
            lines.append(f"| {r.system} | {r.variant} | {columns} | {given} |")
    return "\n".join(lines)


def table(results: list[Result]) -> str:
    lines = [
        "| system | weights | output tok/s | one request, tok/s | TTFT of 512, ms | peak MB | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if not r.columns:
            lines.append(f"| {r.system} | {r.variant} | {r.failure or 'no round was completed'} | | | | |")
        elif r.system != "machine":
            middle = {name: statistics.median(column) for name, column in r.columns.items()}
            lines.append(
                f"| {r.system} | {r.variant} | {middle['throughput']:.1f} | {middle['single']:.1f} | "
                f"{middle['ttft_ms']:.0f} | {middle['peak_mb']:.0f} | {r.rounds} |"
            )
        else:
            given = ", ".join(f"{name} {statistics.median(column):.4g}" for name, column in r.columns.items())
            lines.append(f"| {r.system} | | {given} | | | | {r.rounds} |")
    return "\n".join(lines)


def of_before(path: Path | None, about: dict[str, Any]) -> dict[tuple[str, str], Result]:
    """The results in the file, if they are of the same work."""
    if path is None or not path.is_file():
        return {}
    kept = json.loads(path.read_text())
    if kept["about"]["work"] != about["work"]:
        sys.exit(f"{path} holds results of other work ({kept['about']['work']}); name another file")
    return {(r["system"], r["variant"]): Result(**r) for r in kept["results"] if r["columns"]}


def _write(path: Path | None, about: dict[str, Any], results: list[Result]) -> None:
    write(path, {"about": about, "results": [asdict(r) for r in results]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--settings", type=Path, help="what cpu_peer_sweep.py wrote; default: every system's own defaults"
    )
    parser.add_argument(
        "--minutes", type=float, help="begin no round that would end later than so long after the start"
    )
    given = parser.parse_args()
    began_s = time.monotonic()
    if given.tiny:
        given.requests, given.input, given.output, given.rounds = 4, 32, 8, 1
    measure(given, began_s)


def measure(given: argparse.Namespace, began_s: float) -> None:
    lengths = {name: getattr(given, name) for name in ("requests", "input", "output", "threads")}
    about = {"processor": platform.processor() or platform.machine(), "work": lengths, "load": os.getloadavg()}
    before = of_before(given.json, about)
    chosen = json.loads(given.settings.read_text())["chosen"] if given.settings else {}
    pairs: list[tuple[Result, list[Measured]]] = []
    for fresh, groups in started(given, prepared(given), chosen):
        result = before.pop((fresh.system, fresh.variant), fresh)
        if result.settings != fresh.settings:
            sys.exit(f"{given.json} holds results of {fresh.system} with other settings; name another file")
        result.failure = fresh.failure
        pairs.append((result, groups))
    results = [*before.values(), *(result for result, _ in pairs)]
    longest_s = 0.0
    try:
        for n in range(given.rounds):
            left = [(r, groups) for r, groups in pairs if groups and r.failure is None and r.rounds <= n]
            start_s = time.monotonic()
            if given.minutes and start_s + longest_s > began_s + given.minutes * 60:
                print(f"no time for round {n + 1} of {given.rounds}", file=sys.stderr, flush=True)
                break
            print(f"round {n + 1} of {given.rounds}: {len(left)} to measure", file=sys.stderr, flush=True)
            for result, groups in left:
                found: dict[str, float] = {}
                try:
                    for group in groups:
                        found |= group.peer.ask(f"round {','.join(group.columns)}", ROUND_LIMIT_S)
                except RuntimeError as error:
                    result.failure = f"failed in round {n + 1}: {error}"
                    continue
                for name, number in found.items():
                    result.columns.setdefault(name, []).append(number)
                _write(given.json, about, results)
            longest_s = max(longest_s, time.monotonic() - start_s)
    finally:
        for _, groups in pairs:
            for group in groups:
                group.peer.close()
    _write(given.json, about, results)
    print(table(results))
    print("\n" + settings_table(results))
    print("\n" + target_table({(r.system, r.variant): r.columns for r in results}))


if __name__ == "__main__":
    main()
