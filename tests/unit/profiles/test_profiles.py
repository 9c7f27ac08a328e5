"""Device profiles: what the tables say, for any batch, and which profiles there are."""

import numpy as np
import pytest

from nexusengine.errors import ConfigError
from nexusengine.profiles.base import DeviceProfile
from nexusengine.profiles.composed import ComposedProfile
from nexusengine.profiles.geometry import MEMORY_BYTES, MODELS, emulated_geometry, kv_capacity_tokens
from nexusengine.profiles.moe import expected_experts
from nexusengine.profiles.noise import Noise
from nexusengine.profiles.registry import list_profiles, load_profile

NAMES = [info.identity.name for info in list_profiles()]


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def decodes(profile: DeviceProfile, n: int, context: int) -> float:
    """Milliseconds."""
    return 1e3 * profile.step_s(np.ones(n, np.int32), np.full(n, context, np.int32))


def chunk_and_decodes(profile: DeviceProfile, chunk: int, cached: int, n: int, context: int) -> float:
    counts, contexts = np.ones(n + 1, np.int32), np.full(n + 1, context, np.int32)
    counts[-1], contexts[-1] = chunk, cached
    return 1e3 * profile.step_s(counts, contexts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rtxpro6000", (11.4, 15.1, 25.3, 83.0, 74.3)), ("rtx4090", (16.8, 23.9, 40.5, 193.0, 163.0))],
)
def test_steps_composed_of_measured_kernels_are_those_of_the_data_sets_own_composition(
    name: str, expected: tuple[float, ...]
) -> None:
    p = load_profile(name)
    found = [decodes(p, n, 1024) for n in (1, 32, 128)]
    found += [chunk_and_decodes(p, 2048, 0, 0, 0), chunk_and_decodes(p, 1024, 1024, 128, 1024)]
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_decodes_takes_what_its_steps_take_one_by_one(name: str) -> None:
    p = load_profile(name)
    contexts = np.random.default_rng(1).integers(1, 20_000, 37).astype(np.int32)
    run = p.decode_run_s(contexts, 50)
    assert run.shape == (50,)
    for k in (0, 1, 17, 49):
        assert run[k] == pytest.approx(p.step_s(np.ones(37, np.int32), contexts + np.int32(k)), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    p, rng = load_profile(name), np.random.default_rng(2)
    counts = np.concatenate([np.ones(20, np.int32), ints(700, 64, 3000)])
    contexts = rng.integers(0, 9000, 23).astype(np.int32)
    order = rng.permutation(23)
    assert p.step_s(counts, contexts) == pytest.approx(p.step_s(counts[order], contexts[order]), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_more_work_takes_longer(name: str) -> None:
    p = load_profile(name)
    assert decodes(p, 1, 512) < decodes(p, 64, 512) < decodes(p, 64, 8192) < decodes(p, 256, 8192)
    assert (
        chunk_and_decodes(p, 256, 0, 0, 0)
        < chunk_and_decodes(p, 2048, 0, 0, 0)
        < chunk_and_decodes(p, 2048, 0, 64, 512)
    )
    assert chunk_and_decodes(p, 2048, 0, 0, 0) < chunk_and_decodes(p, 2048, 8192, 0, 0)
    assert chunk_and_decodes(p, 8192, 0, 0, 0) > 3 * chunk_and_decodes(p, 2048, 0, 0, 0)


def test_a_long_chunk_is_a_shorter_one_and_one_behind_it() -> None:
    p = load_profile("rtxpro6000")
    whole = chunk_and_decodes(p, 4096, 0, 0, 0)
    apart = chunk_and_decodes(p, 2048, 0, 0, 0) + chunk_and_decodes(p, 2048, 2048, 0, 0)
    assert whole == pytest.approx(apart, rel=0.05)


def test_two_prompts_take_less_attention_than_one_of_their_length() -> None:
    p = load_profile("rtxpro6000")
    two, one = p.step_s(ints(1024, 1024), ints(0, 0)), p.step_s(ints(2048), ints(0))
    assert two < one
    assert two > 0.9 * one


def test_unequal_contexts_cost_more_than_equal_ones_of_the_same_sum() -> None:
    p = load_profile("rtxpro6000")
    uneven = np.full(128, 500, np.int32)
    uneven[:8] = 8500
    even = np.full(128, int(uneven.mean()), np.int32)
    ones = np.ones(128, np.int32)
    assert 1.0 < p.step_s(ones, uneven) / p.step_s(ones, even) < 1.15


def test_decodes_beside_a_chunk_take_longer_than_alone_where_that_was_measured() -> None:
    p = load_profile("rtxpro6000")
    beside = chunk_and_decodes(p, 16, 0, 128, 1024) - chunk_and_decodes(p, 16, 0, 0, 0)
    assert beside > 1.2 * (decodes(p, 128, 1024) - decodes(p, 1, 16))


def test_experts_of_two_devices_are_read_by_halves() -> None:
    p = load_profile("rtxpro6000/qwen3-30b-a3b")
    assert isinstance(p, ComposedProfile)
    assert p.experts is not None
    one, two = p.experts.seconds(1), p.experts.seconds(2)
    assert two(128) == pytest.approx(0.5 * one(128), rel=0.1)  # all experts read in both cases
    assert two(4096) < one(4096)


def test_every_token_reaches_its_number_of_experts_and_all_tokens_all() -> None:
    reached = expected_experts(np.array([1.0, 10_000.0]), 128, 8)
    assert reached == pytest.approx([8.0, 128.0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixed", [False, True])
def test_scatter_has_mean_one_and_rises_with_the_quantile(name: str, mixed: bool) -> None:
    p = load_profile(name)
    u = (np.arange(100_000) + 0.5) / 100_000
    factors = p.noise(u, mixed)
    assert factors.mean() == pytest.approx(1.0, abs=1e-4)
    assert (np.diff(factors) >= 0).all()
    assert 0.5 < factors[0] < 1.0 < factors[-1] < 2.0


def test_noise_of_any_table_is_scaled_to_mean_one() -> None:
    u = (np.arange(1000) + 0.5) / 1000
    assert Noise([1.0, 2.0, 9.0], [2.0, 2.0])(u, False).mean() == pytest.approx(1.0, abs=1e-3)
    assert Noise([1.0, 2.0, 9.0], [2.0, 2.0])(u, True) == pytest.approx(np.ones(1000))


# ---- which there are -------------------------------------------------------------------------------------------------


def test_every_device_of_the_evaluation_has_a_profile_of_the_default_model() -> None:
    devices = {n.partition("/")[0] for n in NAMES if n.endswith("/llama-3.1-8b")}
    assert devices >= {"rtxpro6000", "rtx4090", "h100", "h200", "a100", "l40s", "b200", "a6000", "l4", "a10", "t4"}


def test_the_list_says_where_each_comes_from_and_how_sure_it_is() -> None:
    infos = {info.identity.name: info for info in list_profiles()}
    assert infos["rtxpro6000/llama-3.1-8b"].identity.confidence == "measured"
    assert infos["h100/llama-3.1-8b"].identity.confidence == "composed"
    assert infos["a6000/llama-3.1-8b"].identity.confidence == "resampled"
    assert infos["l4/llama-3.1-8b"].identity.confidence == "roofline"
    assert infos["a6000/llama-3.1-8b"].noise == "a6000/llama-3.1-8b"
    assert infos["h100/llama-3.1-8b"].noise == "pooled"
    for info in infos.values():
        assert info.identity.source
        assert info.identity.kv_capacity_tokens >= 16_000
        assert all(ms > 0 for ms in info.step_ms.values())


def test_faster_devices_are_faster() -> None:
    by_device = {d: load_profile(d) for d in ("b200", "h200", "h100", "a100", "rtx4090", "l4")}
    times = [decodes(p, 64, 1024) for p in by_device.values()]
    assert times == sorted(times)


def test_a_device_and_a_model_may_be_named_together_or_apart() -> None:
    assert (
        load_profile("h100/qwen3-32b").identity.name
        == load_profile("h100", "qwen3-32b").identity.name
        == "h100/qwen3-32b"
    )
    assert load_profile("h100").identity.name == "h100/llama-3.1-8b"


def test_a_model_of_similar_shape_is_scaled_and_says_so() -> None:
    base, scaled = load_profile("h100/qwen3-32b"), load_profile("h100/qwen3-14b")
    assert scaled.identity.confidence == "composed"
    assert "scaled by geometry" in scaled.identity.source
    ratio = MODELS["qwen3-14b"].parameters / MODELS["qwen3-32b"].parameters
    assert decodes(scaled, 1, 512) / decodes(base, 1, 512) == pytest.approx(ratio, rel=0.15)
    assert scaled.identity.kv_capacity_tokens == kv_capacity_tokens("h100", MODELS["qwen3-14b"])


def test_a_model_of_the_same_shape_takes_the_same_time() -> None:
    for device in ("h100", "a6000", "rtxpro6000"):
        assert decodes(load_profile(f"{device}/llama-3-8b"), 16, 700) == decodes(load_profile(device), 16, 700)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("abacus", "h100/llama-3.1-8b"),
        ("h100/nosuch", "shapes are known of"),
        ("h100/smollm2-135m", "too unlike"),
        ("l4/qwen3-32b", "do not fit"),
        ("h100/qwen3-30b-a3b", "experts"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_what_is_known(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_profile(spec)


def test_kv_capacity_is_what_the_weights_leave_of_the_memory() -> None:
    g = MODELS["llama-3.1-8b"]
    assert g.kv_bytes_per_token == 131_072
    assert g.parameters == pytest.approx(8.03e9, rel=0.001)
    room = kv_capacity_tokens("h100", g) * g.kv_bytes_per_token + g.weights_bytes
    assert room == pytest.approx(0.9 * MEMORY_BYTES["h100"] - 1.2 * 2**30, rel=0.001)
    assert kv_capacity_tokens("rtxpro6000-tp2", g) > 2 * kv_capacity_tokens("rtxpro6000", g)
    assert kv_capacity_tokens("t4", g) == 0


def test_the_shape_behind_an_emulated_device_is_that_of_its_profile() -> None:
    h100 = emulated_geometry("h100")
    assert h100 is not None
    assert (h100.num_layers, h100.hidden_size) == (32, 4096)
    assert emulated_geometry("h100/qwen3-32b").num_layers == 64  # type: ignore[union-attr]
    assert emulated_geometry("my.json") is None
