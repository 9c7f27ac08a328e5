"""config.json and safetensors: what is read, and what is refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.memory import wanted_length
from nexusengine.loading.config_json import parse_config, read_config
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.safetensors_file import INDEX, check_header, find_shards

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


def test_a_short_name_with_a_typo_is_suggested() -> None:
    with pytest.raises(ModelLoadError, match=r"there is no model 'smolm2-135m' \(did you mean 'smollm2-135m'\?\):"):
        resolve_model("smolm2-135m")
    with pytest.raises(ModelLoadError, match="there is no model 'gpt-4o': not a short name"):
        resolve_model("gpt-4o")


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
        (
            {"a": "gone.safetensors", "b": "there.safetensors", "c": "too.safetensors"},
            "names gone.safetensors and 1 more",
        ),
        ({"a": "../x.safetensors"}, "not a safetensors file beside"),
        ({"a": "x.bin"}, "not a safetensors file beside"),
        ({"a": 3}, "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    tensor_file(tmp_path / "there.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match=words):
        find_shards(tmp_path)


def test_a_stale_index_beside_a_whole_file_is_no_error(tmp_path: Path) -> None:
    """transformers takes the file too."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    tensor_file(tmp_path / "model.safetensors")
    assert find_shards(tmp_path) == (tmp_path / "model.safetensors",)


def test_files_with_tensors_of_other_names_are_not_taken_for_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        tensor_file(tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ModelLoadError, match=r"no \*\.safetensors weights; adapter_model.*pytorch_model.bin there is not read"
    ):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
)
def test_a_git_lfs_pointer_is_called_that_whatever_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if name != INDEX:
        tensor_file(tmp_path / "model.safetensors")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 988097824\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(
        ModelLoadError, match=rf"{name} is a git-lfs pointer and not the file itself; run `git lfs pull`"
    ):
        _checked(tmp_path)


def _checked(folder: Path) -> None:
    for shard in resolve_model(str(folder)).weights:
        check_header(shard)


def test_json_that_is_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ModelLoadError, match=r"config\.json.*nested too deeply"):
        resolve_model(str(tmp_path))
    tensor_file(tmp_path / "m.safetensors", b'{"a": ' + b"[" * 100_000)
    with pytest.raises(ModelLoadError, match=r"m\.safetensors.*nested too deeply"):
        check_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "ref", ["a" * 5_000, "org/" + "n" * 5_000, "x\0y", "~nobody/here", "/dev/null", "/proc/self/mem"]
)
def test_names_that_the_system_does_not_take_are_one_sentence(ref: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        resolve_model(ref)
    assert len(caught.value.message) < 600
    assert "\n" not in caught.value.message


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NEXUSENGINE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelLoadError, match=r"cannot keep the default model in .*NEXUSENGINE_CACHE") as caught:
        resolve_model("smollm2-135m")
    assert caught.value.message.isprintable()


def test_one_file_of_a_checkpoint_is_told_apart_from_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"name its folder, {tmp_path}"):
        resolve_model(str(tensor_file(tmp_path / "model.safetensors")))


def test_scaled_positions_reach_further_than_those_of_the_training() -> None:
    """By yarn and linear scaling; 32,768 times 4 is what Qwen2.5's page says of itself."""
    qwen = {"factor": 4.0, "original_max_position_embeddings": 32_768, "type": "yarn"}
    for scaling, positions, expected in (
        (qwen, 32_768, 131_072),
        (qwen, 131_072, 131_072),
        ({"factor": 4.0, "type": "yarn"}, 256, 1_024),
        ({"factor": 2.5, "type": "linear"}, 256, 640),
        ({"factor": 4.0, "type": "dynamic"}, 256, 256),
        ({"factor": 8.0, "type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 256, 256),
        (None, 256, 256),
    ):
        change = {"rope_scaling": scaling, "max_position_embeddings": positions}
        assert parse_config(CONFIG | change, "config.json").max_position == expected, scaling


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, 128),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 32_768}, 4_096),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 256),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}, 256),
        ({"sliding_window": 128}, 256),
    ],
)
def test_a_model_is_served_as_far_as_its_window_sees(change: dict[str, Any], longest: int) -> None:
    config = parse_config(CONFIG | change, "config.json")
    assert config.longest == longest
    assert wanted_length(config, ExecutorOptions()) == longest
    with pytest.raises(ConfigError, match="max_model_len"):
        wanted_length(config, ExecutorOptions(max_model_len=longest + 1))


@pytest.mark.parametrize("name", ["model.gguf", "config.json"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelLoadError, match=f"{name} is empty; download the file again"):
        resolve_model(str(tmp_path / name if name.endswith("gguf") else tmp_path))
