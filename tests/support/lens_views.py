"""Views for tests of policies, from a line a request."""

from __future__ import annotations

import numpy as np

from nexusengine.arrays import F8
from nexusengine.perf.features import StepFeatures
from nexusengine.perf.model import StepTime
from nexusengine.scheduler.lens.deadlines import Deadlines
from nexusengine.scheduler.view import EngineView, RequestColumns

SIZE = 16
NAN = float("nan")


class Straight:
    """A model that knows: 5 ms, 20 us a token, 40 ns a KV token, 1 ns a token pair, and 4 ms more with prompts; the
    upper bound is a tenth over the mean."""

    def __init__(self, extra_s: float = 0.004, factor: float = 1.1) -> None:
        self.extra_s, self.factor = extra_s, factor

    def predict(self, features: StepFeatures) -> StepTime:
        f = features
        mean = self.mean_s(
            np.array([f.tokens], np.float64),
            np.array([f.sequences], np.float64),
            np.array([f.prefills], np.float64),
            np.array([f.prefill_attention]),
            np.array([f.decode_kv_tokens], np.float64),
        )
        return StepTime(float(mean[0]), self.factor * float(mean[0]))

    def mean_s(self, tokens: F8, sequences: F8, prefills: F8, prefill_attention: F8, decode_kv_tokens: F8) -> F8:
        s: F8 = 0.005 + 20e-6 * tokens + 1e-9 * prefill_attention + 40e-9 * decode_kv_tokens
        return s + self.extra_s * (prefills > 0)


class Bench:
    """Builds a view request by request; each method returns the slot."""

    def __init__(self, *, slots: int = 64, model: Straight | None = None) -> None:
        self.c = RequestColumns.empty(slots)
        self.running: list[int] = []
        self.waiting: list[int] = []
        self.model = model or Straight()

    def _slot(self, prompt: int, arrival_s: float, ttft_s: float, tpot_s: float) -> int:
        slot = len(self.running) + len(self.waiting)
        c = self.c
        c.arrival_s[slot], c.ttft_s[slot], c.tpot_s[slot] = arrival_s, ttft_s, tpot_s
        c.prompt_tokens[slot] = c.known_tokens[slot] = prompt
        c.max_tokens[slot] = 1000
        return slot

    def decode(
        self,
        *,
        first_s: float,
        generated: int = 1,
        prompt: int = 100,
        arrival_s: float = 0.0,
        ttft_s: float = 10.0,
        tpot_s: float = 0.05,
    ) -> int:
        """A request with its prompt and `generated` tokens, of which the newest is still to be computed."""
        slot, c = self._slot(prompt, arrival_s, ttft_s, tpot_s), self.c
        c.known_tokens[slot] = prompt + generated
        c.computed_tokens[slot] = prompt + generated - 1
        c.generated_tokens[slot] = generated
        c.first_token_s[slot] = c.last_token_s[slot] = first_s
        c.blocks[slot] = -(-(prompt + generated) // SIZE)
        self.running.append(slot)
        return slot

    def partial(
        self, prompt: int, computed: int, *, arrival_s: float = 0.0, ttft_s: float = 10.0, tpot_s: float = 0.05
    ) -> int:
        """A prompt of which `computed` tokens are in the KV cache."""
        slot, c = self._slot(prompt, arrival_s, ttft_s, tpot_s), self.c
        c.computed_tokens[slot], c.blocks[slot] = computed, -(-computed // SIZE)
        self.running.append(slot)
        return slot

    def wait(
        self,
        prompt: int,
        *,
        arrival_s: float = 0.0,
        ttft_s: float = 10.0,
        tpot_s: float = 0.05,
        priority: int = 0,
        relegated: bool = False,
    ) -> int:
        slot = self._slot(prompt, arrival_s, ttft_s, tpot_s)
        self.c.priority[slot], self.c.relegated[slot] = priority, relegated
        self.waiting.append(slot)
        return slot

    def view(self, *, free: int = 10_000, seats: int = 32, batch: int = 8192, arrivals: int = 1) -> EngineView:
        return EngineView(
            columns=self.c,
            running=np.array(self.running, np.int32),
            waiting=np.array(self.waiting, np.int32),
            free_blocks=free,
            total_blocks=free + int(self.c.blocks.sum()),
            block_size=SIZE,
            max_batch_tokens=batch,
            max_running=seats,
            model=self.model,
            arrivals=arrivals,
        )


def deadlines_of(view: EngineView) -> Deadlines:
    deadlines = Deadlines(len(view.columns.known_tokens))
    deadlines.update(view, view.running)
    deadlines.update(view, view.waiting)
    return deadlines
