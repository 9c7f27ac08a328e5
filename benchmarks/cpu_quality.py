"""What each way of storing weights costs in quality, on the default model and a text in the public domain.

For every kind of --quantization: the perplexity of data/texts.txt in windows of 256 tokens, how often its most likely
token is the float model's, the mean divergence KL(float || it) in nats a token, and how many greedy tokens of 16
continuations agree with the float model's before the first that does not.

    python benchmarks/cpu_quality.py [--model M] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nexusengine.config import parse_device
from nexusengine.execute.base import ExecutorOptions
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.loading.resolve import ModelFiles, resolve_model
from nexusengine.sampling.table import SamplingTable
from nexusengine.tokenize import load_tokenizer
from nexusengine.types import SamplingParams

TEXTS = Path(__file__).parent / "data" / "texts.txt"
KINDS = ("none", "bf16", "int8", "int4")
WINDOW, CONTINUATIONS, PROMPT, LENGTH = 256, 16, 64, 32


@dataclass(frozen=True)
class Quality:
    """weights_mb: packed. agreement: share of positions. common_tokens: mean, of LENGTH."""

    quantization: str
    weights_mb: float
    perplexity: float
    agreement: float
    divergence: float
    common_tokens: float


class Scorer:
    """One executor, used for the logits of whole windows and for greedy continuations."""

    def __init__(self, files: ModelFiles, quantization: str) -> None:
        options: dict[str, Any] = {"quantization": quantization, "kv_cache_bytes": 2**29, "max_model_len": WINDOW}
        options["max_running"] = CONTINUATIONS
        self._executor = TorchExecutor.create(files, parse_device("cpu"), ExecutorOptions(**options), lambda p, f: None)
        self.weights_mb = self._executor.spec.weights_bytes / 1e6
        width = WINDOW // self._executor.spec.block_size
        self._tables = np.arange(1, CONTINUATIONS * width + 1, dtype=np.int32).reshape(CONTINUATIONS, width)
        self._sampling = SamplingTable.empty(CONTINUATIONS)
        for slot in range(CONTINUATIONS):
            self._sampling.set(slot, SamplingParams(temperature=0.0, seed=0))

    def _batch(self, starts: list[int], tokens: list[list[int]]) -> StepBatch:
        counts = np.array([len(t) for t in tokens], np.int32)
        slots, flags = np.arange(len(tokens), dtype=np.int32), np.ones(len(tokens), np.bool_)
        ids = np.concatenate(tokens).astype(np.int32)
        return StepBatch(slots, np.array(starts, np.int32), counts, flags, ids, self._tables, self._sampling)

    def _step(self, starts: list[int], tokens: list[list[int]]) -> np.ndarray:
        self._executor.submit(self._batch(starts, tokens))
        return self._executor.collect().token_ids

    @torch.inference_mode()
    def log_probabilities(self, window: list[int]) -> torch.Tensor:
        """float32 `[len(window), V]`: at each position, of the token that follows."""
        executor = self._executor
        kv = executor.kv
        assert kv is not None
        inputs = executor._inputs(self._batch([0], [window]), np.arange(1))
        everywhere = dataclasses.replace(inputs, last=torch.arange(len(window)))
        return executor._model.logits(executor._hidden(everywhere, kv)).log_softmax(-1)

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        token = self._step([0] * len(prompts), prompts)
        answers = [[int(t)] for t in token]
        for n in range(LENGTH - 1):
            token = self._step([len(p) + n for p in prompts], [[a[-1]] for a in answers])
            for answer, t in zip(answers, token, strict=True):
                answer.append(int(t))
        return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    files = resolve_model(given.model)
    ids = load_tokenizer(files).encode(TEXTS.read_text())
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    spread = (len(ids) - PROMPT) // CONTINUATIONS
    prompts = [ids[i * spread : i * spread + PROMPT] for i in range(CONTINUATIONS)]
    exact: list[torch.Tensor] = []
    exact_answers: list[list[int]] = []
    found: list[Quality] = []
    print(f"{len(ids)} tokens in {len(windows)} windows of {WINDOW}\n")
    print("| weights | MB | perplexity | same most likely token | KL, nats | greedy tokens in common |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        scorer = Scorer(files, kind)
        loss, same, divergence = [], [], []
        for n, window in enumerate(windows):
            mine = scorer.log_probabilities(window)[:-1]
            if kind == "none":
                exact.append(mine)
            loss.append(-mine.gather(1, torch.tensor(window[1:]).unsqueeze(1)).mean())
            same.append((mine.argmax(-1) == exact[n].argmax(-1)).float().mean())
            divergence.append((exact[n].exp() * (exact[n] - mine)).sum(-1).mean())
        answers = scorer.greedy(prompts)
        exact_answers = exact_answers or answers
        common = [
            next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), LENGTH)
            for mine, theirs in zip(answers, exact_answers, strict=True)
        ]
        quality = Quality(
            kind,
            scorer.weights_mb,
            math.exp(float(torch.stack(loss).mean())),
            float(torch.stack(same).mean()),
            float(torch.stack(divergence).mean()),
            float(np.mean(common)),
        )
        found.append(quality)
        print(
            f"| {kind} | {quality.weights_mb:.0f} | {quality.perplexity:.2f} | {quality.agreement:.1%} "
            f"| {quality.divergence:.4f} | {quality.common_tokens:.1f} of {LENGTH} |",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(quality) for quality in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
