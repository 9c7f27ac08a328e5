"""Finds the settings that serve each peer of cpu_peers.py best, column by column: none is measured at a handicap.

From a system's defaults every setting is varied alone; then the best values of all are tried together. What is best for
a column of all that was tried is chosen for it, so a batch, one request and a long prompt may be measured with
different settings, as their users would choose them. One measurement each: differences below the noise change little.

    python -m benchmarks.cpu_peer_sweep --json sweep.json
    python -m benchmarks.cpu_peers --settings sweep.json --json peers.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu_peer_process import (
    COLUMNS,
    OURS,
    ROUND_LIMIT_S,
    START_LIMIT_S,
    Peer,
    Settings,
    System,
    add_arguments,
    environment,
    prepared,
    wanted,
    write,
)


@dataclass(frozen=True)
class Tried:
    """One measurement. columns is empty where it failed, and failure says why."""

    system: str
    variant: str
    settings: Settings
    columns: dict[str, float] = field(default_factory=dict)
    failure: str | None = None


def better(column: str, a: float, b: float) -> bool:
    return a < b if column == "ttft_ms" else a > b


def best(column: str, tried: list[Tried]) -> Settings | None:
    """Of the measurements that did not fail; None if all did."""
    found: Tried | None = None
    for one in tried:
        if one.columns and (found is None or better(column, one.columns[column], found.columns[column])):
            found = one
    return None if found is None else found.settings


def one_at_a_time(system: System) -> Iterator[Settings]:
    """The defaults, then each other value of each setting."""
    yield system.defaults
    for name, values in system.settings.items():
        for value in values[1:]:
            yield {**system.defaults, name: value}


def together(system: System, column: str, tried: list[Tried]) -> Settings:
    """The best value of each setting for a column, of those tried alone."""
    combined: Settings = {}
    for name in system.settings:
        alone = [t for t in tried if all(t.settings[o] == v for o, v in system.defaults.items() if o != name)]
        chosen = best(column, alone)
        combined[name] = system.defaults[name] if chosen is None else chosen[name]
    return combined


def sweep(system: System, variant: str, python: str, work: dict[str, Any]) -> Iterator[Tried]:
    """Every measurement of a system and variant."""
    tried: list[Tried] = []
    for settings in one_at_a_time(system):
        tried.append(measured(system, variant, python, work, settings))
        yield tried[-1]
    for column in COLUMNS:
        settings = together(system, column, tried)
        if all(t.settings != settings for t in tried):
            tried.append(measured(system, variant, python, work, settings))
            yield tried[-1]


def measured(system: System, variant: str, python: str, work: dict[str, Any], settings: Settings) -> Tried:
    peer = Peer(python, system.name, variant, work, settings)
    try:
        peer.ask("warm", START_LIMIT_S)
        return Tried(system.name, variant, settings, peer.ask("round", ROUND_LIMIT_S))
    except RuntimeError as error:
        return Tried(system.name, variant, settings, failure=str(error))
    finally:
        peer.close()


def chosen(tried: list[Tried]) -> dict[str, dict[str, Settings]]:
    """By "system/variant" and column."""
    found: dict[str, dict[str, Settings]] = {}
    for key in dict.fromkeys((t.system, t.variant) for t in tried):
        mine = [t for t in tried if (t.system, t.variant) == key]
        picks = {column: best(column, mine) for column in COLUMNS}
        found["/".join(key)] = {column: pick for column, pick in picks.items() if pick is not None}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    given = parser.parse_args()
    if given.tiny:
        given.requests, given.input, given.output = 4, 32, 8
    about = {"work": {name: getattr(given, name) for name in ("requests", "input", "output", "threads")}}
    tried: list[Tried] = []
    if given.json is not None and given.json.is_file():
        kept = json.loads(given.json.read_text())
        if kept["about"]["work"] != about["work"]:
            sys.exit(f"{given.json} holds results of other work; name another file")
        tried = [Tried(**one) for one in kept["tried"]]
    work = prepared(given)
    for system, variants in wanted(given):
        if not system.settings or system.name in OURS:
            continue
        try:
            python = environment(system, Path(given.environments))
        except RuntimeError as error:
            print(f"{system.name} cannot be installed: {error}", file=sys.stderr, flush=True)
            continue
        for variant in variants:
            if any((t.system, t.variant) == (system.name, variant) for t in tried):
                continue
            mine: list[Tried] = []
            for one in sweep(system, variant, python, work):
                mine.append(one)
                told = one.failure or ", ".join(f"{c} {one.columns[c]:.1f}" for c in COLUMNS)
                print(f"{system.name} {variant} {one.settings}: {told}", file=sys.stderr, flush=True)
            tried += mine
            content = {"about": about | {"load": os.getloadavg()}, "chosen": chosen(tried)}
            write(given.json, content | {"tried": [asdict(t) for t in tried]})
    print(json.dumps(chosen(tried), indent=1))


if __name__ == "__main__":
    main()
