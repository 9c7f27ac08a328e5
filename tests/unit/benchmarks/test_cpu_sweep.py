"""The choice of a peer's settings from what a sweep measured."""

from __future__ import annotations

from benchmarks.cpu_peer_process import System
from benchmarks.cpu_peer_sweep import Tried, chosen, one_at_a_time, together

SYSTEM = System("peer", (), ("fp32",), settings={"flash": ("off", "on"), "ubatch": (512, 256, 2048)})


def tried(flash: str, ubatch: int, throughput: float, single: float, ttft_ms: float) -> Tried:
    columns = {"throughput": throughput, "single": single, "ttft_ms": ttft_ms}
    return Tried("peer", "fp32", {"flash": flash, "ubatch": ubatch}, columns)


def test_every_value_is_tried_once_beside_the_defaults() -> None:
    assert [(s["flash"], s["ubatch"]) for s in one_at_a_time(SYSTEM)] == [
        ("off", 512),
        ("on", 512),
        ("off", 256),
        ("off", 2048),
    ]


def test_each_column_gets_what_serves_it_best_and_a_failure_is_never_chosen() -> None:
    found = [
        tried("off", 512, 60, 50, 900),
        tried("on", 512, 70, 45, 950),
        tried("off", 256, 62, 50.5, 880),
        Tried("peer", "fp32", {"flash": "off", "ubatch": 2048}, failure="out of memory"),
    ]
    assert together(SYSTEM, "throughput", found) == {"flash": "on", "ubatch": 256}
    assert together(SYSTEM, "ttft_ms", found) == {"flash": "off", "ubatch": 256}
    found.append(tried("on", 256, 65, 40, 1000))  # what is best alone need not be best together
    assert chosen(found) == {
        "peer/fp32": {
            "throughput": {"flash": "on", "ubatch": 512},
            "single": {"flash": "off", "ubatch": 256},
            "ttft_ms": {"flash": "off", "ubatch": 256},
        }
    }
