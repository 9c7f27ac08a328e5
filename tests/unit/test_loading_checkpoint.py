"""config.json and safetensors: what is read, and what is refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.loading.config_json import parse_config, read_config
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.safetensors_file import check_header, find_shards

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def test_a_configuration_is_read() -> None:
    config = parse_config(CONFIG, "config.json")
    assert (config.head_dim, config.num_kv_heads, config.rope_theta, config.eos_token_ids) == (16, 2, 500000.0, (2,))
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}},
    ],
)
def test_rope_scaling_is_read_in_its_old_and_new_spellings(rope: dict[str, Any]) -> None:
    config = parse_config(CONFIG | rope, "config.json")
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor, config.rope_theta) == ("linear", 4.0, 500000.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": "awq"}, "quantization_config is 'awq'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "4k"}, "sliding_window is '4k'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"architectures": []}, "architectures"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        parse_config(CONFIG | change, "config.json")


def test_end_of_text_ids_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert read_config(tmp_path).eos_token_ids == (2, 9)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ModelLoadError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("ref", ["no-such-model", "./nowhere", "/nowhere/at/all", "missing.gguf"])
def test_a_model_that_does_not_exist_is_one_clear_sentence(ref: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no model"):
        resolve_model(ref)


def test_a_revision_without_a_repository_is_refused(tmp_path: Path) -> None:
    for ref in ("smollm2-135m", str(tmp_path)):
        with pytest.raises(ConfigError, match="revision 'main' was given"):
            resolve_model(ref, revision="main")


def test_a_directory_without_weights_or_with_too_many_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json and no \.gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors"):
        resolve_model(str(tmp_path))
    assert resolve_model(str(tmp_path), weights=False).kind == "none"


def tensor_file(path: Path, header: Any = None, data: bytes = bytes(24)) -> Path:
    if header is None:
        header = {
            "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
        }
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(**change: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | change}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{broken", "not JSON"),
        (b"[]", "not a JSON object"),
        (entry(dtype="F99"), "tensor a is malformed"),
        (entry(shape=["x"]), "tensor a is malformed"),
        (entry(shape=[3, 3]), "tensor a .* does not fit its shape"),
        (entry(data_offsets=[16, 0]), "tensor a"),
        (entry(shape=[20], data_offsets=[0, 80]), "tensor a at bytes 0 to 80"),
        (entry() | {"b": entry()["a"]}, "tensors a and b overlap"),
        (entry() | {"b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}, "tensors a and b have a gap"),
        (entry(), "bytes 0 to 16 of 24"),
        (entry(data_offsets=[8, 24]), "bytes 8 to 24 of 24"),
        ({}, "bytes 0 to 0 of 24"),
        ({"a": {}}, "tensor a is malformed"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        check_header(tensor_file(tmp_path / "m.safetensors", header))


def test_a_truncated_or_damaged_file_never_ends_in_anything_but_a_clear_error(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "m.safetensors")
    content, rng = path.read_bytes(), random.Random(3)
    for _ in range(1_000):
        damaged = bytearray(content[: rng.randrange(len(content)) if rng.random() < 0.3 else len(content)])
        for _ in range(rng.randint(0, 3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            check_header(path)
        except ModelLoadError as error:
            assert "m.safetensors" in error.message  # noqa: PT017


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "gone.safetensors"}, "names gone"),
        ({"a": "../x.safetensors"}, "not a safetensors file beside"),
        ({"a": 3}, "weight_map"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match=words):
        find_shards(tmp_path)
