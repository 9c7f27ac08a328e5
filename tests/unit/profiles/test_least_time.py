"""No step of a profile is shorter than what its tokens, rows and KV reads add up to."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.least_time import StepLimits, StepPrices, step_prices
from nexusengine.profiles.registry import load_profile
from tests.sim.fakes import FormulaProfile

LONGEST = 6000


def random_steps(limits: StepLimits, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(counts, contexts) of steps of all sorts within the limits; some of the sizes that the tables have."""
    rng = np.random.default_rng(seed)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    while len(steps) < count:
        rows = int(np.exp(rng.uniform(0.0, np.log(limits.max_running + 1))))
        chunks = min(int(rng.integers(0, 4)), rows)
        counts = np.ones(rows, np.int32)
        alike = np.full(rows, rng.integers(0, LONGEST))
        contexts = (alike if rng.random() < 0.5 else rng.integers(0, LONGEST, rows)).astype(np.int32)
        counts[:chunks] = np.exp(rng.uniform(np.log(2), np.log(limits.max_batch_tokens), chunks)).astype(np.int32)
        contexts[:chunks] = np.maximum(np.minimum(contexts[:chunks], limits.longest_prompt - counts[:chunks]), 0)
        held = int((counts + contexts).sum())
        if counts.sum() <= limits.max_batch_tokens and held <= limits.kv_tokens and counts.max() <= LONGEST:
            steps.append((counts, contexts))
    return steps


def priced_s(prices: StepPrices, counts: np.ndarray, contexts: np.ndarray, paying: int = 10**6) -> float:
    q, context, chunk = counts.astype(np.float64), contexts.astype(np.float64), counts > 1
    pairs, read = (q * (context + 0.5 * q))[chunk].sum(), (context + 1)[~chunk].sum()
    rows = min(int((~chunk).sum()), paying)
    return float(prices.token_s * q[chunk].sum() + prices.pair_s * pairs + prices.row_s * rows + prices.kv_s * read)


@pytest.mark.parametrize("device", ["rtxpro6000", "rtx4090", "h100", "a100", "l40s", "l4", "a6000"])
def test_no_step_is_shorter_than_its_parts_add_up_to(device: str) -> None:
    profile = load_profile(device)
    limits = StepLimits(4096, 192, profile.identity.kv_capacity_tokens, LONGEST, LONGEST + 500, 192)
    found = step_prices(profile, limits)
    assert len(found) >= 5
    shares = []
    for counts, contexts in random_steps(limits, 400, seed=1):
        took_s = profile.step_s(counts, contexts)
        share = [priced_s(prices, counts, contexts) / took_s for prices in found]
        assert max(share) <= 1.0 + 1e-9, (device, counts, contexts)
        lone = counts == 1
        if lone.any():
            longest = float((contexts[lone] + 1).max())
            assert took_s >= max(p.floor_s + p.read_s * longest for p in found) * (1.0 - 1e-9)
        shares.append(max(share))
    assert max(shares) > 0.85, "and not far shorter where the device is full"


def test_of_more_decodes_than_pay_none_is_too_dear() -> None:
    profile, paying = load_profile("rtxpro6000"), 40
    limits = StepLimits(4096, 192, profile.identity.kv_capacity_tokens, LONGEST, LONGEST + 500, paying)
    found = step_prices(profile, limits)
    for counts, contexts in random_steps(limits, 200, seed=2):
        took_s = profile.step_s(counts, contexts)
        assert max(priced_s(prices, counts, contexts, paying) for prices in found) <= took_s * (1.0 + 1e-9)


def test_a_prompt_computed_token_by_token_is_not_cheaper() -> None:
    profile = load_profile("h100")
    for prices in step_prices(
        profile, StepLimits(2048, 256, profile.identity.kv_capacity_tokens, LONGEST, LONGEST, 256)
    ):
        assert prices.token_s <= prices.row_s
        assert prices.pair_s <= prices.kv_s


def test_a_profile_of_another_make_is_refused() -> None:
    profile: DeviceProfile = FormulaProfile()
    with pytest.raises(ValueError, match="FormulaProfile"):
        step_prices(profile, StepLimits(256, 8, 1000, 100, 200, 8))
