"""The chat template of a model: from messages to the text of a prompt, as transformers' apply_chat_template does it.

What differs from it, on purpose: a text reaches the prompt also where a template takes parts and got a string, or the
other way round; the JSON text of a tool call's arguments becomes an object for templates that need one; a `content` of
null stays null for a template that asks for that; "developer" is "system" for a template that does not know it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from nexusengine.errors import InvalidRequest, ModelLoadError
from nexusengine.templates.environment import make_environment
from nexusengine.templates.messages import Forms, cut_at_mark, mark_end, plain, prepared
from nexusengine.templates.pool import LimitMet, RenderPool
from nexusengine.templates.probe import Chat, probe

Message = Mapping[str, Any]
_OWN = ("messages", "add_generation_prompt", "continue_final_message", "chat_template")


class ChatTemplate:
    """A template, or several by their names ("default", "tool_use", "rag"). Any thread may render.

    special_tokens: texts by name ("bos_token"); those that are None are undefined in the template. where: the file, for
    messages. Nothing of the template runs in this process: see nexusengine.templates. Raises ModelLoadError if a
    template is not valid Jinja, or there are several and none is the default.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str | None], where: str) -> None:
        self._sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in self._sources:
            names = ", ".join(sorted(self._sources))
            raise ModelLoadError(f"{where}: there are chat templates called {names}, but none called default")
        environment = make_environment()
        for name, text in self._sources.items():
            called = "the chat template" if name == "default" else f"the chat template {name!r}"
            try:
                environment.compile(text)
            except (jinja2.TemplateError, SyntaxError, ValueError) as error:
                raise ModelLoadError(f"{where}: {called} is not valid: {error}") from None
            except (RecursionError, MemoryError):
                raise ModelLoadError(f"{where}: {called} is nested too deeply") from None
        self._special_tokens = {name: text for name, text in special_tokens.items() if text is not None}
        self._pool = RenderPool()
        self._forms: dict[str, Forms] = {}
        self._probing = threading.Lock()

    def prepare(self) -> None:
        """Do now what the first rendering would have to wait for (0.2 s).

        Start a process, and find out what the template takes.
        """
        self._forms_of("default")

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt. Blocks for as long as it takes, which is limited: see nexusengine.templates.pool.

        add_generation_prompt: whether the prompt ends where an assistant's message begins; default: yes, unless the
        last message is continued. continue_final_message: whether it ends where the last message's text ends.
        tools, documents: as in transformers; with tools, a template called "tool_use" is taken if there is one.
        variables: whatever else the template reads (`enable_thinking`); they come before special tokens.
        Raises InvalidRequest with what is wrong with the messages, says the template or a limit.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other: a prompt ends in the last "
                "message or after it",
                param="continue_final_message",
            )
        given: dict[str, Any] = {"tools": _objects(tools, "tools"), "documents": _objects(documents, "documents")}
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        source, chat = self._sources[name], prepared(messages, self._forms_of(name))
        given["add_generation_prompt"] = (
            not continue_final_message if add_generation_prompt is None else add_generation_prompt
        )
        given |= plain(variables, "chat_template_kwargs")
        if not continue_final_message:
            return self._render(source, chat, given)
        text = mark_end(chat, source)
        return cut_at_mark(self._render(source, chat, given), text)

    def close(self) -> None:
        """End the processes that are idle; a later rendering starts new ones."""
        self._pool.close()

    def _render(self, source: str, chat: Chat, variables: Mapping[str, Any]) -> str:
        return self._pool.render(source, {**self._special_tokens, **variables}, chat)

    def _forms_of(self, name: str) -> Forms:
        with self._probing:
            if name not in self._forms:
                source = self._sources[name]
                tree = make_environment().parse(source)

                def render(chat: Chat, tools: list[Any] | None) -> str:
                    return self._render(
                        source, chat, {"tools": tools, "documents": None, "add_generation_prompt": False}
                    )

                try:
                    self._forms[name] = probe(render, tree, source)
                except LimitMet:  # it will meet it again
                    self._forms[name] = Forms()
            return self._forms[name]


def check_template_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """A request's chat_template_kwargs. Raises InvalidRequest for names that are arguments, not variables."""
    wrong = next((name for name in _OWN if name in variables), None)
    if wrong is not None:
        raise InvalidRequest(
            f"chat_template_kwargs cannot hold {wrong!r}, which is a field of the request", param="chat_template_kwargs"
        )
    return variables


def _objects(values: Sequence[Mapping[str, Any]] | None, name: str) -> list[Any] | None:
    """Raises InvalidRequest if it is not a list of objects."""
    if values is None:
        return None
    if not isinstance(values, list | tuple) or not all(isinstance(v, Mapping) for v in values):
        raise InvalidRequest(f"{name} must be a list of objects", param=name)
    return list(plain(values, name))
