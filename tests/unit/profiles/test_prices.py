"""What devices cost: the list, names of devices, and a user's file over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexusengine.errors import ConfigError
from nexusengine.profiles.geometry import MEMORY_BYTES
from nexusengine.profiles.prices import (
    DEVICE_COSTS,
    FILE_VARIABLE,
    DeviceCost,
    cost_of,
    read_costs,
    usual_costs,
)


def test_every_device_with_a_profile_has_its_watts() -> None:
    assert set(DEVICE_COSTS) == set(MEMORY_BYTES)
    for cost in DEVICE_COSTS.values():
        assert cost.idle_w is not None
        assert cost.busy_w is not None
        assert 0 < cost.idle_w < 0.35 * cost.busy_w
        assert cost.price_per_hour is None or 0.1 < cost.price_per_hour < 20


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("h100", "h100"),
        ("h100/qwen3-32b", "h100"),
        ("emulated:h100/qwen3-32b", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_device_is_known_by_its_profile_and_by_its_drivers_name(name: str, known: str) -> None:
    assert cost_of(name, DEVICE_COSTS) == DEVICE_COSTS[known]


@pytest.mark.parametrize("name", ["cpu:1", "cuda:0", "NVIDIA H20", "NVIDIA A40", "emulated:instant", ""])
def test_of_others_nothing_is_known(name: str) -> None:
    assert cost_of(name, DEVICE_COSTS) == DeviceCost()


def test_two_devices_that_share_a_model_cost_twice_as_much() -> None:
    one, two = DEVICE_COSTS["rtxpro6000"], cost_of("rtxpro6000-tp2", DEVICE_COSTS)
    assert (two.idle_w, two.busy_w) == (2 * (one.idle_w or 0), 2 * (one.busy_w or 0))


def test_a_file_of_the_user_comes_before_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.toml"
    path.write_text('h100 = 7\n"cuda:0" = 2\n[l4]\nidle_w = 9\n[mygpu]\nprice = 1.5\nbusy_w = 200\n')
    costs = read_costs(str(path))
    assert costs["h100"] == DeviceCost(7.0, 120.0, 700.0)
    assert (costs["l4"].idle_w, costs["l4"].price_per_hour) == (9.0, DEVICE_COSTS["l4"].price_per_hour)
    assert cost_of("cuda:0", costs).price_per_hour == 2.0
    assert costs["mygpu"] == DeviceCost(1.5, None, 200.0)
    assert read_costs("t4=1.5")["t4"].price_per_hour == 1.5
    assert read_costs(None) == dict(DEVICE_COSTS)
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    usual_costs.cache_clear()
    assert usual_costs()["h100"].price_per_hour == 7.0
    monkeypatch.delenv(FILE_VARIABLE)
    usual_costs.cache_clear()
    assert usual_costs() == DEVICE_COSTS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h100 = 'cheap'", "the price of h100 must be a number, got 'cheap'"),
        ("h100 = true", "must be 0 or more, got True"),
        ("h100 = -1", "must be 0 or more, got -1"),
        ("h100 = nan", "must be 0 or more, got nan"),
        ("[h100]\nwatts = 3", "h100: watts is not known; known: price, idle_w, busy_w"),
        ("[h100]\nidle_w = 800", "h100: idle_w, 800, is above busy_w, 700"),
        ("h100 =", "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=words):
        read_costs(str(path))


def test_the_variable_names_a_toml_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "h100=3")
    usual_costs.cache_clear()
    with pytest.raises(ConfigError, match=r"not a \.toml file"):
        usual_costs()
    usual_costs.cache_clear()
