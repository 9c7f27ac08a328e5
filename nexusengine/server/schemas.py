"""The bodies of requests, as pydantic models. A field that is accepted is implemented, or refused with its name."""

from __future__ import annotations

import re
from itertools import islice
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nexusengine.errors import InvalidRequest
from nexusengine.server import fields
from nexusengine.server.chat_messages import ChatMessage, TemplateOptions
from nexusengine.types import MAX_PRIORITY, SamplingParams

MAX_CHOICES = 16
MAX_GENERATIONS = 1024
MAX_STOP_TOKEN_IDS = 1024
_MOST_NAMES = 256
T = TypeVar("T")


def _integral(value: Any) -> Any:
    """JSON Schema's integers: 1.0 is one, and clients whose language has no integers write it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_integral)]
List = Annotated[list[T], Field(fail_fast=True)]
"""A list checked up to its first fault: a body of megabytes must not make a fault for each of its items."""


class Object(BaseModel):
    """Strict types; null is the same as leaving the field out, as OpenAI's schema has it; unknown fields are kept.

    NULL_COUNTS: fields for which null is a value of its own.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    NULL_COUNTS: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            return {name: value for name, value in data.items() if value is not None or name in cls.NULL_COUNTS}
        return data


class Body(Object):
    """A request's body. UNSUPPORTED: fields that are refused, with the values that change nothing (see `fields`)."""

    UNSUPPORTED: ClassVar[fields.Harmless] = {}

    def check_unsupported(self) -> None:
        """Raises InvalidRequest for a field that would have to be honoured and is not."""
        fields.check_unsupported(self.model_extra or {}, self.UNSUPPORTED)

    @property
    def ignored(self) -> list[str]:
        """Fields of the body that have no effect; names no client sends in earnest come as "?"."""
        unknown = islice(self._unknown(), _MOST_NAMES)
        return sorted({name if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII) else "?" for name in unknown})[:32]

    def _unknown(self) -> list[str]:
        return [name for name in self.model_extra or () if name not in self.UNSUPPORTED]


class StreamOptions(Object):
    include_usage: bool = False


class Sampling(Body):
    """The fields that chat and text completions have in common."""

    model: str | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    seed: Int | None = None
    stop: str | List[str] | None = None
    stop_token_ids: Annotated[List[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    slo: Any = None  # read by slo_classes.SLOClasses
    priority: Annotated[Int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    user: str | None = None  # a tenant, see recorded_request.tenant_of

    def sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest naming the field."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
        top_k = self.top_k if self.top_k not in (None, -1) else 0  # some clients write -1 for "all"
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=top_k or 0,
            top_p=self.top_p or 1.0,  # 0 is greedy: see `greedy`
            min_p=self.min_p or 0.0,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )

    def check_unsupported(self) -> None:
        super().check_unsupported()
        fields.check_unsupported(self._further_stream_options(), fields.STREAM_OPTIONS, "stream_options.")

    def _further_stream_options(self) -> dict[str, Any]:
        return (self.stream_options.model_extra if self.stream_options is not None else None) or {}

    def _unknown(self) -> list[str]:
        options = (name for name in self._further_stream_options() if name not in fields.STREAM_OPTIONS)
        return [*(f"stream_options.{name}" for name in options), *super()._unknown()]

    @property
    def greedy(self) -> bool:
        """Whether top_p is 0: a nucleus of the most likely token alone, whatever the temperature."""
        return self.top_p == 0

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling, TemplateOptions):
    messages: Annotated[List[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] = 0

    UNSUPPORTED: ClassVar[fields.Harmless] = fields.CHAT

    def sampling(self) -> SamplingParams:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed with logprobs", param="top_logprobs")
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(wanted, self.top_logprobs if self.logprobs else None)


class CompletionRequest(Sampling):
    """prompt: null, as OpenAI has it, is the beginning of a document. max_tokens: 0 generates nothing."""

    prompt: str | List[str] | List[int] | List[List[int]] | None
    max_tokens: Annotated[Int, Field(ge=0)] = 16
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: Int | None = None

    UNSUPPORTED: ClassVar[fields.Harmless] = fields.TEXT
    NULL_COUNTS: ClassVar[frozenset[str]] = frozenset({"prompt"})

    def sampling(self) -> SamplingParams:
        if self.best_of not in (None, self.n):
            raise InvalidRequest("best_of is only supported when it equals n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("logprobs of the prompt (echo with logprobs) are not supported", param="echo")
        return self.sampling_params(self.max_tokens or 1, self.logprobs)

    @property
    def prompts(self) -> list[str | list[int] | None]:
        """The prompts, each a text, token ids, or None for the beginning of a document.

        Raises:
            InvalidRequest: there are none or too many.
        """
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        if len(self.prompt) * self.n > MAX_GENERATIONS:
            asked = f"{len(self.prompt)} prompts with n={self.n}"
            raise InvalidRequest(f"{asked}: at most {MAX_GENERATIONS} generations in one request", param="prompt")
        return list(self.prompt)


class TokenizeRequest(Body, TemplateOptions):
    UNSUPPORTED: ClassVar[fields.Harmless] = fields.TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: List[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """Default: for a prompt yes; for messages no, because the chat template writes them."""
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    UNSUPPORTED: ClassVar[fields.Harmless] = fields.DETOKENIZE

    model: str | None = None
    tokens: List[int]
