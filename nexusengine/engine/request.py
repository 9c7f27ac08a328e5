"""From what a caller passes to an EngineRequest, and from its deltas back to what the caller sees."""

from __future__ import annotations

import dataclasses
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import replace

from nexusengine.engine.output import OutputProcessor
from nexusengine.engine.stop import StopStrings
from nexusengine.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NexusError,
    Overloaded,
)
from nexusengine.request_limits import check_fits, check_token_ids
from nexusengine.slo.classes import SLOClass
from nexusengine.tokenize import Tokenizer
from nexusengine.types import (
    MAX_PRIORITY,
    MAX_SEED,
    EngineRequest,
    Missed,
    RequestOutput,
    SamplingParams,
    TokenDelta,
    Verdict,
)

Prompt = str | Sequence[int]

DEFAULT_SAMPLING = SamplingParams(temperature=0.0, max_tokens=256)
"""Used where a caller of the Python API gives none: greedy, at most 256 tokens."""


def make_request(
    prompt: Prompt,
    sampling: SamplingParams,
    tokenizer: Tokenizer,
    *,
    arrival_s: float,
    timeout_s: float | None = None,
    request_id: str | None = None,
    slo: SLOClass | None = None,
    priority: int = 0,
    tenant: str | None = None,
) -> EngineRequest:
    """Tokenise, draw a seed if there is none, and set the SLO for this prompt's length. Raises InvalidRequest."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InvalidRequest(f"a prompt is a string or a list of token ids, got {prompt!r}", param="prompt")
    if not isinstance(sampling, SamplingParams):
        raise InvalidRequest(f"sampling must be SamplingParams, got {sampling!r}", param="sampling")
    if isinstance(prompt, str):
        token_ids = tokenizer.encode(prompt)
    else:
        token_ids = list(prompt)
        wrong = next((i for i in token_ids if isinstance(i, bool) or not isinstance(i, int)), None)
        if wrong is not None:
            raise InvalidRequest(f"a prompt is a string or a list of token ids, got {wrong!r}", param="prompt")
    if not token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        limits = f"between {-MAX_PRIORITY} and {MAX_PRIORITY}"
        raise InvalidRequest(f"priority must be a whole number {limits}, got {priority!r}", param="priority")
    stop_ids = _special_stops(sampling, tokenizer)
    if stop_ids:
        sampling = dataclasses.replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *stop_ids))
    return EngineRequest(
        request_id=request_id or uuid.uuid4().hex,
        prompt_token_ids=token_ids,
        sampling=sampling.with_seed(secrets.randbelow(MAX_SEED)),
        arrival_s=arrival_s,
        eos_token_ids=tokenizer.eos_token_ids,
        slo=None if slo is None else slo.slo(len(token_ids)),
        slo_class=None if slo is None else slo.name,
        priority=priority,
        tenant=tenant,
        deadline_s=None if timeout_s is None else arrival_s + timeout_s,
    )


def _special_stops(sampling: SamplingParams, tokenizer: Tokenizer) -> dict[int, str]:
    """Stop strings that are one special token, by its id: they never show in a text that leaves special tokens out."""
    ids = {tokenizer.special_token_id(stop): stop for stop in sampling.stop}
    return {token_id: stop for token_id, stop in ids.items() if token_id is not None}


def check_length(request: EngineRequest, max_model_len: int, vocab_size: int) -> None:
    """Refuse what every worker would, before it is sent. Raises ContextTooLong or InvalidRequest."""
    check_fits(len(request.prompt_token_ids), request.sampling.max_tokens, max_model_len)
    check_token_ids(request.prompt_token_ids, vocab_size, "prompt")


def make_processor(request: EngineRequest, tokenizer: Tokenizer, prompt: Prompt | None = None) -> OutputProcessor:
    """Makes the outputs of a request. prompt: as the caller gave it; a text is repeated in the outputs."""
    return OutputProcessor(
        request.request_id,
        tuple(request.prompt_token_ids),
        tokenizer.stream(context=request.prompt_token_ids),
        StopStrings(request.sampling.stop),
        prompt=prompt if isinstance(prompt, str) else None,
        slo=request.slo,
        slo_class=request.slo_class,
        arrival_s=request.arrival_s,
        stop_names=_special_stops(request.sampling, tokenizer),
    )


def merge(deltas: Sequence[TokenDelta]) -> TokenDelta:
    """Consecutive deltas of one request as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    logprobs = tuple(item for d in deltas for item in d.logprobs or ())
    return TokenDelta(
        last.request_id,
        tuple(i for d in deltas for i in d.token_ids),
        logprobs if any(d.logprobs is not None for d in deltas) else None,
        last.finish_reason,
        last.stop_reason,
        next((d.timings for d in reversed(deltas) if d.timings is not None), None),
        max(d.cached_tokens for d in deltas),
        max(d.preemptions for d in deltas),
        last.error_code,
        last.error_message,
        last.retry_after_s,
        next((d.service for d in reversed(deltas) if d.service is not None), None),
    )


def output_of(processor: OutputProcessor, delta: TokenDelta, now: float) -> RequestOutput | None:
    """`processor.push`, with the error of a request that failed in its last output."""
    output = processor.push(delta, now)
    if output is None or output.finish_reason != "error":
        return output
    error = delta.error
    verdict = None if output.verdict is None else Verdict(False, False, _missed(error))
    return replace(output, error=error, verdict=verdict)


def _missed(error: NexusError) -> Missed:
    if isinstance(error, Overloaded):
        return "refused"
    return "unfinished" if isinstance(error, DeadlineExceeded) else "failed"
