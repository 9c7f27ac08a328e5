"""Generated chats render as transformers renders them, or both refuse.

NEXUSENGINE_CHATS sets how many (600 by default); each has a seed of its own, which a failure names.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from nexusengine.errors import InvalidRequest
from nexusengine.tokenize.chat_template import ChatTemplate
from tests.golden.chat_templates import CASES, Case
from tests.golden.generated_chats import Chat, draw

CHATS = int(os.environ.get("NEXUSENGINE_CHATS", "600"))
REFUSED = "(refused)"


def their_tokenizer(case: Case) -> transformers.PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **case.tokens)
    tokenizer.chat_template = dict(case.source) if not isinstance(case.source, str) else case.source
    return tokenizer


def in_their_form(case: Case, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a caller of transformers would pass for this template, in the places where we convert for them."""
    return [_in_their_form(case, copy.deepcopy(message)) for message in messages]


def _in_their_form(case: Case, message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "developer" and not case.developer:
        message["role"] = "system"
    form, content = case.form(message["role"]), message.get("content")
    if form == "text" and isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    if form == "parts" and isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    for call in message.get("tool_calls", ()):
        if case.arguments_as_object and isinstance(call["function"]["arguments"], str):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def theirs(case: Case, tokenizer: transformers.PreTrainedTokenizerFast, chat: Chat) -> str:
    messages = in_their_form(case, chat.messages)
    options: dict[str, Any] = {
        "tools": chat.tools,
        "documents": chat.documents,
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        **chat.variables,
    }
    try:
        if case.null:  # apply_chat_template drops a null content, and so what such a template asks for
            kept = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
            source = tokenizer.get_chat_template(None, chat.tools)
            variables = {**tokenizer.special_tokens_map, **options}
            rendered = render_jinja_template([kept], chat_template=source, **variables)[0]
            return str(rendered[0])
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception:  # whatever a template raises
        return REFUSED


def ours(template: ChatTemplate, chat: Chat) -> str:
    try:
        return template.render(
            chat.messages,
            tools=chat.tools,
            documents=chat.documents,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            **chat.variables,
        )
    except InvalidRequest:
        return REFUSED


def seeds(case: Case) -> Iterator[int]:
    place = CASES.index(case)
    return iter(range(place, CHATS, len(CASES)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generated_chats_render_as_in_transformers(case: Case, record_property: Any) -> None:
    tokenizer, template = their_tokenizer(case), ChatTemplate(case.source, case.tokens, case.name)
    outcomes: Counter[str] = Counter()
    for seed in seeds(case):
        chat = draw(random.Random(seed), case)
        expected = theirs(case, tokenizer, chat)
        assert ours(template, chat) == expected, f"{case.name}, seed {seed}: {chat}"
        outcomes["refused" if expected == REFUSED else "rendered"] += 1
    record_property("outcomes", dict(outcomes))
    assert outcomes["rendered"] > 0, outcomes
