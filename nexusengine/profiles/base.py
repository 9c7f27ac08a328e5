"""What a device profile answers."""

from __future__ import annotations

from typing import Literal, Protocol

from nexusengine.arrays import F8, I4

Confidence = Literal["measured", "composed", "resampled", "roofline"]
"""measured: every part of a mixed step measured jointly; composed: kernels measured one by one and added; resampled:
fitted to a log of real steps; roofline: from a datasheet, nothing measured."""


class DeviceProfile(Protocol):
    """Step times of one model on one device.

    name: "DEVICE/MODEL". source: where the measurements come from. kv_capacity_tokens: KV tokens that fit beside the
    weights. weights_bytes: of the model as it was measured.
    """

    name: str
    device: str
    model: str
    source: str
    confidence: Confidence
    kv_capacity_tokens: int
    weights_bytes: int

    def step_s(self, counts: I4, contexts: I4) -> float:
        """Mean seconds of a step that computes `counts [R]` tokens of sequences with `contexts [R]` tokens in their KV
        cache; no scatter. Rows in any order; a count of 1 is a decode."""
        ...

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        """`step_s` of `steps` successive decode-only steps of the same sequences `[R]`, each context growing by one:
        `[steps]`. As cheap as one call, or nearly."""
        ...

    def noise(self, u: F8, mixed: bool) -> F8:
        """The factor by which measured steps scatter about their mean, at quantiles `u` in [0, 1): its mean is 1."""
        ...
