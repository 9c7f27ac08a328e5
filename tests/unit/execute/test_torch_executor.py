"""The torch executor on the CPU, with random weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from nexusengine import native
from nexusengine.config import parse_device
from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.execute import load, memory
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch, StepResult
from nexusengine.execute.memory import largest_step
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.model_config import ModelConfig
from nexusengine.sampling.table import SamplingTable
from nexusengine.types import SamplingParams

CONFIG = ModelConfig("LlamaForCausalLM", 89, 32, 48, 2, 4, 2, 8, 128, 1e-6, 10_000.0)
OPTIONS = ExecutorOptions(kv_cache_bytes=2**20, max_running=8, max_batch_tokens=64, seed=1)
SLOTS = 8


def made(config: ModelConfig = CONFIG, options: ExecutorOptions = OPTIONS, device: str = "cpu") -> TorchExecutor:
    return TorchExecutor.build(config, None, parse_device(device), options, lambda phase, fraction: None)


def poison(executor: TorchExecutor, blocks: int | slice) -> None:
    with torch.inference_mode():
        assert executor.kv is not None
        executor.kv[:, :, blocks] = torch.nan


class Steps:
    """Runs steps for slots that own their blocks. Every block a slot does not own is full of NaN."""

    def __init__(self, executor: TorchExecutor, **sampling: float) -> None:
        self.executor = executor
        poison(executor, slice(None))
        per_slot = -(-CONFIG.max_position // executor.spec.block_size)
        self.tables = np.arange(1, SLOTS * per_slot + 1, dtype=np.int32).reshape(SLOTS, per_slot)
        self.sampling = SamplingTable.empty(SLOTS)
        for slot in range(SLOTS):
            self.sampling.set(slot, SamplingParams(**({"temperature": 0.0, "seed": slot} | sampling)))  # type: ignore[arg-type]
        self.done = np.zeros(SLOTS, np.int32)
        self.releases = np.zeros(SLOTS, np.int64)

    def submit(self, work: dict[int, list[int]], sampled: bool = True) -> None:
        slots = np.array(sorted(work, key=lambda s: len(work[s]) > 1), np.int32)
        counts = np.array([len(work[s]) for s in slots], np.int32)
        ids = np.concatenate([work[s] for s in slots]).astype(np.int32)
        flags = np.full(len(slots), sampled)
        starts = self.done[slots]
        self.executor.submit(StepBatch(slots, starts, counts, flags, ids, self.tables, self.sampling, self.releases))
        self.done[slots] += counts

    def step(self, work: dict[int, list[int]], sampled: bool = True) -> StepResult:
        self.submit(work, sampled)
        return self.executor.collect()


def continued(steps: Steps, slot: int, prompt: list[int], count: int) -> list[int]:
    tokens = [int(steps.step({slot: prompt}).token_ids[0])]
    while len(tokens) < count:
        tokens.append(int(steps.step({slot: tokens[-1:]}).token_ids[0]))
    return tokens


def test_minus_one_stands_for_the_token_the_slot_sampled_last() -> None:
    prompts = {2: [5, 6, 7], 5: [1, 2, 3, 4]}
    told, untold = Steps(made(), temperature=1.0), Steps(made(), temperature=1.0)
    first = told.step(prompts).token_ids
    second = told.step({2: [first[0]], 5: [first[1]]}).token_ids
    assert untold.step(prompts).token_ids.tolist() == first.tolist()
    assert untold.step({2: [-1], 5: [-1]}).token_ids.tolist() == second.tolist()
    assert first[0] != first[1], "else a mix-up of the slots would not show"


def test_a_slot_remembers_its_token_over_steps_of_others() -> None:
    steps, other = Steps(made(), temperature=1.0), Steps(made(), temperature=1.0)
    first = steps.step({3: [9, 8]}).token_ids[0]
    other.step({3: [9, 8]})
    other.step({0: [4, 4, 4]})
    assert other.step({3: [-1]}).token_ids.tolist() == steps.step({3: [first]}).token_ids.tolist()


def test_a_row_with_poisoned_kv_fails_alone_and_does_no_harm_when_continued() -> None:
    steps, clean = Steps(made()), Steps(made())
    for s in (steps, clean):
        s.step({0: [1, 2, 3], 1: [4, 5, 6, 7]})
    poison(steps.executor, int(steps.tables[1, 0]))
    expected = clean.step({0: [-1], 1: [-1]}).token_ids
    assert steps.step({0: [-1], 1: [-1]}).token_ids.tolist() == [expected[0], -1]
    expected = clean.step({0: [-1], 1: [-1]}).token_ids
    assert steps.step({0: [-1], 1: [-1]}).token_ids.tolist() == [expected[0], -1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_the_batch_or_on_chunks(temperature: float) -> None:
    prompt = list(range(1, 41))
    expected = continued(Steps(made(), temperature=temperature), 4, prompt, 6)
    steps = Steps(made(), temperature=temperature)
    steps.step({4: prompt[:7], 1: [3] * 20}, sampled=False)
    steps.step({1: [2], 4: prompt[7:33], 6: [8, 8]}, sampled=False)
    rows = steps.step({1: [2], 4: prompt[33:]}).token_ids
    tokens = [int(rows[1])]
    while len(tokens) < 6:
        tokens.append(int(steps.step({1: [5], 4: [-1], 6: [7]}).token_ids[1]))
    assert tokens == expected


@pytest.mark.parametrize("block_size", [1, 3, 16, 24, 100])
def test_any_block_size_gives_the_same_tokens(block_size: int) -> None:
    options = dataclasses.replace(OPTIONS, block_size=block_size)
    assert continued(Steps(made(options=options)), 7, [1, 2, 3, 4, 5], 30) == continued(
        Steps(made()), 7, [1, 2, 3, 4, 5], 30
    )


def test_rows_that_are_not_sampled_have_no_token() -> None:
    steps = Steps(made())
    result = steps.step({0: [1, 2], 1: [3]}, sampled=False)
    assert len(result.token_ids) == 0
    assert result.logprobs is None
    assert result.device_s > 0


def test_logprobs_come_with_the_rows_that_asked() -> None:
    steps = Steps(made(), logprobs=3)
    result = steps.step({0: [1, 2], 1: [3]})
    assert result.logprobs is not None
    assert result.logprobs.top_ids.shape == result.logprobs.top.shape == (2, 3)
    assert result.logprobs.top_ids[:, 0].tolist() == result.token_ids.tolist()
    assert np.allclose(result.logprobs.top[:, 0], result.logprobs.chosen)
    assert (result.logprobs.chosen > -math.log(CONFIG.vocab_size)).all()


def test_random_weights_depend_on_the_seed_only() -> None:
    def tokens(seed: int) -> list[int]:
        return continued(Steps(made(options=dataclasses.replace(OPTIONS, seed=seed))), 0, [1, 2, 3], 20)

    assert tokens(1) == tokens(1) != tokens(2)


def test_steps_are_submitted_and_collected_in_turn() -> None:
    steps = Steps(made())
    with pytest.raises(RuntimeError, match="no step is in flight"):
        steps.executor.collect()
    steps.submit({0: [1]})
    with pytest.raises(RuntimeError, match="collect it first"):
        steps.submit({1: [1]})
    steps.executor.close()
    steps.executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        steps.submit({0: [1]})


def test_the_spec_says_what_was_made() -> None:
    spec = made(options=dataclasses.replace(OPTIONS, max_model_len=100)).spec
    assert (spec.device, spec.dtype, spec.block_size) == ("cpu", "float32", 16)
    assert spec.attention_backend == ("cpu" if native.probe()[0] else "sdpa")
    assert (spec.max_model_len, spec.num_blocks, spec.vocab_size) == (100, 8 * 7 + 1, 89)
    assert spec.kv_bytes == spec.num_blocks * 16 * 2 * 2 * 2 * 8 * 4
    exact = 4 * (CONFIG.num_parameters + CONFIG.hidden_size * (2 * CONFIG.num_layers + 1))
    padding = 2 * 4 * CONFIG.hidden_size * 15 if native.probe()[0] else 0  # embedding and head in panels of 16 rows
    assert exact <= spec.weights_bytes <= exact + padding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_step_runs_in_a_cache_of_two_blocks(dtype: str) -> None:
    options = dataclasses.replace(OPTIONS, dtype=dtype, kv_cache_bytes=2 * 16 * 2 * 2 * 2 * 8 * 4)
    executor = made(options=options)
    executor.submit(largest_step(OPTIONS, CONFIG.max_position, 16))
    assert len(executor.collect().token_ids) == OPTIONS.max_running


def test_cpu_with_a_number_runs_on_so_many_threads() -> None:
    before = torch.get_num_threads()
    try:
        made(device="cpu:1")
        assert torch.get_num_threads() == 1
        made(device="cpu:2")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_cpu_without_a_number_takes_no_more_threads_than_its_container_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(load, "usable_cpus", lambda: 2)
    try:
        torch.set_num_threads(4)
        made(device="cpu")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        made(device="cpu")
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        made(device="cpu")
        assert torch.get_num_threads() == 3, "the user said how many"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_model_len": 129}, r"129 .*128 positions"),
        ({"kv_cache_bytes": 100}, "100 bytes holds no block"),
        ({"attention_backend": "warp"}, "warp"),
        ({"block_size": 1025}, "1025"),
    ],
)
def test_a_setting_that_cannot_be_met_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(options=dataclasses.replace(OPTIONS, **changes))


def test_a_kv_cache_larger_than_free_memory_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 5000)
    with pytest.raises(ConfigError, match=r"KV cache of \d+ bytes.*only 5000 bytes are free on cpu"):
        made()


def test_an_unknown_architecture_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ModelLoadError, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM.*MistralForCausalLM"):
        made(dataclasses.replace(CONFIG, architecture="GPT2LMHeadModel"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cuda:0.*no CUDA device"):
        made(device="cuda:0")
