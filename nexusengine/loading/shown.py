"""Values from a model's files as errors show them: on one line, and cut where they are far too long."""

from __future__ import annotations

from typing import Any

_MOST = 300


def one_line(text: str) -> str:
    """A text with `?` for what cannot be printed."""
    cut = text if len(text) <= _MOST else text[:_MOST] + "..."
    return "".join(c if c.isprintable() else "?" for c in cut)


def short(value: Any) -> str:
    """A value in Python's spelling."""
    try:
        return one_line(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"a {type(value).__name__} that is too large to show"


def word(value: Any) -> str:
    """As `short`, a string without quotes."""
    return one_line(value) if isinstance(value, str) else short(value)
