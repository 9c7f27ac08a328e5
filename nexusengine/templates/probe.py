"""Finds out which forms of messages a template takes, by rendering small chats with it, as llama.cpp's Minja does.

A template that loops over the parts of a content writes nothing for a string, and one that wants a string writes a
list's repr, or fails. Reading the template (vLLM walks its syntax tree for loops over `message.content`) tells less: it
misses what macros, filters and aliases do, and does not know of a template that takes both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes

from nexusengine.errors import InvalidRequest
from nexusengine.templates.messages import Form, Forms
from nexusengine.templates.pool import LimitMet

Chat = list[dict[str, Any]]
Render = Callable[[Chat, list[Any] | None], str]
_FIRST, _SECOND, _KEY = "7351982", "4620817", "k5029374"  # digits, which no filter for upper or title case changes
_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}


def probe(render: Render, tree: nodes.Template, source: str) -> Forms:
    """Find out what forms of messages a template takes, by rendering some.

    Args:
        render: called with (messages, tools), returns what the template makes of them; raises InvalidRequest where it
            refuses or fails.

    Raises:
        LimitMet: a rendering took too much time or memory.
    """
    user = _form(render, _user_chats) or Form.TEXT

    def say(role: str, text: str, **more: Any) -> dict[str, Any]:
        """A message that is there for the sake of the chat's order."""
        plain = user in (Form.GIVEN, Form.TEXT)
        return {"role": role, "content": text if plain else [{"type": "text", "text": text}], **more}

    def system(content: Any) -> Iterator[Chat]:
        yield [{"role": "system", "content": content}, say("user", "a")]

    def assistant(content: Any) -> Iterator[Chat]:
        yield [say("user", "a"), {"role": "assistant", "content": content}, say("user", "b")]
        yield [say("user", "a"), {"role": "assistant", "content": content}]

    def tool(content: Any) -> Iterator[Chat]:
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
        asked = say("assistant", "", tool_calls=[call])
        yield [say("user", "a"), asked, {"role": "tool", "tool_call_id": "call00001", "content": content}]
        yield [say("user", "a"), {"role": "tool", "content": content}]

    found = {
        role: _form(render, chats) for role, chats in (("system", system), ("assistant", assistant), ("tool", tool))
    }
    return Forms(
        content={"user": user, **{role: form for role, form in found.items() if form is not None}},
        user=user,
        null_content=_asks_for_null(tree),
        arguments_as_object=_arguments_as_object(render, say),
        developer="developer" in source,
    )


def _user_chats(content: Any) -> Iterator[Chat]:
    message = {"role": "user", "content": content}
    yield [message]
    for text in ("a", [{"type": "text", "text": "a"}]):
        yield [{"role": "system", "content": text}, message]
        yield [message, {"role": "assistant", "content": text}]


def _form(render: Render, chats: Callable[[Any], Iterator[Chat]]) -> Form | None:
    """The form in which a text reaches the prompt; None if it does not in any."""
    first, second = {"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}
    text = _shows(render, chats(_FIRST), _FIRST)
    parts = _shows(render, chats([first, second]), _FIRST, _SECOND)
    if text:
        return Form.GIVEN if parts else Form.TEXT
    if parts:
        return Form.PARTS
    return Form.PART if _shows(render, chats([first]), _FIRST) else None


def _shows(render: Render, chats: Iterator[Chat], *texts: str) -> bool:
    """Whether the prompt of the first chat that is not refused has the texts, and not as the repr of their parts."""
    written = _first_rendered(render, chats)
    return all(t in written and not re.search(rf"text\\*['\"]:\s*\\*['\"]{t}", written) for t in texts)


def _first_rendered(render: Render, chats: Iterator[Chat]) -> str:
    for chat in chats:
        for tools in (None, [_TOOL]):
            try:
                return render(chat, tools)
            except LimitMet:
                raise
            except InvalidRequest:
                continue
    return ""


def _arguments_as_object(render: Render, say: Callable[..., dict[str, Any]]) -> bool:
    """Whether a tool call's arguments reach the prompt as an object, and as JSON text not at all or quoted twice."""

    def chats(arguments: Any) -> Iterator[Chat]:
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": arguments}}
        answer = say("tool", "b", tool_call_id="call00001")
        for asked in (
            say("assistant", "", tool_calls=[call]),
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ):
            yield [say("user", "a"), asked, answer]
            yield [say("user", "a"), asked]

    def shows(arguments: Any) -> bool:
        written = _first_rendered(render, chats(arguments))
        return _KEY in written and f'\\"{_KEY}' not in written

    return not shows(f'{{"{_KEY}": "{_FIRST}"}}') and shows({_KEY: _FIRST})


def _asks_for_null(tree: nodes.Template) -> bool:
    """Whether the template asks if a content is none. One that does not would print "None"."""
    asked: list[nodes.Expr] = [test.node for test in tree.find_all(nodes.Test) if test.name == "none"]
    for comparison in tree.find_all(nodes.Compare):
        sides = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if any(isinstance(side, nodes.Const) and side.value is None for side in sides):
            asked += sides
    return any(_is_about_content(node) for expr in asked for node in [expr, *expr.find_all(nodes.Node)])


def _is_about_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Name):
        return "content" in node.name
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Const) and node.value == "content"
