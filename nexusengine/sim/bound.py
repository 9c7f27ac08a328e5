"""How many requests of a load any schedule could serve in time at most, all lengths and step times known beforehand.

Weak duality. Let lambda_m(t) >= 0 be any price of a second of device m at time t. A request that is served on m
computes its prompt between its arrival and the time its first token is due, and its other tokens between the earliest
time its first token can come and the latest time its last one may. These take at least W and V seconds of the device
(see profiles.least_time), and every second costs at least the lowest price of its window. So it costs at least

    c = min over m of ( W_m * min of lambda_m over the first window + V_m * min of lambda_m over the second )

and infinitely much where it cannot be in time even alone. All requests that are served in time together cost no more
than all the time there is, the sum over m of the integral of lambda_m. With S the set of these,

    |S| = sum_S (1 - c) + sum_S c <= sum over all requests of max(1 - c, 0) + sum over m of integral lambda_m

for every lambda: each is an upper bound, and `upper_bound` looks for a low one. It is the bound of a relaxation:
prompts and answers are preempted and mixed at no cost, tokens of one answer need no order, nothing has to be known in
advance that is not known, and parts of requests may count. Step times are those of the profile without scatter, no
prefix is cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nexusengine.arrays import F8, Bools
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.least_time import StepLimits, StepPrices, step_prices
from nexusengine.sim.job import Job

Indices = npt.NDArray[np.intp]

_SLOTS = 2000
_ROUNDS = ((150, 0.2, 0.1), (150, 0.1, 0.05), (300, 0.03, 0.015))
"""Iterations; smoothing of the least price, as a share of the mean price; smoothing of max(1 - c, 0)."""
_STEEPEST = 25.0
_FIRST_RATE, _LAST_RATE = 0.1, 0.01
_CHECK_EVERY = 10
_USUAL_OVERLOAD = 1.25


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Of the simulated engines, as in EngineSettings. link_s: least delay between client and engine, one way."""

    max_batch_tokens: int
    max_running: int
    block_size: int = 16
    link_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on what any schedule could do.

    Attributes:
        requests: how many could be in time; may be a fraction.
        share: of all that were offered.
        work_only: the same bound from the amount of work alone, as if nothing had a deadline but the last.
        least_s: `[N]`, least seconds of device time of each request, on the device where that is least.
        value: `[N]`, max(1 - c, 0) of each request: 0 is not worth its device time, near 1 costs nearly none.
        able: `[N]`, devices by name on which each could be in time if it were alone.
    """

    requests: float
    share: float
    work_only: float
    least_s: F8
    value: F8
    able: Mapping[str, Bools]


@dataclass(frozen=True, slots=True)
class _Device:
    """What requests need of one kind of device, which there are `count` of; `[N]` each.

    Attributes:
        prompt_s, answer_s: W and V; infinite where it cannot be in time.
        prompt_slots, answer_slots: first slot and the one behind the last of the two windows.
    """

    count: int
    prompt_s: F8
    answer_s: F8
    prompt_slots: tuple[Indices, Indices]
    answer_slots: tuple[Indices, Indices]


def upper_bound(jobs: Sequence[Job], devices: Sequence[DeviceProfile], limits: EngineLimits) -> Bound:
    """The least upper bound found.

    Args:
        jobs: all with an SLO and a fixed arrival (no closed loops).
        devices: one profile a worker.

    Raises:
        ValueError: a job has no SLO or follows another, or the least time of a step is not known of a profile.
    """
    if any(job.request.slo is None or job.then is not None for job in jobs):
        raise ValueError("the bound is of requests with an SLO and a fixed time of arrival")
    load = _Load.of(jobs, limits.link_s)
    end_s = float(load.last_due_s.max())
    slot_s = end_s / _SLOTS
    counts: dict[str, int] = {}
    profiles: dict[str, DeviceProfile] = {}
    for profile in devices:
        counts[profile.identity.name] = counts.get(profile.identity.name, 0) + 1
        profiles[profile.identity.name] = profile
    needs = [_needs(load, profile, limits, counts[name], slot_s) for name, profile in profiles.items()]
    prices = _Dual(needs, slot_s)
    flat = prices.flat()
    best = prices.minimise(flat)
    requests, value = prices.exact(best)
    return Bound(
        requests=min(requests, float(len(jobs))),
        share=min(requests / len(jobs), 1.0),
        work_only=min(prices.exact(flat)[0] / len(jobs), 1.0),
        least_s=np.min([need.prompt_s + need.answer_s for need in needs], axis=0),
        value=value,
        able={name: np.isfinite(need.prompt_s) for name, need in zip(profiles, needs, strict=True)},
    )


@dataclass(frozen=True, slots=True)
class _Load:
    """Requests as columns `[N]`; timestamps are the engine's."""

    prompt_tokens: F8
    output_tokens: F8
    arrival_s: F8
    first_due_s: F8
    last_due_s: F8
    tpot_s: F8

    @classmethod
    def of(cls, jobs: Sequence[Job], link_s: float) -> _Load:
        slos = [slo for job in jobs if (slo := job.request.slo) is not None]
        arrival_s = np.array([job.request.arrival_s for job in jobs])
        output = np.array([float(job.output_tokens) for job in jobs])
        tpot_s = np.array([slo.tpot_s for slo in slos])
        first_due_s = arrival_s + np.array([slo.ttft_s for slo in slos]) - link_s
        e2e_s = np.array([np.inf if slo.e2e_s is None else slo.e2e_s for slo in slos])
        last_due_s = np.minimum(first_due_s + (output - 1) * tpot_s, arrival_s + e2e_s - link_s)
        prompt = np.array([float(job.prompt_tokens) for job in jobs])
        return cls(prompt, output, arrival_s + link_s, np.minimum(first_due_s, last_due_s), last_due_s, tpot_s)

    def most_at_once(self) -> int:
        """How many requests can run at the same time at most, if they are in time."""
        at_s = np.concatenate([self.arrival_s, self.last_due_s])
        change = np.repeat([1, -1], len(self.arrival_s))
        return int(np.cumsum(change[np.lexsort((-change, at_s))]).max())


