"""From token deltas to the text a caller sees."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from nexusengine.engine.stop import StopStrings
from nexusengine.slo.due import judge
from nexusengine.types import SLO, FinishReason, RequestOutput, Service, Timings, TokenDelta, Verdict


class Detokenizer(Protocol):
    """Turns token ids into text that is final: whole characters only.

    held: characters that the next token may still change, and that `finish` would add. take_starts: where in the text
    tokens begin, of those that were not asked for yet and whose text is final.
    """

    @property
    def held(self) -> str: ...

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...

    def take_starts(self) -> list[int]: ...


@dataclass(slots=True)
class OutputProcessor:
    """Makes the outputs of one request from its deltas.

    When a stop string matches, `stopped` is True: the request has ended for its caller, and the owner must abort it in
    the engine; deltas that still come are ignored.

    Attributes:
        stop_names: the stop strings that are one token, by its id; the engine stops at it and knows the id alone.
        seen_late: whether a token came here after it was due.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    detokenizer: Detokenizer
    stops: StopStrings
    prompt: str | None = None
    slo: SLO | None = None
    slo_class: str | None = None
    arrival_s: float = 0.0
    stop_names: Mapping[int, str] = field(default_factory=dict)
    stopped: bool = False
    timings: Timings | None = None
    service: Service | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    output_tokens: int = 0
    seen_late: bool = False
    _given: int = 0  # characters of text
    _starts: deque[int] = field(default_factory=deque)  # of tokens whose text was not given out yet
    _trial: StopStrings | None = None  # has seen what the detokenizer holds, too
    _tried: int = 0  # characters of that

    def push(self, delta: TokenDelta, now: float) -> RequestOutput | None:
        """The output of a delta; None if there is nothing new. now: timestamp at which a stop string would end it."""
        if self.stopped:
            return None
        self.timings = delta.timings or self.timings
        self.service = delta.service or self.service
        self.cached_tokens = delta.cached_tokens or self.cached_tokens
        self.preemptions = max(delta.preemptions, self.preemptions)
        if self.slo is not None and delta.token_ids:
            due_s = self.arrival_s + self.slo.ttft_s + self.output_tokens * self.slo.tpot_s
            self.seen_late |= now > due_s
        text, token_ids, matched = self._push_tokens(delta.token_ids)
        self.output_tokens += len(token_ids)
        reason: FinishReason | None = delta.finish_reason
        stop_reason: int | str | None = delta.stop_reason
        if isinstance(stop_reason, int):
            stop_reason = self.stop_names.get(stop_reason, stop_reason)
        if matched is None and reason is not None:
            rest, matched = self.stops.push(self.detokenizer.finish())
            text += rest if matched is not None else rest + self.stops.finish()
        if matched is not None:
            self.stopped, reason, stop_reason = True, "stop", matched
            if self.timings is not None:
                self.timings = replace(self.timings, finished_s=now, output_tokens=self.output_tokens)
            if self.service is not None:  # the worker's last word on this does not come any more
                self.service = replace(self.service, strict=self.service.strict and not self.seen_late)
        if not (text or token_ids or reason):
            return None
        self._given += len(text)
        offsets = self._offsets(ended=reason is not None)
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            text=text,
            token_ids=token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=None if delta.logprobs is None else delta.logprobs[: len(token_ids)],
            text_offsets=offsets,
            timings=self.timings if reason else None,
            cached_tokens=self.cached_tokens,
            prompt=self.prompt,
            slo=self.slo,
            slo_class=self.slo_class,
            preemptions=self.preemptions,
            service=self.service if reason else None,
            verdict=self._verdict(reason) if reason else None,
        )

    def _verdict(self, reason: FinishReason) -> Verdict | None:
        """None without an SLO."""
        if self.slo is None:
            return None
        t = self.timings
        if reason in ("abort", "error") or t is None or t.first_token_s is None or t.finished_s is None:
            return Verdict(False, False, "unfinished" if reason == "abort" else "failed")
        return judge(
            self.slo,
            arrival_s=t.arrival_s,
            first_token_s=t.first_token_s,
            last_token_s=t.finished_s,
            output_tokens=t.output_tokens,
            strict=self.service is not None and self.service.strict,
        )

    def _push_tokens(self, token_ids: tuple[int, ...]) -> tuple[str, tuple[int, ...], str | None]:
        """Detokenise, one token at a time where there are stop strings: several come at once when a reader was slow.

        Returns:
            Their text, those of them up to the one that completed a stop string, and that string.
        """
        if not self.stops:
            return self.detokenizer.push(token_ids), token_ids, None
        text = ""
        for n, token_id in enumerate(token_ids, start=1):
            new, matched = self.stops.push(self.detokenizer.push((token_id,)))
            text += new
            if matched is None and self._complete_in_held():
                new, matched = self.stops.push(self.detokenizer.finish())
                text += new
            if matched is not None:
                return text, token_ids[:n], matched
        return text, token_ids, None

    def _complete_in_held(self) -> bool:
        """Whether a stop string is complete in what the detokenizer holds back; the output ends here if so.

        "\\n" is a byte token in many vocabularies, and waits for the token that follows it.
        """
        held = self.detokenizer.held
        if not held:
            self._trial = None
            return False
        if self._trial is None:
            self._trial, self._tried = self.stops.copy(), 0
        _, matched = self._trial.push(held[self._tried :])
        self._tried = len(held)
        return matched is not None

    def _offsets(self, ended: bool) -> tuple[int, ...]:
        """Where tokens begin in the text that was given out, of those that begin in it; at the end of all."""
        self._starts.extend(self.detokenizer.take_starts())
        if self._starts and self._starts[-1] < self._given:  # they rise, so all of them are in it
            whole = tuple(self._starts)
            self._starts.clear()
            return whole
        offsets = []
        while self._starts and (ended or self._starts[0] < self._given):
            offsets.append(min(self._starts.popleft(), self._given))
        return tuple(offsets)
