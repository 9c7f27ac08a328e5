"""/v1/chat/completions and /v1/completions: served alike, with two shapes of reply."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nexusengine.engine.async_engine import AsyncEngine, retry_on_worker_loss
from nexusengine.errors import InvalidRequest
from nexusengine.request_limits import check_fits, check_token_ids
from nexusengine.server.body import read_body
from nexusengine.server.chat_messages import in_template_form
from nexusengine.server.heavy import LARGE, SMALL
from nexusengine.server.pieces import JSONPieces, LoopYield
from nexusengine.server.recorded_request import Generations, error_code, how_ended, tenant_of
from nexusengine.server.schemas import ChatRequest, CompletionRequest
from nexusengine.server.shapes import ChatShape, Shape, TextShape
from nexusengine.server.state import ServerState
from nexusengine.server.streams import Event, EventStream, fan_in, while_present
from nexusengine.server.verdict import all_headers, missed_by, nexus, of_all, wants_verdict
from nexusengine.slo.classes import SLOClass
from nexusengine.types import MAX_SEED, Missed, RequestOutput, SamplingParams, TokenLogprob

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BEGUN = "nexusengine.generation"
"""Key in the scope of a request whose generation has begun."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a request, beside its prompts.

    Attributes:
        tokens: most to generate for each choice, 0 for none at all, None for as many as fit.
        n: choices a prompt.
        verdict: whether it wants the `nexus` object.
        stream: whether the client sees tokens as they come.
        tenant: keyed hash of who asks, for fairness and the trace; None if it does not say.
    """

    sampling: SamplingParams
    tokens: int | None
    n: int
    slo: SLOClass | None
    priority: int
    verdict: bool
    stream: bool
    tenant: str | None = None

    @classmethod
    def of(cls, request: Request, body: ChatRequest | CompletionRequest) -> Asked:
        """Raises InvalidRequest naming the field or header."""
        state: ServerState = request.app.state.server
        sampling = state.with_model_defaults(body)
        if body.greedy:
            sampling = replace(sampling, temperature=0.0)
        check_token_ids(sampling.stop_token_ids, state.serving_engine().vocab_size, "stop_token_ids")
        return cls(
            sampling=sampling,
            tokens=0 if body.max_tokens == 0 else sampling.max_tokens,
            n=body.n,
            slo=state.classes.wanted(body.slo, all_headers(request)),
            priority=body.priority or 0,
            verdict=wants_verdict(request, state.config.nexus_verdict),
            stream=body.stream,
            tenant=tenant_of(request, body.user, state.keys),
        )


class Generation:
    """One HTTP request: prompts x n choices, numbered prompt by prompt."""

    def __init__(
        self,
        state: ServerState,
        shape: Shape,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[str],
        asked: Asked,
        arrival_s: float,
    ) -> None:
        """prompts: token ids. echoes: what each choice's text begins with, prompt by prompt."""
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
                tenant=asked.tenant,
                timeout_s=state.config.request_timeout,
                arrival_s=arrival_s,
            )
            if asked.tokens != 0
            else partial(_nothing, self.id, prompt)
            for i, (prompt, params) in enumerate(itertools.product(prompts, each))
        ]
        self._recorded: Generations | None = None
        if state.recorder is not None and asked.tokens != 0:
            self._recorded = state.recorder.generation(
                [prompt for prompt, _ in itertools.product(prompts, each)],
                slo=asked.slo,
                max_tokens=asked.tokens,
                priority=asked.priority,
                tenant=asked.tenant,
                arrival_s=arrival_s,
            )
        counted = [partial(self._counted, i, start) for i, start in enumerate(starts)]
        self._generations = [start() if asked.stream else retry_on_worker_loss(start) for start in counted]
        self._lengths = [0] * len(counted)
        self._begun: dict[int, RequestOutput] = {}
        self._usage = {"prompt": 0, "output": 0, "cached": 0}
        self._logprobs: list[deque[TokenLogprob]] = [deque() for _ in starts]  # of tokens whose text is held back
        self._loop_yield = LoopYield()

    async def _counted(
        self, index: int, start: Callable[[], AsyncGenerator[RequestOutput]]
    ) -> AsyncGenerator[RequestOutput]:
        """The outputs of one choice, its tokens counted as they come, also those that nobody will see."""
        self._count_cut_off(index)  # what a worker that was lost had given
        recorded = self._recorded
        if recorded is not None:
            recorded.restarted(index)
        async with aclosing(start()) as outputs:
            async for output in outputs:
                self._lengths[index] += len(output.token_ids)
                self._begun[index] = output
                if recorded is not None:
                    recorded.output(index, output)
                yield output

    def _count_cut_off(self, index: int) -> None:
        output = self._begun.pop(index, None)
        if output is not None:
            self.state.metrics.cut_off(len(output.prompt_token_ids), self._lengths[index], output.cached_tokens)
        self._lengths[index] = 0

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """The outputs of every choice; counts usage and metrics as choices end."""
        left = len(self._generations)
        missed: Missed | None = "unfinished"  # if the client leaves
        code: str | None = None
        try:
            async with fan_in(self._generations) as outputs:
                async for index, output in outputs:
                    if output.finished:
                        left -= 1
                        self._begun.pop(index, None)
                        self._count(index, output, self._lengths[index])
                    yield index, output
        except Exception as error:
            missed, code = missed_by(error), error_code(error)
            raise
        finally:
            for index in list(self._begun):
                self._count_cut_off(index)
            if self._recorded is not None and missed is not None:
                self._recorded.broke_off(how_ended(missed, code), code)
            if missed is not None:
                for _ in range(left):
                    self.state.metrics.missed(self.asked.slo.name if self.asked.slo else None, missed)

    def _count(self, index: int, output: RequestOutput, tokens: int) -> None:
        """A choice has ended. tokens: those that were output."""
        if output.finish_reason == "stop" and output.timings is not None:
            tokens = output.timings.output_tokens  # with the token that ended it, which is not output
        first = index % self.n == 0
        self._usage["prompt"] += len(output.prompt_token_ids) if first else 0
        self._usage["cached"] += output.cached_tokens if first else 0
        self._usage["output"] += tokens
        self.state.metrics.finished(len(output.prompt_token_ids), tokens, output.cached_tokens, output.timings)
        self.state.metrics.judged(output, tokens)
        if self._recorded is not None:
            self._recorded.ended(index, output, tokens)

    def usage(self) -> dict[str, Any]:
        prompt, output = self._usage["prompt"], self._usage["output"]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": self._usage["cached"]},
        }

    def envelope(self, name: str, choices: Sequence[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.state.model_name,
            "choices": choices,
        }

    async def whole(self) -> list[bytes]:
        """The reply's JSON, in pieces."""
        texts = list(self.echoes)
        reasons: list[str | None] = [None] * len(texts)
        entries: list[list[Any]] = [[] for _ in texts]
        verdicts: list[dict[str, Any]] = [{} for _ in texts]
        async with aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                texts[index] += output.text
                reasons[index] = output.finish_reason
                entries[index] += await self._entries(index, output)
                if output.finished:
                    verdicts[index] = nexus(output)
                await self._loop_yield.yield_if_due()
        pieces: list[bytes] = []
        for i, text in enumerate(texts):
            choice = self.shape.choice(i, text, reasons[i], self._joined(entries[i]))
            if self.asked.verdict and len(texts) > 1:
                choice["nexus"] = verdicts[i]
            pieces += [b"," if i else b"", msgspec.json.encode(choice)]
            entries[i].clear()
            await self._loop_yield.yield_if_due()
        reply = self.envelope(self.shape.object_name, []) | {"usage": self.usage()}
        if self.asked.verdict:
            reply["nexus"] = of_all(verdicts)
        before, after = _around_choices(reply)
        return [before, b"[", *pieces, b"]", after]

    async def events(self, include_usage: bool) -> AsyncGenerator[Event]:
        no_usage = {"usage": None} if include_usage else {}
        before, after = _around_choices(self.envelope(self.shape.chunk_name, []) | no_usage)
        before, after = before + b"[", b"]" + after
        opened: set[int] = set()
        verdicts: list[dict[str, Any]] = []
        async with aclosing(self.outputs()) as outputs:
            async for index, output in outputs:
                text = output.text
                if index not in opened:
                    opened.add(index)
                    text = self.echoes[index] + text
                    if (opening := self.shape.opening(index)) is not None:
                        yield msgspec.Raw(before + msgspec.json.encode(opening) + after)
                entries = [] if self.asked.sampling.logprobs is None else await self._entries(index, output)
                if not (text or output.finished or entries):
                    continue
                choice = self.shape.delta(index, text, output.finish_reason, self._joined(entries))
                if output.finished and self.asked.verdict:
                    verdicts.append(nexus(output))
                    yield self.envelope(self.shape.chunk_name, [choice]) | no_usage | {"nexus": verdicts[-1]}
                else:
                    yield msgspec.Raw(before + msgspec.json.encode(choice) + after)
        if include_usage:
            last = {"nexus": of_all(verdicts)} if verdicts else {}
            yield self.envelope(self.shape.chunk_name, []) | {"usage": self.usage()} | last

    async def _entries(self, index: int, output: RequestOutput) -> list[Any]:
        """The logprobs of the tokens whose text has come, as the shape wants them."""
        waiting, before = self._logprobs[index], len(self.echoes[index])
        waiting.extend(output.logprobs or ())
        entries: list[Any] = []
        for offset in output.text_offsets if waiting else ():
            entries.append(self.shape.entry(self.engine.tokenizer, waiting.popleft(), before + offset))
            await self._loop_yield.yield_if_due()
        return entries

    def _joined(self, entries: Sequence[Any]) -> dict[str, Any] | None:
        return None if self.asked.sampling.logprobs is None else self.shape.logprobs(entries)


def _around_choices(envelope: dict[str, Any]) -> tuple[bytes, bytes]:
    """The JSON of an envelope without choices, before and after their list."""
    before, after = msgspec.json.encode(envelope).split(b'"choices":[]', 1)
    return before + b'"choices":', after


def _reseeded(sampling: SamplingParams, k: int) -> SamplingParams:
    """The parameters of choice k: choices of one request differ, and are the same when it is repeated."""
    return replace(sampling, seed=((sampling.seed or 0) + k) % MAX_SEED)


async def _nothing(request_id: str, prompt: Sequence[int]) -> AsyncGenerator[RequestOutput]:
    """The output of a generation of no tokens."""
    yield RequestOutput(request_id, tuple(prompt), "", (), "length")


async def chat_completions(request: Request) -> Response:
    arrival_s, state = time.monotonic(), request.app.state.server
    body = await read_body(request, ChatRequest)
    state.check_model(body.model)
    asked = Asked.of(request, body)
    engine = state.serving_engine()
    text = await engine.render_chat(in_template_form(body.messages), **body.template_options())
    prompt = await encode(state, text, add_special_tokens=False)
    check_fits(len(prompt), asked.tokens, engine.max_model_len)
    generation = Generation(state, ChatShape(), [prompt], [""], asked, arrival_s)
    return await _reply(request, generation, body)


async def completions(request: Request) -> Response:
    arrival_s, state = time.monotonic(), request.app.state.server
    body = await read_body(request, CompletionRequest)
    state.check_model(body.model)
    asked = Asked.of(request, body)
    engine, prompts = state.serving_engine(), body.prompts
    size = sum(1 if p is None else len(p) for p in prompts)
    if size <= SMALL:
        ready = _tokenised(engine, prompts, body.echo, asked.tokens)
    else:
        async with while_present(request.receive):
            ready = await state.heavy.run(size, _tokenised, engine, prompts, body.echo, asked.tokens)
    generation = Generation(
        state, TextShape(), [ids for ids, _ in ready], [echo for _, echo in ready], asked, arrival_s
    )
    return await _reply(request, generation, body)


async def encode(state: ServerState, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of a text, which one that takes much memory waits for until no other does. Raises InvalidRequest."""
    engine = state.serving_engine()
    if len(text) > LARGE:
        return await state.heavy.run(len(text), engine.tokenizer.encode, text, add_special_tokens)
    return await engine.encode(text, add_special_tokens)


def _tokenised(
    engine: AsyncEngine, prompts: Sequence[str | list[int] | None], echo: bool, tokens: int | None
) -> list[tuple[list[int], str]]:
    """The token ids and the echoed text of each prompt. tokens: to generate. Raises InvalidRequest."""
    tokenizer = engine.tokenizer
    ready = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        elif prompt is not None:
            ids = prompt
        elif tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        else:
            raise InvalidRequest("the prompt is null, and this model has no token that begins a text", param="prompt")
        check_fits(len(ids), tokens, engine.max_model_len)
        check_token_ids(ids, engine.vocab_size, "prompt")
        echoed = prompt if echo and prompt is not None else ""
        ready.append((ids, echoed if isinstance(echoed, str) else tokenizer.decode(echoed, skip_special_tokens=False)))
    return ready


async def _reply(request: Request, generation: Generation, body: ChatRequest | CompletionRequest) -> Response:
    headers = {"x-nexus-ignored": ", ".join(body.ignored)} if body.ignored else {}
    config = generation.state.config
    request.scope[BEGUN] = True
    if body.stream:
        events = generation.events(body.include_usage)
        return EventStream(events, headers, stall_s=config.request_timeout, keepalive_s=config.sse_keepalive)
    async with while_present(request.receive):
        return JSONPieces(await generation.whole(), headers)


class _Endpoint:
    """An endpoint without what the framework wraps around a function, at a cost for each event: Edge handles errors."""

    def __init__(self, handle: Callable[[Request], Awaitable[Response]]) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handle(Request(scope, receive, send))
        await response(scope, receive, send)


routes = [
    Route(CHAT, _Endpoint(chat_completions), methods=["POST"]),
    Route(TEXT, _Endpoint(completions), methods=["POST"]),
]
