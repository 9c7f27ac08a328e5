"""Detokenising as tokens come: exact, and at a cost that does not grow with the text."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from itertools import accumulate

_REPLACEMENT = "\ufffd"


class ByteDetokenizer:
    """Text of a vocabulary whose tokens are byte strings (byte-level BPE).

    Same interface as IncrementalDetokenizer. A character comes out with its last byte; bytes that are no UTF-8 come out
    as U+FFFD as soon as that is certain.
    """

    held = ""

    def __init__(self, bytes_of: Callable[[int], bytes], context: Sequence[int] = ()) -> None:
        """bytes_of: the bytes a token adds to the text, none if it is skipped. context: ids before the first one."""
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0
        self._starts: list[int] = []
        tail = b""
        for token_id in reversed(context):
            tail = bytes_of(token_id) + tail
            if len(tail) >= 4:  # the longest character
                break
        self._utf8.decode(tail)
        self._inside = bool(self._utf8.getstate()[0])  # whether it has seen only a part of a character
        self._shown = _REPLACEMENT if self._inside else ""  # as the end of the context reads by itself

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens."""
        if len(token_ids) == 1:
            return self._push(token_ids[0])
        return "".join(map(self._push, token_ids))

    def _push(self, token_id: int) -> str:
        data = self._bytes_of(token_id)
        if data.isascii() and not self._inside:  # as most tokens are
            text = data.decode()
            self._starts.append(self._length)
            self._length += len(text)
            return text
        text = self._utf8.decode(data[:1])
        start = self._length + len(text)
        if data and not self._utf8.getstate()[0]:
            start -= 1  # the first byte is the end of a character, or one in itself
        text += self._utf8.decode(data[1:])
        self._inside = bool(self._utf8.getstate()[0])
        if text and self._shown:
            if text.startswith(self._shown):
                text, start = text.removeprefix(self._shown), max(0, start - len(self._shown))
            self._shown = ""
        self._starts.append(start)
        self._length += len(text)
        return text

    def finish(self) -> str:
        """What was held back."""
        text = self._utf8.decode(b"", final=True).removeprefix(self._shown)
        self._length += len(text)
        return text

    def take_starts(self) -> list[int]:
        """See IncrementalDetokenizer.take_starts."""
        starts, self._starts = self._starts, []
        return starts


class IncrementalDetokenizer:
    """The pieces that `push` and `finish` return add up to `decode` of all ids.

    With a context (the end of the prompt) they add up to what `decode` gives for both less what it gives for the
    context: the first word keeps its leading space. If the context ends inside a character that these ids complete, the
    whole character comes out.

    A run of byte tokens is decoded together, once it is over: a byte-fallback decoder (SentencePiece) makes
    U+FFFD of all of them if any is invalid. Every other token is decoded beside the one before it, since some decoders
    treat the first token of a text in another way.

    held: the whole characters in the unfinished run of byte tokens, which come out if it goes on as UTF-8; empty if it
    is invalid already.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        byte_of: Callable[[int], bytes | None] | None = None,
        skipped: Callable[[int], bool] = lambda token_id: False,
        context: Sequence[int] = (),
    ) -> None:
        """A stream of text from ids.

        Args:
            byte_of: the bytes of a token that may be a part of a character, None for a token that is text by itself;
                default: tokens that decode to U+FFFD may be.
            skipped: whether `decode` leaves a token out.
            context: ids before the first one.
        """
        self._decode, self._skipped = decode, skipped
        self._byte_of = byte_of or (lambda i: b"" if _REPLACEMENT in decode([i]) else None)
        self._last: list[int] = []
        self._last_text = ""
        self._length = 0
        self._starts: list[int] = []
        self._shown = ""  # the run that the context ends in, as it reads by itself
        self._begin_run()
        if context:
            self._begin_after(context)

    def _begin_run(self) -> None:
        self._run: list[int] = []
        self._data = bytearray()
        self._places: list[int] = []  # where in the run's data tokens begin
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._valid, self._text, self.held = True, "", ""

    def _begin_after(self, context: Sequence[int]) -> None:
        begin = len(context) - 1
        while begin > 0 and (self._skipped(context[begin]) or self._byte_of(context[begin]) is not None):
            begin -= 1
        self.push(context[begin:])
        self._shown = self._beside_last(self._run) if self._run else ""
        self._length, self._text, self.held = 0, "", ""
        self._starts.clear()
        self._places.clear()

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became final with these tokens."""
        text = []
        for token_id in token_ids:
            if self._skipped(token_id):
                if self._run:
                    self._places.append(len(self._data))
                else:
                    self._starts.append(self._length)
            elif (data := self._byte_of(token_id)) is not None:
                self._extend_run(token_id, data)
            else:
                text.append(self._end_run())
                self._starts.append(self._length)
                text.append(self._emit([token_id]))
        return "".join(text)

    def finish(self) -> str:
        """What was held back."""
        return self._end_run()

    def take_starts(self) -> list[int]:
        """Where tokens begin in the text, in characters, in their order.

        Of those not asked for yet whose text is final; tokens inside one character have its place.
        """
        starts, self._starts = self._starts, []
        return starts

    def _extend_run(self, token_id: int, data: bytes) -> None:
        self._run.append(token_id)
        self._places.append(len(self._data))
        self._data += data
        if self._valid:
            try:
                self._text += self._utf8.decode(data)
            except UnicodeDecodeError:
                self._valid = False
        self.held = self._text if self._valid else ""

    def _end_run(self) -> str:
        if not self._run:
            return ""
        begin, shown = self._length, self._shown
        text = self._emit(self._run)
        index = _character_indices(bytes(self._data))
        moved = len(shown) if text.startswith(shown) else 0
        text = text[moved:]
        self._length = begin + len(text)
        self._starts += [begin + min(max(0, index[place] - moved), len(text)) for place in self._places]
        self._shown = ""
        self._begin_run()
        return text

    def _emit(self, token_ids: list[int]) -> str:
        text = self._beside_last(token_ids)
        self._last = token_ids[-1:]
        self._last_text = self._decode(self._last)
        self._length += len(text)
        return text

    def _beside_last(self, token_ids: list[int]) -> str:
        return self._decode(self._last + token_ids)[len(self._last_text) :]


def _character_indices(data: bytes) -> list[int]:
    """For each byte, the index of the character of the text that it belongs to; one more for the end.

    For a byte-fallback decoder.
    """
    try:
        characters = len(data.decode())
    except UnicodeDecodeError:
        return list(range(len(data) + 1))
    return [n - 1 for n in accumulate(byte & 0xC0 != 0x80 for byte in data)] + [characters]
