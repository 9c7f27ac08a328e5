"""/v1/chat/completions and /v1/completions: the same life, two shapes of reply."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nexusengine.async_engine import once_more
from nexusengine.requests import Prompt, check_token_ids
from nexusengine.server.body import read_body
from nexusengine.server.schemas import ChatRequest, CompletionRequest
from nexusengine.server.shapes import ChatShape, Shape, TextShape
from nexusengine.server.state import ServerState
from nexusengine.server.streams import EventStream, fan_in, while_present
from nexusengine.server.verdict import all_headers, missed_by, nexus, of_all, wants_verdict
from nexusengine.slo import SLOClass
from nexusengine.types import MAX_SEED, Missed, RequestOutput, SamplingParams, TokenLogprob

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants beside its prompts. n: choices a prompt. verdict: whether it wants the `nexus` object.
    stream: whether the client sees tokens as they come."""

    sampling: SamplingParams
    n: int
    slo: SLOClass | None
    priority: int
    verdict: bool
    stream: bool

    @classmethod
    def of(cls, request: Request, body: ChatRequest | CompletionRequest) -> Asked:
        """Raises InvalidRequest naming the field or header."""
        state: ServerState = request.app.state.server
        return cls(
            sampling=body.sampling(),
            n=body.n,
            slo=state.classes.wanted(body.slo, all_headers(request)),
            priority=body.priority or 0,
            verdict=wants_verdict(request, state.config.nexus_verdict),
            stream=body.stream,
        )


class Generation:
    """One HTTP request: prompts x n choices, numbered prompt by prompt."""

    def __init__(
        self,
        state: ServerState,
        shape: Shape,
        prompts: Sequence[Prompt],
        echoes: Sequence[str],
        asked: Asked,
        arrival_s: float,
    ) -> None:
        sampling, n = asked.sampling, asked.n
        self.state, self.shape = state, shape
        self.engine = state.serving_engine()
        self.n, self.echoes = n, [e for e in echoes for _ in range(n)]
        self.asked = asked
        self.id, self.created = f"{shape.prefix}-{uuid.uuid4().hex}", int(time.time())
        each = [sampling if k == 0 or sampling.seed is None else _reseeded(sampling, k) for k in range(n)]
        starts = [
            partial(
                self.engine.generate,
                prompt,
                params,
                request_id=self.id if i == 0 else f"{self.id}.{i}",
                slo=asked.slo,
                priority=asked.priority,
                timeout_s=state.config.request_timeout,
                arrival_s=arrival_s,
            )
            for i, (prompt, params) in enumerate(itertools.product(prompts, each))
        ]
        self._seen: list[list[RequestOutput]] = [[] for _ in starts]  # of those that are not streamed, before their end
        self._generations = [
            start() if asked.stream else once_more(start, seen) for start, seen in zip(starts, self._seen, strict=True)
        ]
        self._usage = {"prompt": 0, "output": 0, "cached": 0}

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """The news of every choice; counts usage and metrics as choices end."""
        lengths = [0] * len(self._generations)
        left = dict.fromkeys(range(len(lengths)))
        missed: Missed | None = "unfinished"  # if the client leaves
        try:
            async with fan_in(self._generations) as news:
                async for index, output in news:
                    lengths[index] += len(output.token_ids)
                    if self.asked.stream:
                        self._seen[index] = [output]
                    if output.finished:
                        del left[index]
                        self._count(index, output, lengths[index])
                    yield index, output
        except Exception as error:
            missed = missed_by(error)
            raise
        finally:
            if missed is not None:
                for index in left:
                    self.state.metrics.missed(self.asked.slo.name if self.asked.slo else None, missed)
                    self._count_unfinished(self._seen[index], lengths[index])

    def _count(self, index: int, output: RequestOutput, tokens: int) -> None:
        """A choice has ended. tokens: those that were output."""
        if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
            tokens += 1  # the one that ended it
        first = index % self.n == 0
        self._usage["prompt"] += len(output.prompt_token_ids) if first else 0
        self._usage["cached"] += output.cached_tokens if first else 0
        self._usage["output"] += tokens
        self.state.metrics.finished(len(output.prompt_token_ids), tokens, output.cached_tokens, output.timings)
        self.state.metrics.judged(output, tokens)

    def _count_unfinished(self, seen: list[RequestOutput], streamed: int) -> None:
        """A choice was cut short, its client having left or for an error. seen: all of its outputs if it was not
        streamed, else the last."""
        if seen:
            tokens = streamed or sum(len(output.token_ids) for output in seen)
            self.state.metrics.cut_short(len(seen[-1].prompt_token_ids), tokens, seen[-1].cached_tokens)

    def usage(self) -> dict[str, Any]:
        prompt, output = self._usage["prompt"], self._usage["output"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self._usage["cached"]},
        }

    def envelope(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.state.model_name,
            "choices": choices,
        }

    async def whole(self) -> dict[str, Any]:
        texts = list(self.echoes)
        reasons: list[str | None] = [None] * len(texts)
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        verdicts: list[dict[str, Any]] = [{} for _ in texts]
        async with aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                texts[index] += output.text
                reasons[index] = output.finish_reason
                logprobs[index].extend(output.logprobs or ())
                if output.finished:
                    verdicts[index] = nexus(output)
        choices = [
            self.shape.choice(i, text, reasons[i], self._logprobs(logprobs[i], 0)) for i, text in enumerate(texts)
        ]
        reply = self.envelope(self.shape.object_name, choices) | {"usage": self.usage()}
        if self.asked.verdict:
            reply["nexus"] = of_all(verdicts)
            if len(choices) > 1:
                reply["choices"] = [choice | {"nexus": v} for choice, v in zip(choices, verdicts, strict=True)]
        return reply

    async def events(self, include_usage: bool) -> AsyncGenerator[dict[str, Any]]:
        no_usage = {"usage": None} if include_usage else {}
        lengths = [0] * len(self.echoes)
        opened: set[int] = set()
        verdicts: list[dict[str, Any]] = []
        async with aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                text = output.text
                if index not in opened:
                    opened.add(index)
                    text = self.echoes[index] + text
                    if (opening := self.shape.opening(index)) is not None:
                        yield self.envelope(self.shape.chunk_name, [opening]) | no_usage
                if not (text or output.finished or output.logprobs):
                    continue
                logprobs = self._logprobs(output.logprobs or (), lengths[index])
                lengths[index] += len(text)
                choice = self.shape.delta(index, text, output.finish_reason, logprobs)
                chunk = self.envelope(self.shape.chunk_name, [choice]) | no_usage
                if output.finished and self.asked.verdict:
                    verdicts.append(nexus(output))
                    chunk["nexus"] = verdicts[-1]
                yield chunk
        if include_usage:
            last = {"nexus": of_all(verdicts)} if verdicts else {}
            yield self.envelope(self.shape.chunk_name, []) | {"usage": self.usage()} | last

    def _logprobs(self, items: Sequence[TokenLogprob], offset: int) -> Any:
        if self.asked.sampling.logprobs is None:
            return None
        return self.shape.logprobs(self.engine.tokenizer, items, offset)


