"""The reference: transformers reading the same GGUF by itself, fp32, one prompt at a time."""

from __future__ import annotations

import os
import pydoc_data.topics
import random
from dataclasses import dataclass
from typing import Any

import pytest

FULL = os.environ.get("NEXUSENGINE_GOLDEN") == "full"
OUTPUT_TOKENS = 32 if FULL else 8


@dataclass(frozen=True)
class Reference:
    """prompts and what transformers answers greedily, as token ids."""

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]


def prompt_lengths() -> list[int]:
    """32 lengths from 5 to 1,500 tokens; the short form has few long ones."""
    if FULL:
        return [round(5 * 300 ** (i / 31)) for i in range(32)]
    return [5 + 3 * i for i in range(27)] + [128, 256, 400, 700, 1500]


@pytest.fixture(scope="session")
def reference() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from nexusengine.loading.resolve import resolve_model
    from nexusengine.tokenize import load_tokenizer

    files = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(files)
    topics = pydoc_data.topics.topics
    rng = random.Random(7)
    text = "\n".join(topics[name] for name in rng.sample(sorted(topics), 40))
    ids = tokenizer.encode(text)
    prompts = []
    for length in prompt_lengths():
        start = rng.randrange(len(ids) - length)
        prompts.append(ids[start : start + length])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        files.path.parent, gguf_file=files.path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=OUTPUT_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            answers.append(out[0, len(prompt) :].tolist())
    del model
    return Reference(prompts, answers, [tokenizer.decode(a, skip_special_tokens=True) for a in answers])
