"""The phase that measures what the device can do at best."""

from __future__ import annotations

import torch

from gpu_phases.common import Findings, Setting


def roofline(at: Setting) -> Findings:
    """Bandwidth of copies and of sums, matrix products, and what a launch costs the host."""
    m = 128 if at.tiny else 8192
    x = torch.randn(m, m, device=at.device, dtype=at.dtype)
    gemm_s = at.seconds(lambda: x @ x)
    one = torch.zeros(1, device=at.device)
    launch_s = at.host_seconds(lambda: [one.add_(1) for _ in range(100)]) / 100
    return {
        "copy_gb_s": at.copy_gb_s(),
        "read_gb_s": at.read_gb_s(),
        "gemm_tflop_s": 2 * m**3 / gemm_s / 1e12,
        "launch_us": launch_s * 1e6,
    }