def _reseeded(sampling: SamplingParams, k: int) -> SamplingParams:
    """The parameters of choice k: choices of one request differ, and are the same when it is repeated."""
    return replace(sampling, seed=((sampling.seed or 0) + k) % MAX_SEED)


async def chat_completions(request: Request) -> Response:
    arrival_s, state = time.monotonic(), request.app.state.server
    body = await read_body(request, ChatRequest)
    state.check_model(body.model)
    asked = Asked.of(request, body)
    engine = state.serving_engine()
    text = engine.tokenizer.render_chat([m.for_template() for m in body.messages])
    prompt = await engine.encode(text, add_special_tokens=False)
    generation = Generation(state, ChatShape(), [prompt], [""], asked, arrival_s)
    return await _reply(request, generation, body)


async def completions(request: Request) -> Response:
    arrival_s, state = time.monotonic(), request.app.state.server
    body = await read_body(request, CompletionRequest)
    state.check_model(body.model)
    asked = Asked.of(request, body)
    engine, prompts = state.serving_engine(), body.prompts
    for prompt in prompts:
        if not isinstance(prompt, str):
            check_token_ids(prompt, engine.vocab_size, "prompt")
    echoes = ["" if not body.echo else p if isinstance(p, str) else engine.tokenizer.decode(p) for p in prompts]
    generation = Generation(state, TextShape(), prompts, echoes, asked, arrival_s)
    return await _reply(request, generation, body)


async def _reply(request: Request, generation: Generation, body: ChatRequest | CompletionRequest) -> Response:
    headers = {"x-nexus-ignored": ", ".join(body.ignored)} if body.ignored else {}
    if body.stream:
        return EventStream(generation.events(body.include_usage), headers, generation.state.config.request_timeout)
    async with while_present(request.receive):
        return JSONResponse(await generation.whole(), headers=headers)


routes = [Route(CHAT, chat_completions, methods=["POST"]), Route(TEXT, completions, methods=["POST"])]
