"""Which mix of devices serves a load: candidates simulated with the policies of the server, and what limits each.

For every candidate: attainment at the offered rate, the highest rate at which each target holds (see sim.goodput), what
that leaves as head-room, and the first bottleneck: what misses promises a little above that rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from nexusengine.errors import ConfigError
from nexusengine.profiles.prices import DeviceCost, cost_of
from nexusengine.sim.api import LoadProfile, SimSpec, parse_devices, simulate
from nexusengine.sim.costs import NO_COSTS, Costs, costs_of
from nexusengine.sim.goodput import goodput
from nexusengine.sim.this import device_of, expand
from nexusengine.sim.workload.build import Builder

RANKS = {"price": "$/h", "tokens": "$/M tokens", "energy": "J/token"}
"""What candidates can be compared by: dollars an hour, dollars for a million output tokens, joules for each of them."""

_ABOVE = 1.1
_FULL = 0.98
_NEXT_SEARCH = 0.9


@dataclass(frozen=True, slots=True)
class Planned:
    """A candidate mix of devices, simulated.

    Attributes:
        price_per_hour: None if the price of one of its devices is not known.
        attainment, longest_decile: at the offered rate, means over seeds.
        goodput_rps: for each target; None if it was not searched for.
        bottleneck: in words.
        metrics: of the first seed at the offered rate.
        costs: of the first seed at the offered rate.
    """

    devices: str
    price_per_hour: float | None
    attainment: float
    longest_decile: float
    goodput_rps: tuple[float | None, ...]
    bottleneck: str
    metrics: dict[str, Any]
    costs: Costs = NO_COSTS

    def rank(self, by: str) -> float | None:
        """What it is compared with others by, see RANKS."""
        return {
            "price": self.price_per_hour,
            "tokens": self.costs.usd_per_million_tokens,
            "energy": self.costs.joules_per_token,
        }[by]

    def serves(self, target: float, longest_decile: float) -> bool:
        """Whether the offered load is served at this target."""
        return self.attainment >= target and self.longest_decile >= longest_decile


@dataclass(frozen=True, slots=True)
class Plan:
    """rate_rps: offered. candidates in the order they were given. rank: one of RANKS."""

    rate_rps: float
    targets: tuple[float, ...]
    longest_decile: float
    candidates: tuple[Planned, ...]
    rank: str = "price"

    def cheapest(self, target: float) -> Planned | None:
        """Of those that serve the load at this target and of which what they are ranked by is known."""
        serving = [
            c for c in self.candidates if c.rank(self.rank) is not None and c.serves(target, self.longest_decile)
        ]
        return min(serving, key=lambda c: c.rank(self.rank) or 0.0, default=None)


def parse_candidates(text: str) -> list[str]:
    """`2xh100; h100+4xl4` is ["2xh100", "h100,4xl4"]. Raises ConfigError."""
    candidates = [",".join(w.strip() for w in c.replace("+", ",").split(",")) for c in text.split(";") if c.strip()]
    if not candidates:
        raise ConfigError(f"no candidate in {text!r}; write e.g. '2xh100; h100+4xl4'", param="candidates")
    for candidate in candidates:
        parse_devices(candidate)
    return candidates


def price_of(devices: str, prices: Mapping[str, DeviceCost]) -> float | None:
    """Of an hour of all of them; None if one is not known."""
    found = [cost_of(device, prices).price_per_hour for device in parse_devices(devices)]
    return None if None in found else sum(p for p in found if p is not None)


def plan(
    spec: SimSpec,
    candidates: Sequence[str],
    *,
    targets: Sequence[float] = (0.9, 0.99),
    longest_decile: float = 0.75,
    seeds: Sequence[int] = (0,),
    prices: Mapping[str, DeviceCost],
    rank: str = "price",
    head_room: bool = True,
    precision: float = 0.05,
    load_profile: LoadProfile | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Simulate each candidate mix of devices under a load.

    Args:
        spec: the load and the policies; its devices are not looked at.
        prices: what devices cost.
        rank: one of RANKS, by which the cheapest is found.
        head_room: whether to search for the rates that the targets allow.

    Raises:
        ConfigError: something is wrong with the specification.
    """
    planned: list[Planned] = []
    builder: Builder | None = None
    rate_rps = spec.rate_rps or 0.0
    for devices in candidates:
        mine = replace(spec, devices=devices)
        results = []
        for seed in seeds:
            progress(f"{devices}: the offered load")
            result = simulate(replace(mine, seed=seed), load_profile=load_profile, builder=builder)
            builder = result.builder
            results.append(result.metrics)
        if not rate_rps and results[0]["offered_rps"] is None:
            raise ConfigError("all requests of the trace arrive at the same time: they have no rate", param="trace")
        rate_rps = rate_rps or float(results[0]["offered_rps"])
        found: list[float | None] = [None] * len(targets)
        limit_rps = _ABOVE * rate_rps
        if head_room:
            found, limit_rps = _search(
                mine, rate_rps, targets, longest_decile, seeds, precision, load_profile, progress
            )
        progress(f"{devices}: {limit_rps:.3g} requests/s, to see what limits it")
        above = simulate(replace(mine, rate_rps=limit_rps, seed=seeds[0]), load_profile=load_profile, builder=builder)
        recording = getattr(builder.source, "recording", None) if builder is not None else None
        mix = [device_of(name, recording) for name in expand(parse_devices(devices), recording)]
        planned.append(
            Planned(
                devices=devices,
                price_per_hour=price_of(",".join(mix), prices),
                attainment=fmean(m["attainment"] for m in results),
                longest_decile=fmean(m["attainment_longest_decile"] for m in results),
                goodput_rps=tuple(found),
                bottleneck=bottleneck(above.metrics),
                metrics=results[0],
                costs=costs_of(results[0], mix, prices),
            )
        )
    return Plan(rate_rps, tuple(targets), longest_decile, tuple(planned), rank)


