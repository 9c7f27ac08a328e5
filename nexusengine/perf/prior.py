"""What to believe of a device before its first step: a few made-up observations from datasheet and model geometry."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.model_config import ModelConfig
from nexusengine.perf.devices import Datasheet
from nexusengine.perf.features import StepFeatures

_COMPUTE_EFFICIENCY, _BANDWIDTH_EFFICIENCY = 0.6, 0.8
_OVERHEAD_S = 0.002
_MIXED_OVERHEAD_S = 0.001  # no captured graph, more kernels
_DECODES = ((1, 1024), (8, 1024), (32, 512), (128, 512), (256, 2048))  # sequences, context of each
_CHUNKS = ((16, 0, 0), (64, 0, 8), (256, 0, 8), (512, 2048, 0), (1024, 0, 32), (2048, 0, 0), (4096, 4096, 0))
_DECODE_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Prior:
    """Steps and the seconds they are believed to take.

    Attributes:
        steps: that tell the terms of the model apart.
        seconds: of each.
        tokens: up to how many in a step that is to be relied on.
        token_s: seconds for each token of steps far larger than any seen; 0 where nothing measured says so.
    """

    steps: tuple[StepFeatures, ...]
    seconds: tuple[float, ...]
    tokens: int = 256
    token_s: float = 0.0


def probes() -> tuple[StepFeatures, ...]:
    """Steps that tell the terms of the model apart."""
    decodes = [StepFeatures(n, n, 0, 0.0, n * context) for n, context in _DECODES]
    chunks = [  # tokens of the chunk, its context, decodes beside it
        StepFeatures(q + n, n + 1, 1, q * (context + 0.5 * q), n * _DECODE_CONTEXT) for q, context, n in _CHUNKS
    ]
    return (*decodes, *chunks)


def roofline(sheet: Datasheet, model: ModelConfig, bytes_per_weight: float = 2.0, kv_bytes: int = 2) -> Prior:
    """A prior from a datasheet: the larger of moving weights and computing, moving KV, and a fixed overhead.

    With the efficiencies that are usual for each, or the rate of matrix products that was measured; 2 operations a
    weight and token, but those of the output layer only once a sequence, and 4 a layer, head dimension and pair of
    tokens.
    """
    steps = probes()
    moved_per_s = sheet.bandwidth_gb_s * 1e9 * _BANDWIDTH_EFFICIENCY
    flops = (sheet.sustained_tflops or sheet.tflops * _COMPUTE_EFFICIENCY) * 1e12
    output = model.vocab_size * model.hidden_size
    layers = model.num_parameters - output * (1 if model.tie_embeddings else 2)
    pair_flop = 4.0 * model.num_layers * model.num_heads * model.head_dim

    def seconds(f: StepFeatures) -> float:
        memory_s = (layers + output) * bytes_per_weight / moved_per_s
        kv_s = f.decode_kv_tokens * model.kv_bytes_per_token(kv_bytes) / moved_per_s
        compute_s = 2.0 * (layers * f.tokens + output * f.sequences) / flops
        attention_s = pair_flop * f.prefill_attention / flops
        return _OVERHEAD_S + _MIXED_OVERHEAD_S * (f.prefills > 0) + max(memory_s, compute_s) + kv_s + attention_s

    measured = sheet.sustained_tflops > 0.0 and bytes_per_weight >= 2.0  # fewer bits may be computed faster
    return Prior(steps, tuple(map(seconds, steps)), token_s=2.0 * layers / flops if measured else 0.0)


EIGHT_BILLION = ModelConfig("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192, 1e-5, 5e5)
GENERIC = roofline(Datasheet(bandwidth_gb_s=864, tflops=362), EIGHT_BILLION)
"""Of a device of which nothing is known. Its shape matters, its scale does not: that is taken from the first steps."""
