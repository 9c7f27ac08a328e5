"""Phases that set the engine beside transformers: the same text, the same logits, and which serves more tokens."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch

from gpu_phases.common import SMALL, TINY, Cases, Findings, Setting, Skip, make_executor, prompts_for, serve
from nexusengine.execute.batch import StepBatch
from nexusengine.execute.torch_executor import TorchExecutor
from nexusengine.model_config import ModelConfig
from nexusengine.sampling.table import SamplingTable

MIDDLE = dataclasses.replace(SMALL, num_layers=8, rope_theta=10_000.0)  # theta: transformers' own default
_KL_LIMITS = {torch.bfloat16: 1e-3, torch.float32: 1e-6}
_SEED = 1
_PAGED = ("flash_attention_2", "sdpa", "sdpa_paged", "paged|sdpa")  # names of one thing, by version


def reference(at: Setting) -> Findings:
    """Greedy text of the engine in float32 is transformers'."""
    cases = Cases(at)
    for name, c in _shapes(at).items():
        cases.run(name, lambda c=c: _same_text(at, c))  # type: ignore[misc]
    return cases.end()


def _same_text(at: Setting, c: ModelConfig) -> Findings:
    theirs = _theirs(at, c, torch.float32)
    executor = make_executor(at, c, "float32", seed=_SEED)
    prompts = prompts_for(c, 3, 30)
    answers, _, _ = serve(executor, prompts, 12)
    executor.close()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device=at.device)
        expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        if answer != expected:
            raise AssertionError(f"greedy text is {answer}, transformers says {expected}")
    return {"prompts": len(prompts), "tokens_each": 12}


def logits(at: Setting) -> Findings:
    """Logits of every token of some prompts, in the dtype that serves, beside transformers' in float32.

    With the same weights: mean Kullback-Leibler divergence, and the largest difference over the spread of the logits.
    """
    cases = Cases(at)
    for name, c in _shapes(at).items():
        cases.run(name, lambda c=c: _divergence(at, c))  # type: ignore[misc]
    return cases.end()


