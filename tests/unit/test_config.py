"""Settings: where values come from, and what a wrong one is answered."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

import pytest

from nexusengine.config import (
    EngineConfig,
    ServeConfig,
    add_arguments,
    load,
    parse_bytes,
    parse_device,
    parse_devices,
)
from nexusengine.errors import ConfigError
from nexusengine.router.placement import registry as router
from nexusengine.scheduler import registry as scheduler
from tests.unit.worker.test_gpu import A, FakeDriver


def test_the_command_line_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("port = 1\nmax-running = 2\nmax_waiting = 3\n")
    environ = {"NEXUSENGINE_PORT": "4", "NEXUSENGINE_MAX_RUNNING": "5"}
    config = load(ServeConfig, {"port": "6"}, environ=environ, toml_file=file)
    assert (config.port, config.max_running, config.max_waiting, config.max_batch_tokens) == (6, 5, 3, 2048)


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * 2**30), ("500M", 500_000_000), ("1.5KiB", 1536), ("7", 7), ("1gb", 10**9)]
)
def test_sizes_are_read_with_decimal_and_binary_prefixes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"port": "65536"}, ["--port", "65536", "65535"]),
        ({"kv_cache_memory": "lots"}, ["--kv-cache-memory", "lots", "2GiB"]),
        ({"dtype": "int3"}, ["--dtype", "int3", "float32"]),
        ({"prefix_caching": "perhaps"}, ["--prefix-caching", "perhaps"]),
        ({"prefix_caching": 3}, ["--prefix-caching", "3"]),
        ({"max_running": "x"}, ["--max-running", "x"]),
        ({"max_running": 3.7}, ["--max-running", "3.7", "whole"]),
        ({"max_running": True}, ["--max-running", "True", "whole"]),
        ({"kv_cache_memory": 0}, ["--kv-cache-memory", "0"]),
        ({"kv_cache_memory": -1}, ["--kv-cache-memory", "-1"]),
        ({"max_body_bytes": True}, ["--max-body-bytes", "True"]),
        ({"api_key": ""}, ["--api-key", "empty"]),
        ({"api_key": "sécret"}, ["--api-key", "ASCII"]),
        ({"api_key": "two words"}, ["--api-key", "spaces"]),
        ({"api_key": "secret\n"}, ["--api-key", "spaces"]),
        ({"cors_origins": ""}, ["--cors-origins", "''", "scheme://host"]),
        ({"cors_origins": "*,example.org"}, ["--cors-origins", "'example.org'"]),
        ({"cors_origins": "https://example.org/"}, ["--cors-origins", "without a path"]),
    ],
)
def test_a_wrong_value_is_named_with_its_option_and_what_is_right(given: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(ServeConfig, given, environ={})
    for word in words:
        assert word in caught.value.message


def test_a_wrong_environment_value_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="NEXUSENGINE_PORT"):
        load(ServeConfig, {}, environ={"NEXUSENGINE_PORT": "http"})


def test_a_file_with_an_unknown_key_or_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigError, match="prot"):
        load(ServeConfig, {}, environ={}, toml_file=file)
    file.write_text("port = = 1\n")
    with pytest.raises(ConfigError, match="not TOML"):
        load(ServeConfig, {}, environ={}, toml_file=file)
    with pytest.raises(ConfigError, match="cannot read"):
        load(ServeConfig, {}, environ={}, toml_file=tmp_path / "none.toml")


def test_devices_are_read_and_written_the_same_way() -> None:
    for text in ("cuda:1", "cpu", "cpu:2", "emulated:h100"):
        assert str(parse_device(text)) == text
    assert [d.threads for d in parse_devices("cpu:1, cpu:1")] == [1, 1]


@pytest.mark.parametrize("text", ["gpu:0", "cuda:x", "cpu:0", "cpu:", "emulated:", "", ",", "cuda:0,cuda:0"])
def test_what_is_not_a_device_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_devices(text)
    assert caught.value.param == "devices"


def test_auto_takes_the_gpus_it_is_shown_or_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    driver.gpus = tuple(dataclasses.replace(A, uuid=f"GPU-{i}") for i in range(8))
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [str(d) for d in parse_devices("auto")] == ["cuda:0", "cuda:1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [str(d) for d in parse_devices("auto")] == ["cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    driver.gpus = ()
    assert [str(d) for d in parse_devices("auto")] == ["cpu"], "shown a GPU that is not there"


def test_every_setting_is_an_option_of_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig)
    args = parser.parse_args(["--no-prefix-caching", "--max-model-len", "128", "--devices", "cpu:1"])
    config = load(EngineConfig, vars(args), environ={})
    assert (config.prefix_caching, config.max_model_len, config.devices) == (False, 128, "cpu:1")


def test_an_empty_key_in_the_environment_is_no_open_door() -> None:
    with pytest.raises(ConfigError, match=r"NEXUSENGINE_API_KEY: .* empty"):
        load(ServeConfig, {}, environ={"NEXUSENGINE_API_KEY": ""})


def test_keys_and_origins_are_taken_as_they_are() -> None:
    given = {"api_key": "sk-a/b+c~d.e_f=", "cors_origins": "https://example.org, http://localhost:3000 ,null"}
    config = load(ServeConfig, given, environ={})
    assert config.api_key == given["api_key"]
    assert config.cors_origins == "https://example.org,http://localhost:3000,null"


@pytest.mark.parametrize(("name", "policies"), [("scheduler", scheduler.POLICIES), ("router", router.POLICIES)])
def test_the_help_names_every_policy(name: str, policies: dict[str, str]) -> None:
    (setting,) = (f for f in dataclasses.fields(ServeConfig) if f.name == name)
    assert set(policies) <= set(re.findall(r"[\w-]+", setting.metadata["help"]))


def test_the_name_of_a_model_can_be_sent_whatever_its_file_is_called() -> None:
    assert ServeConfig(model="m\udcff.gguf").public_name == "m\\udcff.gguf"
    assert ServeConfig(model="m\udcff.gguf", served_model_name="mine").public_name == "mine"
