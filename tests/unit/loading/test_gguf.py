"""GGUF: every supported type, geometry, the row permutation undone, and damage that is named."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nexusengine.errors import ModelLoadError
from nexusengine.loading.gguf_config import parse_metadata
from nexusengine.loading.gguf_file import GGUFFile, supported_types
from nexusengine.loading.resolve import resolve_model
from tests.support import gguf_models

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 8, 4, 2, 40


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path: Path, kind: str = "F32", architecture: str = "llama", **metadata: Any) -> dict[str, np.ndarray]:
    """A tiny Llama; returns its matrices by Hugging Face name, before any quantisation."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    values = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": 512,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        **metadata,
    }
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
            continue
        add = (
            writer.add_bool
            if isinstance(value, bool)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_float32
            if isinstance(value, float)
            else writer.add_uint32
        )
        add(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(65 + i) for i in range(VOCABULARY)])
    written: dict[str, np.ndarray] = {}

    def add_tensor(name: str, hf_name: str, *shape: int, heads: int = 0) -> None:
        value = rng.standard_normal(shape).astype(np.float32)
        written[hf_name] = value
        stored = permuted(value, heads) if heads else value
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, stored)
            return
        quantised = gguf.GGMLQuantizationType[kind]
        data = stored.astype(np.float16) if kind == "F16" else gguf.quants.quantize(stored, quantised)
        writer.add_tensor(name, data, raw_dtype=quantised)

    add_tensor("token_embd.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    add_tensor("output_norm.weight", "model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        hf = f"model.layers.{i}"
        kv = HIDDEN // HEADS * KV_HEADS
        add_tensor(f"blk.{i}.attn_norm.weight", f"{hf}.input_layernorm.weight", HIDDEN)
        add_tensor(f"blk.{i}.attn_q.weight", f"{hf}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add_tensor(f"blk.{i}.attn_k.weight", f"{hf}.self_attn.k_proj.weight", kv, HIDDEN, heads=KV_HEADS)
        add_tensor(f"blk.{i}.attn_v.weight", f"{hf}.self_attn.v_proj.weight", kv, HIDDEN)
        add_tensor(f"blk.{i}.ffn_down.weight", f"{hf}.mlp.down_proj.weight", HIDDEN, 512)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_tensor_of_each_type_comes_back_under_its_name(tmp_path: Path, kind: str) -> None:
    written = write(tmp_path / "m.gguf", kind)
    file = GGUFFile(tmp_path / "m.gguf")
    assert set(file.tensors) == set(written)
    for name, value in written.items():
        read = file.array(name)
        assert read.shape == value.shape
        assert read.dtype == np.float32
        error = np.abs(read - value).max() / np.abs(value).max()
        assert error < {"F32": 1e-9, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02}.get(kind, 0.2), name


BLOCKS = sorted(kind for kind in supported_types() if kind not in ("F32", "F16", "BF16"))


def test_every_type_that_the_gguf_package_decodes_is_supported() -> None:
    """Of ggml's 23 types of blocks all; that the package decodes them as ggml does was checked block by block."""
    assert {"Q2_K", "Q3_K", "Q5_K", "IQ1_M", "IQ2_XXS", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4"} <= set(BLOCKS)
    for number in gguf.GGMLQuantizationType:
        rows = np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8)
        try:
            gguf.quants.dequantize(rows, number)
        except NotImplementedError:
            assert number.name not in supported_types()
        else:
            assert number.name in supported_types()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_read_as_the_gguf_package_reads_them(tmp_path: Path, kind: str) -> None:
    """The package cannot write all of them, so the blocks are random bytes."""
    quantised = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    data = np.random.default_rng(1).integers(0, 256, (VOCABULARY, 3 * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=quantised)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    read = GGUFFile(tmp_path / "m.gguf").array("model.embed_tokens.weight")
    assert read.shape == (VOCABULARY, 3 * per_block)
    with np.errstate(all="ignore"):
        assert np.array_equal(read, gguf.quants.dequantize(data, quantised), equal_nan=True)


def test_the_geometry_is_read_from_the_metadata(tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"rope.freq_base": 5e3, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    write(tmp_path / "m.gguf", **scaling)
    config = resolve_model(str(tmp_path / "m.gguf")).config
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (HIDDEN, 8, 4, 32)
    assert (config.vocab_size, config.tie_embeddings, config.rope_theta) == (VOCABULARY, True, 5000.0)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(("kind", "number"), [("Q8_1", 9), ("I32", 26), ("number 31", 31), ("number 200", 200)])
def test_a_type_that_is_not_supported_is_named_with_its_tensor(tmp_path: Path, kind: str, number: int) -> None:
    """Also one that the gguf package does not know: it is no reason not to say first that the architecture is wrong."""
    written = write(tmp_path / "m.gguf", architecture="falcon")
    content = (tmp_path / "m.gguf").read_bytes()
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "m.gguf").write_bytes(content[:at] + number.to_bytes(4, "little") + content[at + 4 :])
    assert kind not in supported_types()
    assert written
    file = GGUFFile(tmp_path / "m.gguf")
    with pytest.raises(ModelLoadError, match="architecture 'falcon' is not supported"):
        file.config()
    with pytest.raises(ModelLoadError, match=rf"model\.embed_tokens\.weight has type {kind}"):
        file.array("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"attention.head_count_kv": 3}, "3 key-value heads"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"rope.dimension_count": 16}, "part of the head"),
        ({"context_length": "long"}, "context_length is 'long'"),
        ({"context_length": 0}, "context_length is 0"),
        ({"block_count": 0}, "block_count is 0"),
        ({"attention.value_length": 16}, "keys and values of different lengths"),
        ({"rope.scaling.factor": 0.0}, "rope.scaling.factor is 0.0"),
        ({"rope.scaling.factor": float("nan")}, "rope.scaling.factor is nan"),
        ({"rope.scaling.factor": -1.0}, "rope.scaling.factor is -1.0"),
        ({"rope.scale_linear": float("inf")}, "rope.scale_linear is inf"),
        ({"rope.scaling.attn_factor": 0.0}, "rope.scaling.attn_factor is 0.0"),
        ({"rope.freq_base": 0.0}, "rope.freq_base is 0.0"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5, which is not supported"),
        ({"attention.causal": False}, "attention.causal is False, which is not supported"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attention.head_count_kv": [4, 2]}, r"attention.head_count_kv is \[4, 2\]"),
    ],
)
def test_metadata_we_cannot_serve_is_named(tmp_path: Path, metadata: dict[str, Any], words: str) -> None:
    write(tmp_path / "m.gguf", **metadata)
    with pytest.raises(ModelLoadError, match=words):
        resolve_model(str(tmp_path / "m.gguf"))


def test_the_architecture_is_the_first_reason(tmp_path: Path) -> None:
    further: dict[str, Any] = {"rope.scaling.type": "longrope", "attention.head_count_kv": 3}
    write(tmp_path / "m.gguf", architecture="gemma2", **further)
    with pytest.raises(ModelLoadError, match="architecture 'gemma2' is not supported; known: llama, qwen2"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_an_architecture_that_is_no_name_is_refused(tmp_path: Path) -> None:
    file = GGUFFile(gguf_models.write(tmp_path / "m.gguf"))
    for name in (["llama"], 7, None, "x" * 5_000 + "\n"):
        with pytest.raises(ModelLoadError, match=r"architecture .* is not supported") as caught:
            parse_metadata(file.metadata | {"general.architecture": name}, file.tensors, file.array, file.path)
        assert caught.value.message.isprintable()


def test_rope_factors_that_are_none_are_refused(tmp_path: Path) -> None:
    for i, factors in enumerate(([1.0] * 15 + [0.0], [1.0] * 15 + [float("nan")], [1.0] * 3)):
        path = tmp_path / f"{i}.gguf"
        widths: dict[str, Any] = {"attention.key_length": 32, "attention.value_length": 32}
        gguf_models.write(path, "llama", **widths)
        extra = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
        extra.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
        steps = (extra.write_header_to_file, extra.write_kv_data_to_file, extra.write_tensors_to_file, extra.close)
        for step in steps:
            step()
        file = GGUFFile(path)
        other = GGUFFile(tmp_path / "x.gguf")
        with pytest.raises(ModelLoadError, match=r"rope_freqs.weight must hold 16 numbers above 0"):
            parse_metadata(file.metadata, file.tensors | other.tensors, other.array, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"FUGG\0\0\0\3" + bytes(64), "big-endian"),
        (b"GGUF\0\0\0\3" + bytes(64), r"big-endian \(version 3\)"),
        (b"GGUF\1\0\0\0" + bytes(64), "old version 1, of August 2023"),
        (b"GGUF\x09\0\0\0" + bytes(64), "version 9 is not supported; known: 2, 3"),
        (b"tjgg\3\0\0\0" + bytes(64), "format before GGUF"),
        (b"lmgg" + bytes(64), "format before GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64, "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\3\4" + bytes(64), "begins with b'PK"),
        (b"", "is empty; download the file again"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match=words) as caught:
        resolve_model(str(tmp_path / "m.gguf"))
    assert "m.gguf" in caught.value.message


def test_a_file_that_holds_no_model_says_what_it_is(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_type("adapter")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ModelLoadError, match="'adapter'"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_a_part_of_a_split_model_that_is_missing_is_named(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "m.gguf", split=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    resolve_model(str(tmp_path))
    parts[1].unlink()
    for named in (parts[0], parts[-1], tmp_path):
        with pytest.raises(ModelLoadError, match=parts[1].name) as caught:
            resolve_model(str(named))
        assert "missing" in caught.value.message
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(ModelLoadError, match=r"other.gguf says that it is one of 5 parts.*parts are named NAME-00001"):
        resolve_model(str(tmp_path / "other.gguf"))


def test_parts_of_different_models_are_not_mixed(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "m.gguf", split=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelLoadError, match=f"{parts[1].name} says that it is part 2"):
        resolve_model(str(parts[0]))


def test_of_a_folder_of_several_models_one_is_to_be_named(tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf", "mmproj-x.gguf"):
        gguf_models.write(tmp_path / name)
    with pytest.raises(ModelLoadError, match=r"2 .gguf files; name one of them: a-Q4_0.gguf, b-Q8_0.gguf"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, share: float) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelLoadError, match=r"m\.gguf"):
        resolve_model(str(path))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_header_is_an_error_or_harmless_and_never_worse(tmp_path: Path) -> None:
    """2,000 files with a few header bytes changed."""
    path = tmp_path / "m.gguf"
    write(path, "Q8_0")
    content, rng, refused = path.read_bytes(), random.Random(11), 0
    header = len(content) - sum(t.nbytes for t in GGUFFile(path).tensors.values())
    for _ in range(2_000):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            file.config()
            for name in list(file.tensors)[:3]:
                file.array(name)
        except ModelLoadError:
            refused += 1
    assert refused > 200
