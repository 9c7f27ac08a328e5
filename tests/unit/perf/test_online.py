"""The online step-time model: what it learns, what it forgets, what it does not believe."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from nexusengine.model_config import ModelConfig
from nexusengine.perf import basis
from nexusengine.perf.devices import DATASHEETS, cpu_datasheet, datasheet_of
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.kinds import RecentErrors, stratum
from nexusengine.perf.online import OnlineModel
from nexusengine.perf.prior import GENERIC, roofline
from tests.support.devices import Roofline, features, random_step

DEVICE = Roofline()
DECODES = StepFeatures(16, 16, 0, 0.0, 16 * 800)
PROMPT = StepFeatures(512, 1, 1, 512 * 256.0, 0)


def taught(
    steps: int, device: Roofline = DEVICE, *, seed: int = 1, noise: float = 0.02, model: OnlineModel | None = None
) -> OnlineModel:
    rng, model = random.Random(seed), model or OnlineModel()
    for _ in range(steps):
        step = random_step(rng)
        model.observe(step, device.step_s(step) * rng.lognormvariate(0.0, noise))
    return model


def error(model: OnlineModel, step: StepFeatures, device: Roofline = DEVICE) -> float:
    """Signed and relative."""
    return model.predict(step).mean_s / device.step_s(step) - 1.0


def mean_error(model: OnlineModel, device: Roofline = DEVICE, seed: int = 99) -> float:
    rng = random.Random(seed)
    return sum(abs(error(model, random_step(rng), device)) for _ in range(300)) / 300


# ---- learning --------------------------------------------------------------------------------------------------------


def test_it_learns_a_device_to_two_percent_within_five_hundred_steps() -> None:
    assert mean_error(taught(500)) < 0.02


def test_it_knows_a_device_to_a_fifth_after_twenty_steps_though_its_prior_was_ten_times_off() -> None:
    slow = Roofline(*(10 * getattr(DEVICE, name) for name in Roofline.__dataclass_fields__))
    assert mean_error(taught(20, slow), slow) < 0.2


def test_a_device_of_few_threads_with_its_knee_at_eight_tokens_is_learned_too() -> None:
    cpu = Roofline(overhead_s=0.003, weights_s=0.032, token_s=0.004, sequence_s=0.0002, pair_s=2e-7, kv_s=3e-7)
    rng, model = random.Random(5), OnlineModel()
    for _ in range(600):
        decodes, chunk = rng.randrange(0, 8), rng.choice([0, rng.randrange(2, 256)])
        counts = [1] * decodes + [chunk] * (chunk > 0)
        if counts:
            step = features(counts, [rng.randrange(10, 500) for _ in counts])
            model.observe(step, cpu.step_s(step) * rng.lognormvariate(0.0, 0.02))
    for sequences in (1, 2, 4, 6, 7):
        assert abs(error(model, StepFeatures(sequences, sequences, 0, 0.0, 250 * sequences), cpu)) < 0.05


def test_tiles_of_tokens_are_learned_as_jumps() -> None:
    def tiled_s(f: StepFeatures) -> float:
        return 0.02 + 0.02 * math.ceil(f.tokens / 256) if f.prefills else 0.02

    rng, model = random.Random(7), OnlineModel()
    for _ in range(1500):
        step = random_step(rng, budget=rng.randrange(80, 1100))
        model.observe(step, tiled_s(step))
    at = [model.predict(StepFeatures(t, 10, 1, 0.0, 0)).mean_s for t in (200, 256, 257, 500, 512, 513)]
    assert at == pytest.approx([0.04, 0.04, 0.06, 0.06, 0.06, 0.08], rel=0.05)


def test_a_thousand_decode_steps_do_not_erase_what_is_known_of_prompts() -> None:
    model = taught(600)
    before_s = model.predict(PROMPT).mean_s
    for _ in range(3000):
        model.observe(DECODES, DEVICE.step_s(DECODES))
    assert model.predict(PROMPT).mean_s == pytest.approx(before_s, rel=0.02)


def test_the_kinds_of_step_are_decode_only_and_mixed_by_octave() -> None:
    kinds = [stratum(StepFeatures(n, n)) for n in (1, 8, 9, 33, 129, 4000)]
    mixed = [stratum(StepFeatures(n, 1, 1)) for n in (2, 64, 65, 129, 257, 513, 1025, 9000)]
    assert kinds == [0, 0, 1, 2, 3, 3]
    assert mixed == [4, 4, 5, 6, 7, 8, 9, 9]


def test_a_deviation_that_lasts_from_decode_step_to_decode_step_is_followed_within_a_few() -> None:
    model = taught(500)
    for _ in range(40):  # such as contexts of very unequal length: 6 % more than the model can say
        model.observe(DECODES, 1.06 * DEVICE.step_s(DECODES))
    assert error(model, DECODES) == pytest.approx(0.06, abs=0.02)
    assert abs(error(model, PROMPT)) < 0.02


def test_scatter_that_does_not_last_is_not_followed() -> None:
    model, rng = taught(500), random.Random(3)
    offsets = []
    for _ in range(300):
        model.observe(DECODES, DEVICE.step_s(DECODES) * rng.lognormvariate(0.0, 0.05))
        offsets.append(abs(error(model, DECODES)))
    assert sum(offsets) / len(offsets) < 0.02


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.005, 0.05, 0.3])
def test_the_upper_bound_holds_in_about_95_percent_of_steps_whatever_the_scatter(noise: float) -> None:
    rng, model, held = random.Random(2), OnlineModel(), []
    for _ in range(2000):
        step = random_step(rng)
        seconds = DEVICE.step_s(step) * rng.lognormvariate(0.0, noise)
        held.append(seconds <= model.predict(step).upper_s)
        model.observe(step, seconds)
    assert 0.93 <= sum(held) / len(held) <= 0.97


def test_the_bound_of_a_quiet_device_is_close_to_its_mean() -> None:
    time = taught(1500, noise=0.005).predict(DECODES)
    assert time.upper_s < 1.03 * time.mean_s


# ---- recent errors ---------------------------------------------------------------------------------------------------


def test_a_kind_of_step_that_was_never_measured_is_not_to_be_trusted() -> None:
    model = OnlineModel()
    model.observe(DECODES, DEVICE.step_s(DECODES))
    assert (model.recent_error(PROMPT).steps, model.recent_error(PROMPT).relative) == (0, math.inf)
    assert model.recent_error(DECODES).steps == 1


def test_recent_errors_are_those_of_predictions_before_they_were_learned_from() -> None:
    model, errors = OnlineModel(), []
    for i in range(20):
        seconds = DEVICE.step_s(DECODES) * (1.0 + 0.1 * (i % 2))
        errors.append(abs(model.predict(DECODES).mean_s - seconds) / seconds)
        model.observe(DECODES, seconds)
    mean = sum(min(e, 1.0) for e in errors) / 20
    assert model.recent_error(DECODES).relative == pytest.approx(mean, rel=1e-9)


def test_an_old_error_fades_and_one_step_counts_for_no_more_than_all_of_its_time() -> None:
    errors = RecentErrors()
    for _ in range(100):
        errors.learn(stratum(DECODES), 0.0)
    errors.learn(stratum(DECODES), -math.log(1e6))
    assert errors.of(DECODES).relative == pytest.approx(1 / 32)
    for _ in range(200):
        errors.learn(stratum(DECODES), 0.0)
    assert errors.of(DECODES).relative < 1e-3


def test_the_error_of_a_device_that_was_learned_is_small_for_every_kind_of_step_seen() -> None:
    model = taught(1500)
    for step in (DECODES, PROMPT):
        assert model.recent_error(step).relative < 0.04


# ---- what is not believed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_a_duration_that_is_no_duration_teaches_nothing(seconds: float) -> None:
    model = taught(50)
    before = model.snapshot()
    model.observe(DECODES, seconds)
    model.observe_cold(DECODES, seconds)
    assert model.snapshot() == before


def test_a_few_long_steps_are_spikes_that_change_no_weight_and_are_forgotten_once_they_are_over() -> None:
    model = taught(500)
    before, before_s = model.snapshot().weights[: basis.TERMS], model.predict(DECODES).mean_s
    model.observe(DECODES, 5 * DEVICE.step_s(DECODES))
    assert model.predict(DECODES).mean_s == pytest.approx(before_s, rel=0.11), "one step says nothing of the next"
    for _ in range(6):
        model.observe(DECODES, 5 * DEVICE.step_s(DECODES))
    assert (model.spikes, model.epoch) == (7, 0)
    assert model.snapshot().weights[: basis.TERMS] == before
    assert before_s < model.predict(DECODES).mean_s < 1.8 * before_s, "as long as it lasts it is followed"
    for _ in range(12):
        model.observe(DECODES, DEVICE.step_s(DECODES))
    assert model.epoch == 0
    assert model.predict(DECODES).mean_s == pytest.approx(before_s, rel=0.02)


def test_what_slows_every_step_for_a_while_is_followed_for_every_kind_of_step() -> None:
    model, rng, errors = taught(500), random.Random(11), []
    for i in range(900):
        step, busy = random_step(rng), 1.3 if i // 12 % 2 else 1.0  # a neighbour comes and goes
        errors.append(abs(model.predict(step).mean_s / (busy * DEVICE.step_s(step)) - 1.0))
        model.observe(step, busy * DEVICE.step_s(step) * rng.lognormvariate(0.0, 0.02))
    assert sum(errors[300:]) / 600 < 0.08, "the mean of both is off by 13 %"


@pytest.mark.parametrize("factor", [0.7, 1.25, 2.0, 5.0])
def test_a_device_that_has_changed_is_relearned_within_a_hundred_steps_and_raises_the_epoch(factor: float) -> None:
    model = taught(600)
    changed = replace(DEVICE, **{name: factor * getattr(DEVICE, name) for name in Roofline.__dataclass_fields__})
    taught(100, changed, seed=8, model=model)
    assert model.epoch >= 1
    assert mean_error(model, changed) < 0.05


def steps_until_noticed(factor: float, expected: bool) -> int:
    """Decode steps of a device that takes `factor` times as long from now on, until the model has taken it in."""
    model = taught(600)
    if expected:
        model.expect_change()
    for step in range(1, 100):
        model.observe(DECODES, factor * DEVICE.step_s(DECODES))
        if model.epoch:
            assert abs(model.predict(DECODES).mean_s / (factor * DEVICE.step_s(DECODES)) - 1) < 0.1
            return step
    raise AssertionError("not noticed")


def test_a_change_that_the_device_itself_announced_is_taken_in_within_a_few_steps() -> None:
    assert (steps_until_noticed(1.3, False), steps_until_noticed(1.3, True)) == (16, 6)
    assert (steps_until_noticed(0.75, False), steps_until_noticed(0.75, True)) == (16, 6)
    assert (steps_until_noticed(2.5, False), steps_until_noticed(2.5, True)) == (8, 3)


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_announced_changes_that_do_not_come_change_nothing(noise: float) -> None:
    model, rng = taught(600, noise=noise), random.Random(6)
    for _ in range(40):
        model.expect_change()
        for _ in range(50):
            step = random_step(rng)
            model.observe(step, DEVICE.step_s(step) * rng.lognormvariate(0.0, noise))
    assert model.epoch == 0
    assert mean_error(model) < 0.03


def test_what_was_announced_is_forgotten_after_sixty_four_steps() -> None:
    model = taught(600)
    model.expect_change()
    for _ in range(64):
        model.observe(DECODES, DEVICE.step_s(DECODES))
    for _ in range(15):
        model.observe(DECODES, 1.3 * DEVICE.step_s(DECODES))
    assert model.epoch == 0
    model.observe(DECODES, 1.3 * DEVICE.step_s(DECODES))
    assert model.epoch == 1


def test_a_kind_of_step_never_seen_before_is_news_and_no_drift() -> None:
    model = OnlineModel()
    for _ in range(300):
        model.observe(DECODES, DEVICE.step_s(DECODES))
    long = StepFeatures(1, 1, 0, 0.0, 400_000)
    for _ in range(30):
        model.observe(long, 0.4)
    assert model.epoch == 0
    assert model.predict(long).mean_s == pytest.approx(0.4, rel=0.05)
    assert abs(error(model, DECODES)) < 0.05


def test_a_cold_step_teaches_only_while_its_kind_is_hardly_known() -> None:
    model = OnlineModel()
    model.observe_cold(PROMPT, 0.5)
    assert model.steps == 1
    model = taught(300)
    before = model.snapshot()
    model.observe_cold(PROMPT, 1.5 * DEVICE.step_s(PROMPT))
    assert model.snapshot() == before


# ---- beyond what was seen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1024, 2048, 8192])
def test_steps_far_larger_than_any_seen_are_foreseen_to_eight_percent(tokens: int) -> None:
    model = taught(1500)  # up to 512 tokens; the knee is at 120
    step = StepFeatures(tokens, 1, 1, tokens * tokens / 2, 0)
    assert abs(error(model, step)) < 0.08


def test_the_length_of_whole_prompts_does_not_pass_for_a_bend_in_their_tokens() -> None:
    """Prompts of one chunk: their attention is the square of their tokens, so nothing tells the two apart."""
    device, rng, model = Roofline(weights_s=0.03), random.Random(4), OnlineModel()
    for _ in range(800):
        q = rng.choice([128, 256, 512, 1024])
        step = StepFeatures(q, 1, 1, q * q / 2, 0)
        model.observe(step, device.step_s(step) * rng.lognormvariate(0.0, 0.01))
        model.observe(DECODES, device.step_s(DECODES) * rng.lognormvariate(0.0, 0.01))
    long = StepFeatures(8192, 1, 1, 8192 * 4096.0, 0)
    assert abs(error(model, long, device)) < 0.15


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_a_prior_from_the_datasheet_orders_devices_as_they_are() -> None:
    model = ModelConfig("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 1e-5, 5e5)
    sheets = [DATASHEETS[name] for name in ("h100", "a100", "l4")] + [cpu_datasheet(2)]
    for step in (DECODES, PROMPT):
        times = [OnlineModel(roofline(sheet, model)).predict(step).mean_s for sheet in sheets]
        assert times == sorted(times)


def test_a_fresh_model_predicts_what_its_prior_says() -> None:
    model = OnlineModel(GENERIC)
    for step, seconds in zip(GENERIC.steps, GENERIC.seconds, strict=True):
        assert model.predict(step).mean_s == pytest.approx(seconds, rel=0.25)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10G", "a10"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtxpro6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A40", "a40"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA RTX A1000", None),
        ("", None),
    ],
)
def test_a_datasheet_is_found_by_the_name_the_driver_gives(driver: str, name: str | None) -> None:
    assert datasheet_of(driver) is (DATASHEETS[name] if name else None)
