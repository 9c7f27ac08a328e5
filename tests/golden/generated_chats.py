"""Chats drawn at random: roles in and out of turn, strings, parts, null, tool calls, names, reasoning, documents."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.golden.chat_templates import Case

WORDS = (
    *(
        "hello",
        "Grüße",
        "🦙",
        "日本語",
        "a\nb",
        "{{ x }}",
        "{% if %}",
        "<b>&amp;</b>",
        "'quoted'",
        '"double"',
        "\\",
        "\t",
    ),
    *("<|im_end|>", "</think>", "<think>", "\u200b", "é", "I", "ß", "0", "-1.5", "None", "  ", "\r\n", "ǆ", "%s"),
)


@dataclass(frozen=True)
class Chat:
    """What a template is rendered with. variables: template variables beside tools and documents."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    variables: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool


def draw(rng: random.Random, case: Case) -> Chat:
    """A chat for a template. Everything comes from `rng`."""
    messages = _messages(rng)
    continued = rng.random() < 0.12
    return Chat(
        messages,
        tools=_tools(rng) if rng.random() < 0.3 else None,
        documents=[_document(rng) for _ in range(rng.randrange(3))] if rng.random() < 0.2 else None,
        variables={name: rng.choice(values) for name, values in case.variables.items() if rng.random() < 0.4},
        add_generation_prompt=not continued and rng.random() < 0.7,
        continue_final_message=continued,
    )


def _text(rng: random.Random) -> str:
    if rng.random() < 0.08:
        return rng.choice(["", " ", "\n"])
    text = rng.choice(["", " "]).join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
    return f" {text}\n" if rng.random() < 0.2 else text


def _content(rng: random.Random) -> str | list[dict[str, str]]:
    if rng.random() < 0.75:
        return _text(rng)
    return [{"type": "text", "text": _text(rng)} for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 2 else 5)
    if kind == 5:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {rng.choice(WORDS): _value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return (None, rng.randrange(-99, 10**20), rng.random(), rng.random() < 0.5, _text(rng))[kind]


def _call(rng: random.Random, as_text: bool) -> dict[str, Any]:
    arguments = {rng.choice(["city", "größe", "n", "a b"]): _value(rng) for _ in range(rng.randrange(3))}
    call = {
        "id": rng.choice(["call00001", "abcdefghi", "short"]),
        "type": "function",
        "function": {
            "name": rng.choice(["look", "find_it"]),
            "arguments": json.dumps(arguments) if as_text else arguments,
        },
    }
    if rng.random() < 0.1:
        del call["id"]
    return call


def _assistant(rng: random.Random) -> list[dict[str, Any]]:
    """An assistant's message, and the answers to its calls."""
    message: dict[str, Any] = {"role": "assistant", "content": _content(rng)}
    if rng.random() < 0.15:
        message[rng.choice(["reasoning_content", "thinking", "reasoning"])] = rng.choice([_text(rng), None])
    if rng.random() < 0.7:
        return [message]
    as_text = rng.random() < 0.6
    message["tool_calls"] = [_call(rng, as_text) for _ in range(rng.choice([1, 1, 1, 2]))]
    message["content"] = rng.choice([None, None, "", _text(rng)])
    if rng.random() < 0.1:
        del message["content"]
    answers = []
    for call in message["tool_calls"]:
        answer = {"role": rng.choice(["tool", "tool", "tool", "function"]), "content": _content(rng)}
        if "id" in call and rng.random() < 0.9:
            answer["tool_call_id"] = call["id"]
        if rng.random() < 0.3:
            answer["name"] = call["function"]["name"]
        answers.append(answer)
    return [message, *answers[: rng.choice([1, 2, 2])]]


def _messages(rng: random.Random) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.45:
        messages.append({"role": rng.choice(["system", "system", "developer"]), "content": _content(rng)})
    for _ in range(rng.randrange(1, 4)):
        user: dict[str, Any] = {"role": "user", "content": _content(rng)}
        if rng.random() < 0.1:
            user["name"] = rng.choice(["Ada", None, "ü"])
        messages.append(user)
        messages += _assistant(rng)
    if rng.random() < 0.6:
        messages.append({"role": "user", "content": _content(rng)})
    if rng.random() < 0.1:
        rng.shuffle(messages)
    if rng.random() < 0.05:
        messages = [{"role": rng.choice(["user", "assistant", "tool", "critic"]), "content": _text(rng)}]
    return messages


def _tools(rng: random.Random) -> list[dict[str, Any]]:
    kinds = ["string", "integer", "array", ["string", "null"]]

    def tool(name: str) -> dict[str, Any]:
        properties = {
            key: {"type": kind, "items": {"type": "string"}}
            if (kind := rng.choice(kinds)) == "array"
            else {"type": kind}
            for key in ("city", "größe", "n")[: rng.randrange(4)]
        }
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": name, "description": _text(rng), "parameters": parameters}}

    return [tool(name) for name in ("look", "find_it")[: rng.randrange(3)]]


def _document(rng: random.Random) -> dict[str, Any]:
    return {"title": _text(rng), "text": _text(rng)}