def _needs(load: _Load, profile: DeviceProfile, limits: EngineLimits, count: int, slot_s: float) -> _Device:
    blocks = profile.identity.kv_capacity_tokens // limits.block_size
    step_limits = StepLimits(
        max_batch_tokens=limits.max_batch_tokens,
        max_running=limits.max_running,
        kv_tokens=blocks * limits.block_size,
        longest_prompt=int(load.prompt_tokens.max()),
        longest=int((load.prompt_tokens + load.output_tokens).max()),
        paying=load.most_at_once(),
    )
    found = _dearest(step_prices(profile, step_limits), load)
    prompt_s = found.prefill_s(load.prompt_tokens)
    answer_s = found.decodes_s(load.prompt_tokens, load.output_tokens)
    first_s = load.arrival_s + np.maximum(
        prompt_s, found.floor_s * np.ceil(load.prompt_tokens / limits.max_batch_tokens)
    )
    alone_s = found.decodes_alone_s(load.prompt_tokens, load.output_tokens)
    able = (first_s <= load.first_due_s) & (alone_s <= (load.output_tokens - 1) * load.tpot_s)
    able &= (first_s + alone_s <= load.last_due_s) & (
        load.prompt_tokens + load.output_tokens - 1 <= step_limits.kv_tokens
    )
    return _Device(
        count,
        np.where(able, prompt_s, np.inf),
        np.where(able, answer_s, np.inf),
        _slots(load.arrival_s, load.first_due_s, slot_s),
        _slots(np.minimum(first_s, load.first_due_s), load.last_due_s, slot_s),
    )


def _slots(from_s: F8, to_s: F8, slot_s: float) -> tuple[Indices, Indices]:
    """The slots that a window touches; at least one."""
    first = np.clip(np.floor(from_s / slot_s).astype(np.intp), 0, _SLOTS - 1)
    return first, np.clip(np.ceil(to_s / slot_s).astype(np.intp), first + 1, _SLOTS)


def _dearest(prices: Sequence[StepPrices], load: _Load) -> StepPrices:
    """Those under which least of the load fits into a time in which not all of it does. All are lower bounds."""

    def work(p: StepPrices) -> F8:
        return np.sort(p.prefill_s(load.prompt_tokens) + p.decodes_s(load.prompt_tokens, load.output_tokens))

    time_s = max(float(work(p).sum()) for p in prices) / _USUAL_OVERLOAD
    return min(prices, key=lambda p: (np.searchsorted(np.cumsum(work(p)), time_s), -float(work(p).sum())))


