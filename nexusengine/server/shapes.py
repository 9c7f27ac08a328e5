"""The two shapes of a reply: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from nexusengine.tokenize import Tokenizer
from nexusengine.types import TokenLogprob


class Shape(Protocol):
    """How a reply looks. text so far is passed where logprobs need offsets."""

    prefix: str
    object_name: str
    chunk_name: str

    def choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]: ...

    def delta(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]: ...

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def logprobs(self, tokenizer: Tokenizer, items: Sequence[TokenLogprob], offset: int) -> Any: ...


class ChatShape:
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

    def logprobs(self, tokenizer: Tokenizer, items: Sequence[TokenLogprob], offset: int) -> Any:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text = tokenizer.token_str(token_id)
            part_of_a_character = "\ufffd" in text
            return {
                "token": text,
                "logprob": logprob,
                "bytes": None if part_of_a_character else list(text.encode()),
            }

        content = [
            entry(i.token_id, i.logprob) | {"top_logprobs": [entry(token, value) for token, value in i.top]}
            for i in items
        ]
        return {"content": content, "refusal": None}


class TextShape:
    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    delta = choice

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def logprobs(self, tokenizer: Tokenizer, items: Sequence[TokenLogprob], offset: int) -> Any:
        texts = [tokenizer.token_str(i.token_id) for i in items]
        offsets = [offset + sum(map(len, texts[:k])) for k in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [i.logprob for i in items],
            "top_logprobs": [{tokenizer.token_str(t): value for t, value in i.top} for i in items],
            "text_offset": offsets,
        }
