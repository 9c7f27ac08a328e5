"""The two shapes of a reply: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from nexusengine.tokenize import Tokenizer
from nexusengine.types import TokenLogprob

_LOWEST = -9999.0
"""Written for anything less likely, as OpenAI does; JSON has no -inf."""


class Shape(Protocol):
    """How a reply looks.

    entry: the logprobs of one token, which begins at `offset` of the choice's text (characters), its big part encoded
    already. logprobs: what a choice holds of several of them.
    """

    prefix: str
    object_name: str
    chunk_name: str

    def choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]: ...

    def delta(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def entry(self, tokenizer: Tokenizer, item: TokenLogprob, offset: int) -> Any: ...

    def logprobs(self, entries: Sequence[Any]) -> dict[str, Any]: ...


class ChatShape:
    """Replies of chat completions.

    top_logprobs has as many entries as were asked for, the output token always among them: if it is not one of the most
    likely, it takes the last place.
    """

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def entry(self, tokenizer: Tokenizer, item: TokenLogprob, offset: int) -> msgspec.Raw:
        top = item.top
        if top and not _among(item):
            top = (*top[:-1], (item.token_id, item.logprob))
        entry = _alternative(tokenizer, item.token_id, item.logprob)
        entry["top_logprobs"] = [_alternative(tokenizer, token_id, logprob) for token_id, logprob in top]
        return msgspec.Raw(msgspec.json.encode(entry))

    def logprobs(self, entries: Sequence[msgspec.Raw]) -> dict[str, Any]:
        return {"content": entries, "refusal": None}


class TextEntry(NamedTuple):
    """One token in the lists of a text completion's logprobs."""

    token: str
    logprob: float
    top: msgspec.Raw
    offset: int


class TextShape:
    """top_logprobs holds the most likely tokens by their text, and the output token if it is not one of them.

    A token that is no text by itself (a part of a character) is called "bytes:\\xf0\\x9f", as OpenAI does, and so is
    one whose text another token at the same place has; if that is taken, too, "token_id:" and its id.
    """

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    delta = choice

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def entry(self, tokenizer: Tokenizer, item: TokenLogprob, offset: int) -> TextEntry:
        chosen = _name(tokenizer, item.token_id)
        top = item.top if _among(item) else (*item.top, (item.token_id, item.logprob))
        named: dict[str, float] = {}
        for token_id, logprob in top:
            name = chosen if token_id == item.token_id else _name(tokenizer, token_id)
            if name in named or (name == chosen and token_id != item.token_id):
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))
                if name in named or name == chosen:
                    name = f"token_id:{token_id}"
            named[name] = _finite(logprob)
        return TextEntry(chosen, _finite(item.logprob), msgspec.Raw(msgspec.json.encode(named)), offset)

    def logprobs(self, entries: Sequence[TextEntry]) -> dict[str, Any]:
        return {
            "tokens": [e.token for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [e.top for e in entries],
            "text_offset": [e.offset for e in entries],
        }


def _among(item: TokenLogprob) -> bool:
    """Whether the output token is one of the most likely."""
    return any(token_id == item.token_id for token_id, _ in item.top)


def _alternative(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    """bytes: null for an id without a token, which a model with a padded embedding may output."""
    data = tokenizer.token_bytes(token_id)
    return {
        "token": tokenizer.token_str(token_id),
        "logprob": _finite(logprob),
        "bytes": list(data) if data else None,
    }


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    text = tokenizer.token_str(token_id)
    return text if text.encode() == tokenizer.token_bytes(token_id) else f"bytes:{text}"


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
