"""Logits within 1e-3 of transformers' for tiny random models of every shape the family has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from nexusengine.config import parse_device  # noqa: E402
from nexusengine.errors import ModelLoadError  # noqa: E402
from nexusengine.execute.base import ExecutorOptions  # noqa: E402
from nexusengine.execute.batch import StepBatch  # noqa: E402
from nexusengine.execute.torch_executor import TorchExecutor  # noqa: E402
from nexusengine.loading.resolve import resolve_model  # noqa: E402
from nexusengine.sampling.table import SamplingTable  # noqa: E402

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one KV head": {"num_key_value_heads": 1},
    "as many KV heads as heads": {"num_key_value_heads": 8},
    "heads wider than the model": {"head_dim": 24},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope llama3": {"rope_scaling": LLAMA3},
    "rope yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
}


def save(folder: Path, shard_size: str = "1GB", architecture: str = "Llama", **changes: Any) -> Any:
    """A random model on disk, and itself."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{architecture}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers makes them zero
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


class Probe(TorchExecutor):
    """Keeps the logits of every sampled row: copies, since their memory is the next step's too."""

    def logits_of(self, batch: StepBatch) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        compute = self._model.logits

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            kept.append(compute(hidden).clone())
            return kept[-1]

        self._model.logits = keep  # type: ignore[method-assign]
        self.submit(batch)
        self.collect()
        self._model.logits = compute  # type: ignore[method-assign]
        return kept[0]


def ours(folder: Path, prompts: list[list[int]], chunk: int) -> torch.Tensor:
    """Last-token logits of each prompt, computed together in chunks, over a shuffled block table."""
    executor = Probe.create(
        resolve_model(str(folder)),
        parse_device("cpu"),
        ExecutorOptions(kv_cache_bytes=16 * 2**20, max_model_len=256, block_size=8),
        lambda phase, fraction: None,
    )
    assert isinstance(executor, Probe)
    assert executor.kv is not None
    executor.kv.fill_(torch.nan)
    rng = np.random.default_rng(5)
    blocks = rng.permutation(np.arange(1, executor.spec.num_blocks))[: 32 * len(prompts)]
    tables = blocks.reshape(len(prompts), 32).astype(np.int32)
    sampling, done = SamplingTable.empty(len(prompts)), np.zeros(len(prompts), np.int32)
    lengths = np.array([len(p) for p in prompts], np.int32)
    logits: dict[int, torch.Tensor] = {}
    while (done < lengths).any():
        counts = np.minimum(lengths - done, chunk)
        rows = np.nonzero(counts)[0].astype(np.int32)
        rows = rows[np.argsort(counts[rows] > 1, kind="stable")]
        ids = np.concatenate([prompts[r][done[r] : done[r] + counts[r]] for r in rows]).astype(np.int32)
        sampled = done[rows] + counts[rows] == lengths[rows]
        batch = StepBatch(rows, done[rows], counts[rows], sampled, ids, tables, sampling)
        if sampled.any():
            logits |= dict(zip(rows[sampled].tolist(), executor.logits_of(batch), strict=True))
        else:
            executor.submit(batch)
            executor.collect()
        done[rows] += counts[rows]
    return torch.stack([logits[r] for r in range(len(prompts))])


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 131, n).tolist() for n in (1, 7, 8, 9, 31, 100, 200)]


@pytest.mark.parametrize("chunk", [1_000, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(tmp_path: Path, shape: str, chunk: int) -> None:
    model = save(tmp_path, **SHAPES[shape])
    with torch.inference_mode():
        theirs = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts()])
        logits = ours(tmp_path, prompts(), chunk)
    assert theirs.std() > 0.05, "the model says something"
    assert (logits - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2"])
def test_the_relatives_of_llama_give_transformers_logits_too(tmp_path: Path, architecture: str) -> None:
    extra: dict[str, Any] = {"sliding_window": None} if architecture == "Mistral" else {}
    model = save(tmp_path, architecture=architecture, **extra)
    with torch.inference_mode():
        theirs = torch.stack([model(torch.tensor([p])).logits[0, -1] for p in prompts()])
        assert (ours(tmp_path, prompts(), 50) - theirs).abs().max() < 1e-3


def test_a_sharded_checkpoint_is_read_like_a_single_one(tmp_path: Path) -> None:
    save(tmp_path / "one")
    save(tmp_path / "many", shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    with torch.inference_mode():
        assert torch.equal(ours(tmp_path / "one", prompts(), 50), ours(tmp_path / "many", prompts(), 50))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("surplus", "model.layers.7.extra"),
        ("shape", r"model.norm.weight has the shape \[63\].*\[64\]"),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(tmp_path: Path, change: str, words: str) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif change == "surplus":
        tensors["model.layers.7.extra"] = torch.zeros(3)
    else:
        tensors["model.norm.weight"] = torch.zeros(63)
    save_file(tensors, file)
    with pytest.raises(ModelLoadError, match=words) as caught:
        ours(tmp_path, prompts(), 50)
    assert str(tmp_path) in caught.value.message