def _search(
    spec: SimSpec,
    rate_rps: float,
    targets: Sequence[float],
    longest_decile: float,
    seeds: Sequence[int],
    precision: float,
    load_profile: LoadProfile | None,
    progress: Callable[[str], None],
) -> tuple[list[float | None], float]:
    """Goodput for each target, and the lowest rate that was seen not to hold for the first.

    The search for a stricter target begins a little below what the one before found. The rate that does not hold is the
    offered one if that is higher.
    """
    found: list[float | None] = []
    first_rps, limit_rps = rate_rps, rate_rps
    for target in targets:
        result = goodput(
            spec,
            target=target,
            longest_decile=longest_decile,
            seeds=seeds,
            precision=precision,
            first_rate_rps=first_rps,
            load_profile=load_profile,
            progress=lambda tried, target=target: progress(  # type: ignore[misc]
                f"{spec.devices}: {tried.rate_rps:.3g} requests/s at {100 * target:g} %"
            ),
        )
        if not found:
            limit_rps = max(min(t.rate_rps for t in result.tried if not t.holds), rate_rps)
        found.append(result.rate_rps)
        first_rps = _NEXT_SEARCH * result.rate_rps or rate_rps
    return found, limit_rps


def bottleneck(metrics: dict[str, Any]) -> str:
    """What most of the missed promises of a simulation were missed by, in a few words."""
    missed: dict[str, int] = metrics["missed"]
    if not missed:
        return "none seen"
    why = max(missed, key=lambda name: missed[name])
    share = missed[why] / metrics["offered"]
    worst = min(metrics["attainment_by_class"].items(), key=lambda item: item[1])[0]
    full = [w["device"] for w in metrics["workers"] if w["kv_peak"] >= _FULL]
    busiest = max(metrics["workers"], key=lambda w: w["busy"])
    if why in ("ttft", "unfinished", "deadline_exceeded") and full:
        what = f"KV memory of {', '.join(dict.fromkeys(full))}"
    elif why in ("ttft", "unfinished", "deadline_exceeded"):
        what = f"prompt computation, {busiest['device']} {100 * busiest['busy']:.0f} % busy"
    elif why == "tpot":
        what = "decode steps, too long for the promised TPOT"
    elif why in ("refused", "overloaded"):
        what = "full queues"
    else:
        what = why.replace("_", " ")
    return f"{what} ({100 * share:.0f} % missed by {why}, most in class {worst})"
