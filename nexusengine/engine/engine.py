"""Engine: text generation from Python, in this process or over several devices."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, overload

from nexusengine.config import parse_devices
from nexusengine.engine.async_engine import AsyncEngine
from nexusengine.engine.launch import engine_config
from nexusengine.engine.lifetime import not_pickled
from nexusengine.engine.offline import LocalRunner, RemoteRunner
from nexusengine.engine.request import DEFAULT_SAMPLING, Prompt, check_length, make_request
from nexusengine.errors import InvalidRequest
from nexusengine.loading.sampling_defaults import SamplingDefaults
from nexusengine.slo.resolve import SLOClasses, SLOLike
from nexusengine.tokenize import Tokenizer
from nexusengine.tokenize.chat_template import Message, check_template_variables
from nexusengine.types import RequestOutput, SamplingParams, TokenLogprob

_PROGRESS_FROM = 9

__all__ = ["AsyncEngine", "Engine"]


class Engine:
    """A model on one device, in this process, or on several, behind a router.

    Any number of threads may call it at once; their requests share the batch. It belongs to the process that made it:
    in a fork of that its methods raise Unavailable. Its processes, if it has any, end when it is closed or garbage, or
    with the process.

        with Engine("smollm2-135m") as engine:
            print(engine.generate("The capital of France is")[0].text)

    Args:
        settings: the fields of `nexusengine.config.EngineConfig`.
    """

    def __init__(
        self, model: str = "smollm2-135m", devices: str | Sequence[str] | None = None, **settings: Any
    ) -> None:
        """Loads the model. Raises ModelLoadError or ConfigError."""
        config = engine_config(model, devices, settings)
        self._model_samples = config.generation_config == "model"
        self._classes = SLOClasses.configured(config.slo_classes)
        self._runner: LocalRunner | RemoteRunner = (
            LocalRunner(config) if len(parse_devices(config.devices)) == 1 else RemoteRunner(config)
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self._runner.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._runner.vocab_size

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output in tokens."""
        self._runner.check()
        return self._runner.max_model_len

    def sampling_params(self, **given: Any) -> SamplingParams:
        """SamplingParams(**given), the model's own defaults in place of what is not given, as for requests over HTTP.

        The model may have defaults of temperature, top_p, top_k and min_p; with generation_config="none" those of
        SamplingParams are used.
        """
        defaults = self.tokenizer.sampling_defaults if self._model_samples else SamplingDefaults()
        return defaults.fill(SamplingParams(**given), given)

    def stats(self) -> dict[str, float]:
        """Counters of the engine core (see scheduler.stats.CoreStats), summed over workers."""
        self._runner.check()
        return self._runner.stats()

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        progress: bool | None = None,
        slo: SLOLike = None,
        priority: int = 0,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        progress: bool | None = None,
        slo: SLOLike = None,
        priority: int = 0,
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        progress: bool | None = None,
        slo: SLOLike = None,
        priority: int = 0,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue each prompt (text or token ids); a single prompt is a list of one.

        Args:
            sampling: for all prompts, or one for each; default: greedy, at most 256 tokens, whatever the model's own
                defaults are (see sampling_params for those).
            stream: whether outputs are returned as they come.
            progress: show a bar; default: for more than 8 prompts on a terminal.
            slo: of each prompt: an SLO, the name of a class, or None. The last output of each prompt says in `verdict`
                whether it was met. Without one no prompt is refused, however long it waits.
            priority: see EngineRequest.

        Returns:
            The outputs, in the order of the prompts, of which there may be any number. With stream=True an iterator of
            outputs, each with what is new and its prompt's place in metadata["index"]; closing it aborts what is left.

        Raises:
            NexusError: a prompt or parameter is wrong; before anything is started. Later, a request that fails is an
                output like the others, with finish_reason "error" and its `error`.
        """
        longest = self.max_model_len
        many = _as_list(prompts)
        each = _sampling_list(sampling, len(many))
        slo_class = self._classes.in_python(slo)
        arrival_s = time.monotonic()
        requests = [
            make_request(p, s, self.tokenizer, arrival_s=arrival_s, slo=slo_class, priority=priority)
            for p, s in zip(many, each, strict=True)
        ]
        for request in requests:
            check_length(request, longest, self.vocab_size)
        outputs = self._runner.run(requests, many, stream=stream)
        if stream:
            return outputs
        shown = len(many) >= _PROGRESS_FROM and sys.stderr.isatty() if progress is None else progress
        return _collect(outputs, len(many), shown)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """`generate` for one conversation or several, rendered with the model's chat template.

        Args:
            add_generation_prompt: whether an assistant's message is begun after the last one; default: yes, unless the
                last one is continued.
            continue_final_message: whether the last message is continued.
            chat_template_kwargs: what else the template reads, e.g. {"enable_thinking": False}, also tools and
                documents.
            options: as for `generate`.

        Raises:
            InvalidRequest: with what the template says is wrong with the messages.
        """
        several = bool(messages) and isinstance(messages[0], list | tuple)
        variables = check_template_variables(chat_template_kwargs or {})
        prompts = [
            self.tokenizer.encode_chat(
                conversation,  # type: ignore[arg-type]
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            for conversation in (messages if several else [messages])
        ]
        return self.generate(prompts, sampling, stream=stream, **options)  # type: ignore[call-overload,no-any-return]

    def close(self) -> None:
        """Free the device, end the workers. Safe to call twice."""
        self._runner.close()
        self._runner.tokenizer.close()

    def __reduce__(self) -> NoReturn:
        not_pickled(self)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if not isinstance(prompts, Sequence):
        raise InvalidRequest(f"prompts must be texts or lists of token ids, got {prompts!r}", param="prompts")
    if not isinstance(prompts, str) and not prompts:
        raise InvalidRequest(f"prompts is {prompts!r}; give at least one prompt", param="prompts")
    if isinstance(prompts, str) or all(isinstance(p, int) for p in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _sampling_list(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or DEFAULT_SAMPLING] * count
    if not isinstance(sampling, Sequence) or not all(isinstance(s, SamplingParams) for s in sampling):
        raise InvalidRequest(f"sampling must be SamplingParams, or a list of them, got {sampling!r}", param="sampling")
    if len(sampling) != count:
        raise InvalidRequest(f"{len(sampling)} sampling parameters for {count} prompts", param="sampling")
    return list(sampling)


def _collect(outputs: Iterator[RequestOutput], count: int, progress: bool) -> list[RequestOutput]:
    """The outputs of each prompt put together, in order."""
    pieces: list[list[RequestOutput]] = [[] for _ in range(count)]
    with _bar(count, progress) as advance:
        for piece in outputs:
            pieces[piece.metadata["index"]].append(piece)
            if piece.finished:
                advance()
    return [_joined(parts) for parts in pieces]


def _joined(parts: list[RequestOutput]) -> RequestOutput:
    logprobs: tuple[TokenLogprob, ...] = tuple(item for p in parts for item in p.logprobs or ())
    return dataclasses.replace(
        parts[-1],
        text="".join(p.text for p in parts),
        token_ids=tuple(i for p in parts for i in p.token_ids),
        logprobs=logprobs if any(p.logprobs is not None for p in parts) else None,
        text_offsets=tuple(offset for p in parts for offset in p.text_offsets),
    )


class _bar:
    """A progress bar on stderr, or nothing."""

    def __init__(self, count: int, shown: bool) -> None:
        self._count, self._shown = count, shown

    def __enter__(self) -> Any:
        if not self._shown:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True))
        self._progress.start()
        task = self._progress.add_task("requests", total=self._count)
        return lambda: self._progress.advance(task)

    def __exit__(self, *exc: object) -> None:
        if self._shown:
            self._progress.stop()
