"""The phases of gpu_check.py, in the order in which they run."""

from __future__ import annotations

from gpu_phases.apart import Phase
from gpu_phases.attention import attention_speed, kernels
from gpu_phases.common import Findings, Setting
from gpu_phases.eight_bits import eight_bits
from gpu_phases.engine import end_to_end, graphs, variants
from gpu_phases.learning import performance_model
from gpu_phases.peers import continuous_batching, logits, reference
from gpu_phases.precompile import precompile
from gpu_phases.roofline import roofline

PHASES: dict[str, tuple[Phase, float]] = {
    "roofline": (roofline, 20.0),
    "precompile": (precompile, 60.0),
    "kernels": (kernels, 60.0),
    "eight_bits": (eight_bits, 30.0),
    "reference": (reference, 45.0),
    "logits": (logits, 30.0),
    "variants": (variants, 45.0),
    "graphs": (graphs, 40.0),
    "attention_speed": (attention_speed, 30.0),
    "performance_model": (performance_model, 60.0),
    "end_to_end": (end_to_end, 130.0),
    "continuous_batching": (continuous_batching, 60.0),
}
"""By name, with the seconds after which a phase begins nothing new; after twice as many it is killed."""


def about(at: Setting) -> Findings:
    """The device and what the machine has; without a GPU to check, available is False."""
    import torch

    from nexusengine.cli import doctor

    on_cuda = at.device.type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        return {"available": False}
    return {
        "available": True,
        "device": torch.cuda.get_device_name(at.device) if on_cuda else "cpu",
        "doctor": doctor.findings(cpu_kernels=not on_cuda),
    }
