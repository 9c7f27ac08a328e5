"""Damaged model files: whatever is changed in them, they are read, or refused in one sentence.

NEXUSENGINE_FUZZ: how many mutants of each file; the long form has 3,000.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexusengine.errors import ModelLoadError
from nexusengine.loading.config_json import read_config
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.resolve import resolve_model
from nexusengine.loading.safetensors_file import INDEX, check_header, find_shards
from tests.support import gguf_models

MUTANTS = int(os.environ.get("NEXUSENGINE_FUZZ", "300"))
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32},
    "sliding_window": 64,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "eos_token_id": [2, 3],
    "bos_token_id": 1,
    "tie_word_embeddings": True,
    "attention_multiplier": 1.0,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"weights": {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [128, 128]}}
        },
    },
    "torch_dtype": "bfloat16",
}
ENTRIES = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}
WEIGHT_MAP = {"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 1.5, 1e308, float("nan"),
    float("inf"), "", "x", "x" * 3_000, "\ud800", "\0", "../a", [], [[]], [None], [1, 2], {}, {"a": {}}, {"type": []},
    "yarn", "default", [0] * 9,
)  # fmt: skip


def changed(value: Any, rng: random.Random) -> Any:
    """The same JSON with one thing in it replaced, taken away, added or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.12:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.08:
            return value | {rng.choice(["x", "", "rope_parameters", "head_dim", "logits_scaling"]): rng.choice(ODD)}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return [*value[:i], changed(value[i], rng), *value[i + 1 :]]
    if rng.random() < 0.05:
        for _ in range(300):
            value = [value]
        return value
    return rng.choice(ODD)


def text(value: Any, rng: random.Random) -> bytes:
    """A mutant: changed as JSON, then perhaps as bytes."""
    for _ in range(rng.randint(1, 3)):
        value = changed(value, rng)
    content = bytearray(json.dumps(value).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.randrange(len(content)) if rng.random() < 0.1 else len(content)])


def refused(read: Callable[[], Any], content: bytes) -> bool:
    """Whether it was; what is raised must be ModelLoadError with one short sentence."""
    message = ""
    try:
        read()
    except ModelLoadError as error:
        message = error.message
    except Exception as error:
        raise AssertionError(content[:2_000]) from error
    assert message.isprintable()
    assert len(message) < 800
    return message != ""


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_configuration(tmp_path: Path, name: str) -> None:
    rng, count = random.Random(1), 0
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for _ in range(MUTANTS):
        content = text(CONFIG, rng)
        (tmp_path / name).write_bytes(content)
        count += refused(lambda: read_config(tmp_path), content)
    assert MUTANTS > count > MUTANTS // 20


def test_a_damaged_index(tmp_path: Path) -> None:
    rng, count = random.Random(2), 0
    for name in ("1.safetensors", "2.safetensors"):
        (tmp_path / name).touch()
    for _ in range(MUTANTS):
        content = text(WEIGHT_MAP, rng)
        (tmp_path / INDEX).write_bytes(content)
        count += refused(lambda: find_shards(tmp_path), content)
    assert MUTANTS > count > MUTANTS // 20


def test_a_damaged_header_of_tensors(tmp_path: Path) -> None:
    rng, count = random.Random(3), 0
    path = tmp_path / "m.safetensors"
    for _ in range(MUTANTS):
        header = text(ENTRIES, rng)
        length = len(header) if rng.random() < 0.9 else rng.choice([0, 7, 2**40, 2**64 - 1])
        content = length.to_bytes(8, "little") + header + bytes(rng.choice([24, 24, 24, 0, 25]))
        path.write_bytes(content)
        count += refused(lambda: check_header(path), content)
    assert MUTANTS > count > MUTANTS // 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_gguf_header(tmp_path: Path) -> None:
    rng, count = random.Random(4), 0
    gguf_models.write(tmp_path / "whole.gguf", kind="Q8_0", **gguf_models.ROPE["factors and yarn"])
    content = (tmp_path / "whole.gguf").read_bytes()
    header = min(tensor.offset for tensor in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    path = tmp_path / "m.gguf"

    def read() -> None:
        resolve_model(str(path))
        file = GGUFFile(path)
        for name in list(file.tensors)[:3]:
            file.array(name)

    for _ in range(MUTANTS):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(header)
            if rng.random() < 0.3:
                damaged[at : at + 8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little")
            else:
                damaged[at] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(damaged)) if rng.random() < 0.1 else len(damaged)])
        with np.errstate(all="ignore"):
            count += refused(read, bytes(damaged[:header]))
    assert MUTANTS > count > MUTANTS // 20
