"""Chat templates: Jinja in a sandbox, with the settings and functions that published templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nexusengine.errors import InvalidRequest, ModelLoadError

Message = Mapping[str, Any]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """A compiled template. Raises ModelLoadError if it is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"{where}: the chat template is not valid: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Raises InvalidRequest with what the template says is wrong with the messages."""
        try:
            return self._template.render(
                messages=[_joined(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **extra,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None


def _joined(message: Message) -> dict[str, Any]:
    """The message with a list of text parts joined into one string, which is what templates expect."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"a message is an object with role and content, got {message!r}", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InvalidRequest("only text parts are supported in a message's content", param="messages")
        content = "".join(part["text"] for part in content)
    return {**message, "content": content or ""}
