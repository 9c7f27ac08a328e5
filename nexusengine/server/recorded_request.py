"""What is noted of a request for the trace, from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace
from starlette.requests import Request

from nexusengine.errors import Cancelled, InternalError, NexusError
from nexusengine.recording import format as lines
from nexusengine.recording.keys import Keys
from nexusengine.slo.classes import SLOClass
from nexusengine.types import SLO, Missed, RequestOutput


class Generations:
    """The choices of one HTTP request, as they are recorded when they end."""

    def __init__(
        self,
        put: Callable[[lines.Request, Sequence[int], Sequence[int]], None],
        base: lines.Request,
        prompts: Sequence[Sequence[int]],
        slo: SLOClass | None,
    ) -> None:
        """put: takes a line, and the tokens of prompt and answer. base: what all lines have in common."""
        self._put_line, self._base, self._prompts, self._slo = put, base, prompts, slo
        self._answers: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        self._cached = [0] * len(prompts)

    def restarted(self, index: int) -> None:
        """A choice is generated once more: its worker was lost."""
        if index in self._answers:
            self._answers[index] = []

    def output(self, index: int, output: RequestOutput) -> None:
        """A choice goes on."""
        if index in self._answers:
            self._answers[index] += output.token_ids
            self._cached[index] = output.cached_tokens

    def ended(self, index: int, output: RequestOutput, tokens: int) -> None:
        """A choice is complete. tokens: generated, with one that ended it."""
        t, service, verdict = output.timings, output.service, output.verdict
        reason: lines.Ended = "stop" if output.finish_reason == "stop" else "length"
        if output.finish_reason == "abort":
            reason = "left"
        self._put(
            index,
            output_tokens=tokens,
            ended=reason,
            worker=service.worker if service else None,
            preemptions=output.preemptions,
            queue_ms=_ms(t.queue_s if t else None),
            ttft_ms=_ms(t.ttft_s if t else None),
            tpot_ms=_ms(t.tpot_s if t else None),
            e2e_ms=_ms(t.e2e_s if t else None),
            met=verdict.met if verdict else None,
            met_strict=verdict.strict_met if verdict else None,
            missed=verdict.missed if verdict else None,
        )

    def broke_off(self, ended: lines.Ended, error: str | None) -> None:
        """All that are not complete came to no end of their own."""
        missed = None if self._slo is None else "unfinished" if ended == "left" else ended
        met = None if self._slo is None else False
        for index in list(self._answers):
            self._put(
                index,
                output_tokens=len(self._answers[index]),
                ended=ended,
                error=error,
                met=met,
                met_strict=met,
                missed=missed,
            )

    def _put(self, index: int, **fields: object) -> None:
        answer, prompt = self._answers.pop(index), self._prompts[index]
        slo = None if self._slo is None else _bounds(self._slo.slo(len(prompt)))
        line = replace(self._base, input_tokens=len(prompt), slo=slo, cached_tokens=self._cached[index], **fields)
        self._put_line(line, prompt, answer)


def error_code(error: Exception) -> str:
    """As the client is told, in OpenAI's form."""
    return error.code if isinstance(error, NexusError) else InternalError.code


def how_ended(missed: Missed, code: str | None) -> lines.Ended:
    """How a request ended that came to no end of its own. code: of its error; None if its client left."""
    if code is None or code == Cancelled.code:
        return "left"
    return missed if missed in ("refused", "unfinished") else "failed"


def tenant_of(request: Request, user: str | None, keys: Keys) -> str | None:
    """The keyed hash of the body's `user`, else of the API key; None if there is neither."""
    if user:
        return keys.tenant("user", user)
    _, _, api_key = request.headers.get("authorization", "").partition(" ")
    return keys.tenant("key", api_key.strip()) if api_key.strip() else None


def _bounds(slo: SLO) -> lines.Bounds:
    e2e_ms = None if slo.e2e_s is None else round(1e3 * slo.e2e_s, 6)
    return lines.Bounds(ttft_ms=round(1e3 * slo.ttft_s, 6), tpot_ms=round(1e3 * slo.tpot_s, 6), e2e_ms=e2e_ms)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(1e3 * seconds, 0.0), 3)
