"""Parsers of settings: text in, value out. A ValueError's message is shown to the user."""

from __future__ import annotations

import re
from collections.abc import Callable


def parse_bytes(text: str | int) -> int:
    """`2GiB`, `500M`, `1.5G`, `1048576`: bytes, at least 1. K, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 2GiB or 500M")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    size = int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
    if size < 1:
        raise ValueError(f"{text!r} is no memory at all")
    return size


def parse_bool(text: str | bool) -> bool:
    if isinstance(text, bool):
        return text
    if str(text).lower() in {"1", "true", "yes", "on"}:
        return True
    if str(text).lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str | int], int]:
    """Parser of whole numbers in [low, high]."""

    def parse(text: str | int) -> int:
        try:
            value = int(str(text))
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"{value} is not between {low} and {high}")
        return value

    return parse


def seconds(low: float, high: float = 86_400.0) -> Callable[[str | float], float]:
    """Parser of durations in seconds in [low, high]."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number of seconds") from None
        if not low <= value <= high:
            raise ValueError(f"{value} s is not between {low} and {high}")
        return value

    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    """Parser of one word out of several."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is none of {', '.join(choices)}")
        return text

    return parse


def parse_api_key(text: str) -> str:
    """A bearer token as an Authorization header can carry it: visible ASCII characters."""
    if not re.fullmatch(r"[!-~]+", text, re.ASCII):
        wrong = "it is empty" if not text else "it holds spaces or characters that are not ASCII"
        raise ValueError(f"this API key cannot be sent in a header: {wrong}; leave the setting out to ask for none")
    return text


def parse_origins(text: str) -> str:
    """`*`, or origins as browsers send them, separated by commas: https://example.org,http://localhost:3000."""
    origins = [word.strip() for word in text.split(",")]
    wrong = [o for o in origins if o != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,?#]+|null", o)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no origin; write *, or scheme://host:port without a path")
    return ",".join(origins)


def parse_trace_file(text: str) -> str:
    """The name of a trace to be written: *.jsonl, by which those who read traces know what it is."""
    if not str(text).endswith(".jsonl") or str(text).endswith("/.jsonl") or text == ".jsonl":
        raise ValueError(f"{text!r} does not end in .jsonl, as the name of a trace does")
    return str(text)


def parse_secret(text: str) -> str:
    """A secret that cannot be guessed by trying: at least 16 characters. Its value is in no message."""
    if len(str(text)) < 16:
        raise ValueError(f"a secret of {len(str(text))} characters could be guessed; take at least 16")
    return str(text)