class _Dual:
    """The bound as a function of the prices lambda `[D, K]`: of a second of each kind of device in each slot."""

    def __init__(self, devices: Sequence[_Device], slot_s: float) -> None:
        self._devices, self._slot_s = devices, slot_s
        self._time_s = slot_s * np.array([[d.count] for d in devices], np.float64)

    def flat(self) -> F8:
        """The best of prices that are the same in all slots and on all devices of use; 0 on the others."""
        of_use = np.array([[float(np.isfinite(d.prompt_s).any())] for d in self._devices])
        least_s = np.min([d.prompt_s + d.answer_s for d in self._devices], axis=0)
        least_s = np.sort(least_s[np.isfinite(least_s)])
        fits = int(np.searchsorted(np.cumsum(least_s), float((of_use * self._time_s).sum()) * _SLOTS))
        price = 0.0 if fits >= len(least_s) else 1.0 / float(least_s[fits])
        return np.repeat(price * of_use, _SLOTS, axis=1)

    def exact(self, prices: F8) -> tuple[float, F8]:
        """The bound, and max(1 - c, 0) of each request `[N]`."""
        costs = []
        for device, row in zip(self._devices, prices, strict=True):
            least = _RangeMinimum(row)
            able = np.isfinite(device.prompt_s)
            cost = np.full(len(able), np.inf)
            cost[able] = (
                device.prompt_s[able] * least(*device.prompt_slots)[able]
                + device.answer_s[able] * least(*device.answer_slots)[able]
            )
            costs.append(cost)
        value = np.maximum(1.0 - np.min(costs, axis=0), 0.0)
        return float((self._time_s * prices).sum() + value.sum()), value

    def minimise(self, start: F8) -> F8:
        """Lower prices, by Adam on a smoothed bound; the best seen by the exact one, which the start is too."""
        scale = float(start.max()) or self._guess()
        best, least = start, self.exact(start)[0]
        x = np.where(np.isfinite([[d.prompt_s.min()] for d in self._devices]), np.maximum(start, 0.5 * scale), 0.0)
        total = sum(count for count, _, _ in _ROUNDS)
        mean, square, done = np.zeros_like(x), np.zeros_like(x), 0
        for count, tau, rho in _ROUNDS:
            for _ in range(count):
                gradient = self._gradient(x, tau * scale, rho)
                done += 1
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.99 * square + 0.01 * gradient**2
                rate = scale * _FIRST_RATE * (_LAST_RATE / _FIRST_RATE) ** (done / total)
                step = (mean / (1 - 0.9**done)) / (np.sqrt(square / (1 - 0.99**done)) + 1e-12)
                x = np.maximum(x - rate * step, 0.0)
                if done % _CHECK_EVERY == 0 and (found := self.exact(x)[0]) < least:
                    best, least = x, found
        return best

    def _guess(self) -> float:
        """A price to begin with where all would fit if they had time."""
        least_s = np.min([d.prompt_s + d.answer_s for d in self._devices], axis=0)
        least_s = least_s[np.isfinite(least_s)]
        return 1.0 / float(np.median(least_s)) if len(least_s) else 1.0

    def _gradient(self, prices: F8, tau: float, rho: float) -> F8:
        """Of the smoothed bound: the least price of a window is a mean weighted by exp(-price / tau)."""
        windows, costs = [], []
        for device, row in zip(self._devices, prices, strict=True):
            able = np.isfinite(device.prompt_s)
            weight = np.exp(-np.minimum((row - row.min()) / tau, _STEEPEST))
            sums = np.concatenate([[0.0], np.cumsum(weight)])
            cost = np.where(able, 0.0, np.inf)
            for (first, end), work_s in (
                (device.prompt_slots, device.prompt_s),
                (device.answer_slots, device.answer_s),
            ):
                inside = np.maximum(sums[end] - sums[first], 1e-300)
                windows.append((first, end, np.where(able, work_s, 0.0) / inside))
                least = row.min() - tau * np.log(inside / (end - first))
                cost[able] += work_s[able] * np.maximum(least, 0.0)[able]
            costs.append(cost)
        table = np.array(costs)
        low = table.min(axis=0)
        low = np.where(np.isfinite(low), low, 0.0)
        shares = np.exp(-np.minimum((table - low) / rho, 700.0))
        shares /= np.maximum(shares.sum(axis=0), 1.0)
        taken = shares / (1.0 + np.exp(np.clip((low - 1.0) / rho, -50.0, 50.0)))
        gradient = np.repeat(self._time_s, _SLOTS, axis=1)
        for i, row in enumerate(prices):
            weight = np.exp(-np.minimum((row - row.min()) / tau, _STEEPEST))
            per_slot = np.zeros(_SLOTS + 1)
            for first, end, work_s in windows[2 * i : 2 * i + 2]:
                np.add.at(per_slot, first, work_s * taken[i])
                np.subtract.at(per_slot, end, work_s * taken[i])
            gradient[i] -= weight * np.cumsum(per_slot)[:-1]
        return gradient


class _RangeMinimum:
    """Minima of stretches of a row, from minima of stretches of powers of two."""

    def __init__(self, row: F8) -> None:
        levels = [row]
        while 2 ** len(levels) <= len(row):
            last, width = levels[-1], 2 ** (len(levels) - 1)
            levels.append(np.concatenate([np.minimum(last[:-width], last[width:]), last[len(last) - width :]]))
        self._levels = np.array(levels)

    def __call__(self, first: Indices, end: Indices) -> F8:
        level = np.floor(np.log2(end - first)).astype(np.intp)
        least: F8 = np.minimum(self._levels[level, first], self._levels[level, end - 2**level])
        return least