def _divergence(at: Setting, c: ModelConfig) -> Findings:
    theirs = _theirs(at, c, at.dtype)
    executor = make_executor(at, c, str(at.dtype).removeprefix("torch."), seed=_SEED)
    prompts = prompts_for(c, 3, 60)
    ours = own_logits(executor, prompts)
    executor.close()
    expected = torch.cat([theirs(torch.tensor([p], device=at.device)).logits[0] for p in prompts]).float()
    log_theirs, log_ours = expected.log_softmax(-1), ours.log_softmax(-1)
    kl = float((log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean())
    if not kl <= _KL_LIMITS[at.dtype]:
        raise AssertionError(f"the divergence from transformers is {kl}, more than {_KL_LIMITS[at.dtype]}")
    return {"kl": kl, "largest_over_spread": float((ours - expected).abs().max() / expected.std())}


def own_logits(executor: TorchExecutor, prompts: list[list[int]]) -> torch.Tensor:
    """float32 `[T, V]` of all tokens of prompts that are computed whole, in one step."""
    size, counts = executor.spec.block_size, np.array([len(p) for p in prompts], np.int32)
    blocks = -(-counts // size)
    tables = np.zeros((len(prompts), int(blocks.max())), np.int32)
    first = 1
    for row, n in zip(tables, blocks.tolist(), strict=True):
        row[:n] = np.arange(first, first + n)
        first += n
    rows = np.arange(len(prompts))
    batch = StepBatch(
        slots=rows.astype(np.int32),
        starts=np.zeros_like(counts),
        counts=counts,
        sampled=np.ones(len(prompts), np.bool_),
        token_ids=np.concatenate([np.array(p, np.int32) for p in prompts]),
        block_tables=tables,
        sampling=SamplingTable.empty(len(prompts)),
    )
    kv = executor.kv
    assert kv is not None
    inputs = executor._inputs(batch, rows)
    everywhere = torch.arange(len(inputs.token_ids), device=inputs.token_ids.device)
    hidden = executor._hidden(dataclasses.replace(inputs, last=everywhere), kv)
    return executor._model.logits(hidden).float().clone()


def continuous_batching(at: Setting) -> Findings:
    """Output tokens a second of the engine and of transformers' continuous batching.

    The same prompts, dtype and shape, one after the other.
    """
    users, length, tokens = (4, 24, 8) if at.tiny else (256, 256, 256)
    c = TINY if at.tiny else SMALL
    theirs = _theirs(at, c, at.dtype).to(at.dtype)
    if not hasattr(theirs, "generate_batch"):
        raise Skip("this transformers has no continuous batching")
    prompts = prompts_for(c, users, length)
    executor = make_executor(
        at, c, str(at.dtype).removeprefix("torch."), max_running=users, max_batch_tokens=2048, max_model_len=512
    )
    serve(executor, prompts, 4, running=users)  # warm
    began = time.perf_counter()
    answers, _, _ = serve(executor, prompts, tokens, chunk=2048, cached=False, running=users)
    ours = sum(map(len, answers)) / (time.perf_counter() - began)
    executor.close()
    del executor
    if at.device.type == "cuda":
        torch.cuda.empty_cache()
    found: Findings = {"output_tokens_s": ours, "users": users, "tokens_in": length, "tokens_out": tokens}
    if at.late:
        return {**found, "transformers": "skipped: out of time"}
    try:
        name = _paged(theirs)
        _their_tokens(theirs, prompts[:4], 4, at)
        began = time.perf_counter()
        made = _their_tokens(theirs, prompts, tokens, at)
    except Exception as error:  # theirs, not ours: the engine's own figure stands
        return {**found, "transformers": f"it did not run: {type(error).__name__}: {error}"}
    theirs_tokens_s = made / (time.perf_counter() - began)
    return {
        **found, "transformers_tokens_s": theirs_tokens_s, "transformers_attention": name, "transformers_made": made,
        "times": ours / theirs_tokens_s, "aim": 1.5,
    }  # fmt: skip


def _shapes(at: Setting) -> dict[str, ModelConfig]:
    return {"tiny": TINY} if at.tiny else {"tiny": TINY, "8 layers of 0.6B": MIDDLE}


def _paged(theirs: Any) -> str:
    """The fastest kind of attention that their batching takes here."""
    reasons = []
    for name in _PAGED:
        try:
            theirs.set_attn_implementation(name)
            return name
        except (ImportError, ValueError) as error:
            reasons.append(f"{name}: {error}")
    raise RuntimeError("; ".join(reasons))


def _their_tokens(theirs: Any, prompts: list[list[int]], tokens: int, at: Setting) -> int:
    from transformers import GenerationConfig

    more: dict[str, Any] = {}
    if at.tiny:  # their cache takes most of the memory there is, unless it is told its size
        from transformers import ContinuousBatchingConfig

        more = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)}
    wanted = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with torch.inference_mode(False), torch.no_grad():
        outputs = theirs.generate_batch(prompts, generation_config=wanted, **more)
    failed = [str(o.error) for o in outputs.values() if o.error]
    if failed:
        raise RuntimeError(failed[0])
    return sum(len(o.generated_tokens) for o in outputs.values())


def _theirs(at: Setting, c: ModelConfig, dtype: torch.dtype) -> Any:
    """transformers' model in float32, with the weights that the seed gives ours rounded to `dtype`."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skip(f"transformers is not installed ({error})") from None
    with torch.inference_mode(False), torch.no_grad(), torch.device(at.device):
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
                head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position,
                tie_word_embeddings=c.tie_embeddings, eos_token_id=None, bos_token_id=None, pad_token_id=0,
            )
        ).eval()  # fmt: skip
        _same_weights(theirs, c, at.device)
        for weight in theirs.parameters():
            weight.copy_(weight.to(dtype))
    return theirs


def _same_weights(theirs: Any, c: ModelConfig, device: torch.device) -> None:
    """In the order in which our model draws them, on the device on which it does."""
    generator = torch.Generator(device).manual_seed(_SEED)
    own = dict(theirs.named_parameters())

    def draw(name: str) -> None:
        own[name].copy_(torch.empty(own[name].shape, device=device).normal_(0.0, 0.02, generator=generator))

    draw("model.embed_tokens.weight")
    for i in range(c.num_layers):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
            draw(f"model.layers.{i}.{part}.weight")
    if not c.tie_embeddings:
        draw("lm_head.weight")
