"""Detokenising as tokens come, at a cost that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_WINDOW, _CONTEXT = 16, 4


class IncrementalDetokenizer:
    """The pieces that `push` and `finish` return add up to `decode` of all ids.

    Text is given out once it is final: a character whose bytes are not all there (it decodes to U+FFFD at the end) is
    held back. Only a window of the newest tokens is decoded; it is cut back to a few tokens of context, which some
    decoders need to place spaces, whenever it ends in a whole character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._sent = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens."""
        if not token_ids:
            return ""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        whole = not text.endswith(_REPLACEMENT)
        final = text if whole else text[:-1]
        news = final[self._sent :]
        self._sent = max(self._sent, len(final))
        if whole and len(self._window) > _WINDOW:
            self._window = self._window[-_CONTEXT:]
            self._sent = len(self._decode(self._window))
        return news

    def finish(self) -> str:
        """What was held back."""
        text = self._decode(self._window)
        news, self._sent = text[self._sent :], len(text)
        return news
