"""What each token adds to a text: the bytes behind a token id, which decoding it alone does not give."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"


class Token(NamedTuple):
    """A token of the vocabulary.

    Attributes:
        text: with its leading space; bytes that are no UTF-8 as `\\xf0\\x9f`, as OpenAI writes them.
        data: its bytes.
        byte: data if a byte-fallback decoder joins it with its neighbours, else None.
        exists: whether the id has a token.
    """

    text: str
    data: bytes
    byte: bytes | None
    special: bool
    exists: bool


class Vocabulary:
    """The tokens of a `tokenizers.Tokenizer` by id, each worked out once.

    byte_level: whether tokens are byte strings in GPT-2's alphabet, so that a text is what their bytes say, joined.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend, self._decoder = backend, backend.decoder
        kinds = _kinds(json.loads(self._decoder.__getstate__())) if self._decoder is not None else []
        self.byte_level = [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]
        self._bytes_in_alphabet = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._token = lru_cache(maxsize=max(1, backend.get_vocab_size()))(self._find)

    def token(self, token_id: int) -> Token:
        """An id without a token (a model's embedding may be padded) has no text, as in the library's `decode`."""
        return self._token(token_id)

    def _find(self, token_id: int) -> Token:
        name = self._backend.id_to_token(token_id)
        if name is None:
            return Token("", b"", None, False, False)
        special = token_id in self._added and self._is_left_out(token_id)
        if self._bytes_in_alphabet:
            data = _alphabet_bytes(name)
            return Token(printable(data), data, None if _is_text(data) else data, special, True)
        if self._byte_fallback and (match := _BYTE.fullmatch(name)):
            data = bytes.fromhex(match[1])
            return Token(printable(data), data, data, special, True)
        text = name if self._decoder is None else self._decoder.decode([_ANCHOR, name]).removeprefix(_ANCHOR)
        return Token(text, text.encode(), None, special, True)

    def _is_left_out(self, token_id: int) -> bool:
        """Asked of the library, whose AddedToken.special is out of date for a token that was added twice."""
        whole, shortened = (self._backend.decode([token_id], skip_special_tokens=skip) for skip in (False, True))
        return bool(whole) and not shortened


def printable(data: bytes) -> str:
    """The text that `data` is; if it is none, its ASCII with `\\xf0` for every other byte."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return escaped(data)


def escaped(data: bytes) -> str:
    """Printable ASCII as it is, `\\xf0` for every other byte and for a backslash."""
    return "".join(chr(b) if 0x20 <= b < 0x7F and b != 0x5C else f"\\x{b:02x}" for b in data)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _kinds(decoder: dict[str, Any]) -> list[str]:
    """The types of a decoder's parts, in order."""
    if decoder["type"] == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _kinds(part)]
    return [decoder["type"]]


def _alphabet() -> dict[str, int]:
    """GPT-2's character -> byte: printable Latin-1 stands for itself, other bytes for characters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(others)}


_ALPHABET = _alphabet()


def _alphabet_bytes(name: str) -> bytes:
    """A name with a character outside the alphabet (an added token) is text itself, as in the library."""
    try:
        return bytes([_ALPHABET[char] for char in name])
    except KeyError:
        return name.encode()
