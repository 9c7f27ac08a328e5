"""Text of an engine over a byte-fallback vocabulary: whole, streamed and transformers' own are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from nexusengine import Engine, SamplingParams
from tests.support import checkpoints
from tests.support.vocabularies import byte_level, sentencepiece

PROMPTS: list[str | list[int]] = ["a c", "the 🦙 w", "a\n", "w", [1, 20, 260], [1]]


@pytest.fixture(scope="module", params=[sentencepiece, byte_level])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights; its embedding is padded by three rows."""
    folder, backend = tmp_path_factory.mktemp("model"), request.param()
    size = backend.get_vocab_size() + 3
    tensors = checkpoints.plain()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (torch.randn(size, 256) / 8).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = checkpoints.CONFIG | {"vocab_size": size, "eos_token_id": backend.token_to_id("</s>")}
    (folder / "config.json").write_text(json.dumps(config))
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_text_is_transformers_text_of_prompt_and_output_less_the_prompts(model: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), clean_up_tokenization_spaces=False
    )

    def text_of(*ids: int) -> str:
        text = theirs.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    prompts = [prompt for prompt in PROMPTS for _ in range(5)]
    sampling = [SamplingParams(temperature=2.0, seed=n, max_tokens=30, ignore_eos=True) for n in range(len(prompts))]
    compared = 0
    with Engine(str(model), devices="cpu", kv_cache_memory="16MiB") as engine:
        outputs = engine.generate(prompts, sampling, progress=False)
        for output in outputs:
            before = text_of(*output.prompt_token_ids)
            both = text_of(*output.prompt_token_ids, *output.token_ids)
            if both.startswith(before):  # else the output makes invalid bytes of a character at the prompt's end
                compared += 1
                assert output.text == both[len(before) :]
            assert len(output.text_offsets) == len(output.token_ids)
        streamed = [""] * len(prompts)
        offsets: list[tuple[int, ...]] = [()] * len(prompts)
        for news in engine.generate(prompts, sampling, stream=True):
            streamed[news.metadata["index"]] += news.text
            offsets[news.metadata["index"]] += news.text_offsets
    assert streamed == [output.text for output in outputs]
    assert offsets == [output.text_offsets for output in outputs]
    assert compared > len(prompts) // 2
