"""GGUF: every supported type, geometry, the row permutation undone, and damage that is named."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nexusengine.errors import ModelLoadError
from nexusengine.loading.gguf_file import GGUFFile, supported_types
from nexusengine.loading.resolve import resolve_model

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
        add = (
            writer.add_string
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
        assert (read.shape, read.dtype) == (value.shape, np.float32)
        error = np.abs(read - value).max() / np.abs(value).max()
        assert error < {"F32": 1e-9, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02}.get(kind, 0.2), name


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_read_as_the_gguf_package_reads_them(tmp_path: Path, kind: str) -> None:
    """The package cannot write them, so the blocks are random bytes with sane scales."""
    quantised = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[quantised]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (VOCABULARY, block_bytes), dtype=np.uint8)
    scale = np.array([0.01], np.float16).view(np.uint8)
    at = (0, 2) if kind == "Q4_K" else (block_bytes - 2,)
    for i in at:
        data[:, i : i + 2] = scale
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=quantised)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    read = GGUFFile(tmp_path / "m.gguf").array("model.embed_tokens.weight")
    assert read.shape == (VOCABULARY, per_block)
    assert np.array_equal(read, gguf.quants.dequantize(data, quantised))
    assert np.isfinite(read).all()


def test_the_geometry_is_read_from_the_metadata(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", **{"rope.freq_base": 5000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0})
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
    ],
)
def test_metadata_we_cannot_serve_is_named(tmp_path: Path, metadata: dict[str, Any], words: str) -> None:
    write(tmp_path / "m.gguf", **metadata)
    with pytest.raises(ModelLoadError, match=words):
        resolve_model(str(tmp_path / "m.gguf"))


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
