"""Reading files of a model with one sentence for whatever is wrong with them. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError

_LFS = b"version https://git-lfs.github.com/spec/"
_KINDS = (
    (_LFS, "is a git-lfs pointer and not the file itself; run `git lfs pull` in its folder"),
    (b"<!DOCTYPE", "is a web page; download the file again"),
    (b"<!doctype", "is a web page; download the file again"),
    (b"<html", "is a web page; download the file again"),
)


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is empty, a git-lfs pointer, or a web page that was saved in its place.

    Raises:
        ModelLoadError: it is one of these.
    """
    head = read_head(path)
    if not head:
        raise ModelLoadError(f"{path} is empty; download the file again")
    for beginning, what in _KINDS:
        if head.startswith(beginning):
            raise ModelLoadError(f"{path} {what}")


def read_head(path: Path, size: int = 64) -> bytes:
    """The first `size` bytes of a file.

    Raises:
        ModelLoadError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> ModelLoadError:
    """The sentence for a file that the system does not let us read."""
    return ModelLoadError(f"cannot read {path}: {error.strerror or error}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file in UTF-8.

    Raises:
        ModelLoadError: it is no such file.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from None
    except RecursionError:
        raise ModelLoadError(f"{path} is not usable: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return value
