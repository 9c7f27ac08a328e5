"""The bodies of requests, as pydantic models. A field that is accepted is implemented, or refused with its name."""

from __future__ import annotations

import re
import reprlib
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from nexusengine.errors import InvalidRequest
from nexusengine.server.chat_messages import ChatMessage, TemplateOptions
from nexusengine.types import MAX_PRIORITY, SamplingParams

MAX_CHOICES = 16
MAX_GENERATIONS = 1024
T = TypeVar("T")
List = Annotated[list[T], Field(fail_fast=True)]
"""A list checked up to its first fault: a body of megabytes must not make a fault for each of its items."""


class Body(BaseModel):
    """Strict types; unknown fields are kept aside so that a header can name them.

    REFUSED: fields OpenAI knows and we do not implement, with the values that change nothing and so are accepted.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def check_refused(self) -> None:
        """Raises InvalidRequest for a field that would have to be honoured and is not."""
        for name, harmless in self.REFUSED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in harmless:
                raise InvalidRequest(f"{name} is not supported (got {reprlib.repr(value)})", param=name)

    @property
    def ignored(self) -> list[str]:
        """Fields of the body that have no effect; names no client sends in earnest come as "?"."""
        unknown = self._unknown()
        return sorted({name if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII) else "?" for name in unknown})[:32]

    def _unknown(self) -> set[str]:
        return set(self.model_extra or {}) - set(self.REFUSED)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool = False


class Sampling(Body):
    """What chat and text completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | List[str] | None = None
    stop_token_ids: List[int] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    slo: Any = None  # read by slo_classes.SLOClasses
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
    }

    def sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest naming the field."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
        top_k = self.top_k if self.top_k not in (None, -1) else 0  # some clients write -1 for "all"
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )

    def _unknown(self) -> set[str]:
        options = self.stream_options.model_extra if self.stream_options is not None else None
        return super()._unknown() | {f"stream_options.{name}" for name in options or ()}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling, TemplateOptions):
    messages: Annotated[List[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Sampling.REFUSED,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "chat_template": (),
    }

    def sampling(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed with logprobs", param="top_logprobs")
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(wanted, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(Sampling):
    prompt: str | List[str] | List[int] | List[List[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {**Sampling.REFUSED, "suffix": ("",)}

    def sampling(self) -> SamplingParams:
        if self.best_of not in (None, self.n):
            raise InvalidRequest("best_of is only supported when it equals n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("logprobs of the prompt (echo with logprobs) are not supported", param="echo")
        return self.sampling_params(self.max_tokens, self.logprobs)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or token ids. Raises InvalidRequest if there are none or too many."""
        if isinstance(self.prompt, str):
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
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"chat_template": ()}

    model: str | None = None
    prompt: str | None = None
    messages: List[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """Default: for a prompt yes; for messages no, because the chat template writes them."""
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: List[int]
