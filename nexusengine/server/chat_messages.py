"""The part of a chat request's body that the model's chat template reads: messages and the template's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from nexusengine.errors import InvalidRequest
from nexusengine.tokenize.chat_template import check_template_variables

T = TypeVar("T")
_List = Annotated[list[T], Field(fail_fast=True)]


class ChatMessage(BaseModel):
    """A message of a conversation.

    Further keys (name, tool_calls, tool_call_id, ...) are passed to the model's chat template, which is also where the
    parts of a content are checked.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | _List[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as the object that chat templates read. Raises InvalidRequest for one without content."""
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(f"a message of role {self.role!r} needs content", param="messages")
        message = {"role": self.role, "content": self.content, **(self.model_extra or {})}
        if message.get("tool_calls") == []:  # clients send back the replies of servers that write an empty list
            del message["tool_calls"]
        return message


class TemplateOptions(BaseModel):
    """Fields beside the messages; see ChatTemplate.render."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: _List[dict[str, Any]] | None = None

    def template_options(self) -> Mapping[str, Any]:
        """Arguments of ChatTemplate.render. Raises InvalidRequest."""
        own = {
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": bool(self.continue_final_message),
            "documents": self.documents,
        }
        return {**own, **check_template_variables(self.chat_template_kwargs or {})}


def in_template_form(messages: Sequence[ChatMessage]) -> Callable[[], list[dict[str, Any]]]:
    """A function that makes them ready for the template: there can be hundreds of thousands, so call it in a thread."""
    return lambda: [message.for_template() for message in messages]
