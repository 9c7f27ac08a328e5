"""Messages as a template sees them: plain data, checked, in the form that the template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nexusengine.errors import InvalidRequest

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_VALUES = 100_000
_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "


class Form(Enum):
    """How a template takes the text of a message."""

    GIVEN = "a string, or a list of parts"
    TEXT = "a string"
    PARTS = "a list of parts"
    PART = "a list of which it reads the first part only"


@dataclass(frozen=True, slots=True)
class Forms:
    """The forms of messages that a template takes.

    content: the form of each role's text; user: that of roles not named there. null_content: whether the template asks
    if a content is none. arguments_as_object: whether the arguments of tool calls must be objects, not JSON text.
    developer: whether the template knows the role of that name.
    """

    content: Mapping[str, Form] = field(default_factory=dict)
    user: Form = Form.TEXT
    null_content: bool = False
    arguments_as_object: bool = False
    developer: bool = False


# ---- plain data -----------------------------------------------------------------------------------------------------


def plain(value: Any, where: str) -> Any:
    """A copy made of None, bool, int, float, str, list, tuple and dict alone. Raises InvalidRequest."""
    try:
        return _plain(value, where, [_MAX_VALUES])
    except RecursionError:
        raise InvalidRequest(f"{where} is nested too deeply", param=where.split(".")[0]) from None


def _plain(value: Any, where: str, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise InvalidRequest(f"{where} holds more than {_MAX_VALUES} values", param=where.split(".")[0])
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where, left): _plain(item, where, left) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, where, left) for item in value]
        return items if isinstance(value, list) else tuple(items)
    for base in (str, int, float):  # enums and other subclasses
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    raise InvalidRequest(f"{where} holds a {type(value).__name__}, which is no JSON value", param=where.split(".")[0])


# ---- one message ----------------------------------------------------------------------------------------------------


def prepared(messages: Sequence[Any], forms: Forms) -> list[dict[str, Any]]:
    """Copies of the messages in the form that the template takes. Raises InvalidRequest naming the message."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            f"messages must be a list, each of them an object with role and content, got {messages!r:.200}",
            param="messages",
        )
    if not messages:
        raise InvalidRequest("messages is empty; a chat has at least one of them", param="messages")
    return [_prepared(message, forms, f"messages.{i}") for i, message in enumerate(messages)]


def _prepared(message: Any, forms: Forms, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} must be an object with role and content, got {message!r:.200}", param="messages")
    null = "content" if forms.null_content else None
    made: dict[str, Any] = plain({k: v for k, v in message.items() if v is not None or k == null}, where)
    reasoning = next((made[name] for name in _REASONING if name in made), None)
    if reasoning is not None:  # under every name that templates read it by
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    if made.get("role") == "developer" and not forms.developer:
        made["role"] = "system"
    content = made.get("content")
    if isinstance(content, str | list):
        made["content"] = _content(content, forms.content.get(made.get("role", ""), forms.user), f"{where}.content")
    elif content is not None:
        raise InvalidRequest(f"{where}.content must be a string or a list of parts, got {content!r}", param="messages")
    if forms.arguments_as_object and isinstance(made.get("tool_calls"), list):
        for i, call in enumerate(made["tool_calls"]):
            _read_arguments(call, f"{where}.tool_calls.{i}.function.arguments")
    return made


def _content(content: str | list[Any], form: Form, where: str) -> str | list[Any]:
    if isinstance(content, str):
        return content if form in (Form.GIVEN, Form.TEXT) else [{"type": "text", "text": content}]
    parts = [_text_part(part, f"{where}.{i}") for i, part in enumerate(content)]
    if form in (Form.GIVEN, Form.PARTS):
        return parts
    text = "".join(part["text"] for part in parts)
    return text if form is Form.TEXT else [{"type": "text", "text": text}]


def _text_part(part: Any, where: str) -> dict[str, Any]:
    """Raises InvalidRequest naming the type of a part that is not text."""
    if isinstance(part, dict):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return part
        if kind == "refusal" and isinstance(part.get("refusal"), str):  # what an assistant said instead
            return {"type": "text", "text": part["refusal"]}
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise InvalidRequest(f"{where} is of type {kind!r}; only text parts are supported", param="messages")
    raise InvalidRequest(
        f'{where} must be {{"type": "text", "text": "..."}} (only text parts are supported), got {part!r:.200}',
        param="messages",
    )


def _read_arguments(call: Any, where: str) -> None:
    """Puts an object in the place of the JSON text that OpenAI's format has."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return
    try:
        value = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is not a JSON object: {function['arguments']!r:.200}", param="messages")
    function["arguments"] = value


# ---- continuing the last message ------------------------------------------------------------------------------------


def mark_end(messages: list[dict[str, Any]], source: str) -> str:
    """Mark where the last message's text ends; returns that text, for `cut_at_mark`. Raises InvalidRequest."""
    last, content = messages[-1], messages[-1].get("content")
    if content is None:
        raise _cannot_continue("the last message has no content")
    if "content" not in source:
        raise _cannot_continue("the chat template does not read the content of messages")
    if isinstance(content, str):
        last["content"] = content + _CONTINUE_HERE
        return content
    for part in reversed(content):
        text: str = part["text"]
        part["text"] = text + _CONTINUE_HERE
        return text
    raise _cannot_continue("the last message has no text")


def cut_at_mark(rendered: str, text: str) -> str:
    """`rendered` up to the end of the last message's text. Raises InvalidRequest if the template leaves it out."""
    place = rendered.rfind(_CONTINUE_HERE.strip())
    if place < 0 or text.strip() not in rendered:
        raise _cannot_continue("the chat template leaves out the last message, or a part of it")
    if rendered.startswith(_CONTINUE_HERE, place):
        return rendered[:place]
    return rendered[:place].rstrip()  # the template trims, so it would have trimmed what was before the mark


def _cannot_continue(reason: str) -> InvalidRequest:
    return InvalidRequest(f"continue_final_message: {reason}", param="continue_final_message")
