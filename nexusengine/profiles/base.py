"""What a device profile answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from nexusengine.arrays import F8, I4

Confidence = Literal["measured", "composed", "resampled", "roofline"]
"""measured: every part of a mixed step measured jointly; composed: kernels measured one by one and added; resampled:
fitted to a log of real steps; roofline: from a datasheet, nothing measured."""

STEP_UNCERTAINTY: dict[Confidence, float] = {"measured": 0.03, "composed": 0.06, "resampled": 0.03, "roofline": 0.3}
"""How far off step times may be, as a share (a standard deviation, not a bound).

measured: the mean of three passes of a kernel is known to 5 % (the tables' authors), and a step adds four large ones.
Of single steps of two real runs, those with a chunk are simulated 5 % too short and 3 % too long, others within 3 %.
composed: as the 16-bit and the dense deployments that these profiles were compared with. resampled: the error of the
fit. roofline: by that the efficiencies of measured devices differ.
"""


@dataclass(frozen=True, slots=True)
class ProfileIdentity:
    """What a device profile is a profile of, and where it comes from.

    Attributes:
        source: where the measurements come from.
        confidence: how they were made.
        kv_capacity_tokens: KV tokens that fit beside the weights.
        weights_bytes: of the model as it was measured.
    """

    device: str
    model: str
    source: str
    confidence: Confidence
    kv_capacity_tokens: int
    weights_bytes: int

    @property
    def name(self) -> str:
        """As it is named on the command line: "DEVICE/MODEL"."""
        return f"{self.device}/{self.model}"


class DeviceProfile(Protocol):
    """Step times of one model on one device.

    Attributes:
        identity: of the profile.
    """

    identity: ProfileIdentity

    def step_s(self, counts: I4, contexts: I4) -> float:
        """Mean seconds of a step, without scatter.

        Args:
            counts: `[R]`, tokens computed; 1 is a decode. Rows in any order.
            contexts: `[R]`, tokens in the KV cache.
        """
        ...

    def decode_run_s(self, contexts: I4, steps: int) -> F8:
        """`step_s` of successive decode-only steps of the same sequences; as cheap as one call, or nearly.

        Args:
            contexts: `[R]` at the first step, each growing by one.
            steps: how many.

        Returns:
            Seconds `[steps]`.
        """
        ...

    def noise(self, u: F8, mixed: bool) -> F8:
        """The factor by which measured steps scatter about their mean, at quantiles `u` in [0, 1): its mean is 1."""
        ...
