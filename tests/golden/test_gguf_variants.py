"""GGUF metadata in every variant of its rotary keys: the logits that llama.cpp computes from the same file.

tests/data/llama_cpp_logits.json holds the last token's logits of `gguf_models.PROMPT` by architecture and variant, of
llama.cpp (llama-cpp-python 0.3.36, float32 weights and KV cache, one thread, no flash attention), to four decimals.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nexusengine.loading.gguf_file import GGUFFile
from tests.golden.test_logits import ours
from tests.support import gguf_models

EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "llama_cpp_logits.json").read_text())


@pytest.mark.parametrize("variant", EXPECTED)
def test_a_variant_gives_llama_cpps_logits(tmp_path: Path, variant: str) -> None:
    architecture, name = variant.split("|")
    path = gguf_models.write(tmp_path / "m.gguf", architecture, **gguf_models.ROPE[name])
    with torch.inference_mode():
        found = ours(path, [gguf_models.PROMPT], 50)[0].numpy()
    expected = np.array(EXPECTED[variant])
    assert expected.std() > 1
    assert found.argmax() == expected.argmax()
    assert np.abs(found - expected).max() < 2e-4


def test_a_split_file_gives_the_logits_of_a_whole_one_whichever_part_is_named(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "m.gguf", split=5)
    parts = sorted(tmp_path.glob("m-*-of-*.gguf"))
    assert len(parts) > 3
    for named in (parts[0], parts[2], tmp_path):
        with torch.inference_mode():
            found = ours(named, [gguf_models.PROMPT], 1000)[0].numpy()
        assert np.abs(found - np.array(EXPECTED["llama|plain"])).max() < 2e-4
    assert GGUFFile(parts[1]).paths == tuple(parts)
