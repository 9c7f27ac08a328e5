"""How much KV cache a device gets, and what is said when it cannot be."""

from __future__ import annotations

import ctypes

import pytest

from nexusengine.errors import ConfigError
from nexusengine.execute import memory
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.memory import (
    cpu_kv_bytes,
    give_back_freed,
    largest_step,
    ready_blocks,
    resident_bytes,
    size_kv,
    wanted_length,
)
from nexusengine.model_config import ModelConfig

CONFIG = ModelConfig("LlamaForCausalLM", 100, 32, 64, 2, 4, 2, 8, 128, 1e-6, 10_000.0)
BLOCK_BYTES = 16 * 2 * 2 * 2 * 8 * 4  # tokens, K and V, layers, KV heads, head size, float32


def test_kv_memory_is_divided_into_blocks_one_of_them_null() -> None:
    assert size_kv(CONFIG, ExecutorOptions(), 10 * BLOCK_BYTES + 5, 16, 4) == (10, 128)


def test_there_are_no_more_blocks_than_the_running_sequences_can_fill() -> None:
    options = ExecutorOptions(max_running=3, max_model_len=33)
    assert size_kv(CONFIG, options, 2**30, 16, 4) == (3 * 3 + 1, 33)


def test_sequences_are_as_long_as_the_kv_cache_unless_a_length_is_asked_for() -> None:
    assert size_kv(CONFIG, ExecutorOptions(), 3 * BLOCK_BYTES, 16, 4) == (3, 32)
    with pytest.raises(ConfigError, match=rf"max_model_len 33 needs {4 * BLOCK_BYTES} bytes.*{3 * BLOCK_BYTES}"):
        size_kv(CONFIG, ExecutorOptions(max_model_len=33), 3 * BLOCK_BYTES, 16, 4)


def test_a_cache_of_less_than_two_blocks_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=f"{2 * BLOCK_BYTES - 1} bytes holds no block of 16 tokens.*{BLOCK_BYTES}"):
        size_kv(CONFIG, ExecutorOptions(), 2 * BLOCK_BYTES - 1, 16, 4)


def test_a_length_beyond_the_models_positions_is_an_error() -> None:
    assert wanted_length(CONFIG, ExecutorOptions(max_model_len=128)) == 128
    with pytest.raises(ConfigError, match=r"max_model_len 129 .* 128 positions"):
        wanted_length(CONFIG, ExecutorOptions(max_model_len=129))


@pytest.mark.parametrize(("available", "expected"), [(5 * 2**30, 2 * 2**30), (100 * 2**30, 4 * 2**30)])
def test_a_cpu_gives_the_kv_cache_a_share_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, available: int, expected: int
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    assert cpu_kv_bytes() == expected


@pytest.mark.parametrize(("running", "tokens", "longest"), [(4, 64, 128), (64, 16, 128), (1, 512, 128), (1, 16, 16)])
def test_the_largest_step_has_all_rows_all_tokens_and_the_longest_context(
    running: int, tokens: int, longest: int
) -> None:
    batch = largest_step(ExecutorOptions(max_running=running, max_batch_tokens=tokens), longest, 16)
    assert len(batch.slots) == min(running, tokens)
    assert len(batch.token_ids) == batch.counts.sum() == min(tokens, len(batch.slots) - 1 + longest)
    assert (batch.starts + batch.counts).max() == longest
    assert batch.block_tables.shape == (len(batch.slots), -(-longest // 16))
    assert batch.sampled.all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_was_freed_between_things_that_are_kept_goes_back_to_the_system() -> None:
    blocks = [bytearray(64 * 1024) for _ in range(2000)]
    kept = blocks[::50]
    del blocks
    before = resident_bytes()
    give_back_freed()
    assert resident_bytes() <= before - 64 * 2**20
    assert len(kept) == 40


def test_a_part_of_a_kv_cache_on_a_cpu_has_memory_from_the_start() -> None:
    assert ready_blocks(10, 2**20) == 10
    assert ready_blocks(1000, 2**20) == 256
