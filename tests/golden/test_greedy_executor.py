"""The embedded model straight through the executor: greedy tokens equal transformers', with no engine in between."""

from __future__ import annotations

import numpy as np
import pytest

from nexusengine.config import parse_device
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.factory import make_executor
from nexusengine.sampling.table import SamplingTable
from nexusengine.types import SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
TOKENS, CHUNK = 24, 48
TEXTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, " * 20, "1, 2, 3, 4,"]


def test_greedy_tokens_equal_transformers_in_chunks_and_one_mixed_batch() -> None:
    """Prompts of very different lengths start together in chunks, so that most steps mix decodes and prefill; the
    tokens come back through -1, as they do when steps overlap."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from nexusengine.loading.resolve import resolve_model
    from nexusengine.tokenize import load_tokenizer

    files = resolve_model("smollm2-135m")
    tokenizer = load_tokenizer(files)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        files.path.parent, gguf_file=files.path.name, dtype=torch.float32
    ).eval()
    reference.generation_config.eos_token_id = None
    with torch.inference_mode():
        expected = [
            reference.generate(torch.tensor([p]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, len(p) :]
            for p in prompts
        ]
    del reference

    options = ExecutorOptions(kv_cache_bytes=128 * 2**20, max_model_len=512, max_running=len(prompts))
    executor = make_executor(files, parse_device("cpu"), options)
    count, per_slot = len(prompts), 512 // executor.spec.block_size
    blocks = np.random.default_rng(0).permutation(np.arange(1, executor.spec.num_blocks))[: count * per_slot]
    sampling = SamplingTable.empty(count)
    for slot in range(count):
        sampling.set(slot, SamplingParams(temperature=0.0, seed=0))
    lengths = np.array([len(p) for p in prompts], np.int32)
    done = np.zeros(count, np.int32)
    answers: list[list[int]] = [[] for _ in prompts]
    while min(map(len, answers)) < TOKENS:
        left = np.where(done < lengths, np.minimum(lengths - done, CHUNK), 1).astype(np.int32)
        left[[len(answer) == TOKENS for answer in answers]] = 0
        rows = np.nonzero(left)[0].astype(np.int32)
        rows = rows[np.argsort(left[rows] > 1, kind="stable")]
        ids = [prompts[r][done[r] : done[r] + left[r]] if done[r] < lengths[r] else [-1] for r in rows]
        sampled = done[rows] + left[rows] >= lengths[rows]
        executor.submit(
            StepBatch(
                rows,
                done[rows],
                left[rows],
                sampled,
                np.concatenate(ids).astype(np.int32),
                blocks.reshape(count, per_slot).astype(np.int32),
                sampling,
            )
        )
        for row, token in zip(rows[sampled], executor.collect().token_ids, strict=True):
            answers[row].append(int(token))
        done[rows] += left[rows]
    executor.close()
    assert answers == [e.tolist() for e in expected]
