"""The checks of what a request's headers say of its body: JSON in UTF-8, not compressed."""

from __future__ import annotations

import re

from starlette.datastructures import Headers

from nexusengine.errors import UnsupportedMediaType

_JSON = re.compile(r"[\w.-]+/([\w.-]+\+)?json")
_CURLS_DEFAULT = "application/x-www-form-urlencoded"
_UTF_8 = {"utf-8", "utf8", "us-ascii", "ascii"}


def check_media(headers: Headers) -> None:
    """Accept JSON types, and from anything but a browser also none and the one that `curl -d` sends unasked.

    A browser lets any web page send those without asking the server first, and says so with an Origin header.
    Raises UnsupportedMediaType.
    """
    given = headers.get("content-type", "")
    media_type, *parameters = (part.strip().lower() for part in given.split(";"))
    unasked = media_type in ("", _CURLS_DEFAULT) and "origin" not in headers
    if not (unasked or _JSON.fullmatch(media_type)):
        shown = repr(given[:100]) if given else "missing"
        raise UnsupportedMediaType(f"the content type is {shown}; send JSON, as 'Content-Type: application/json'")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') not in _UTF_8:
            raise UnsupportedMediaType(f"the body's charset is {value[:40]!r}; send JSON in UTF-8")
    for name, plain in (("content-encoding", "identity"), ("transfer-encoding", "chunked")):
        encoding = headers.get(name, plain).strip()
        if encoding.lower() not in (plain, ""):
            raise UnsupportedMediaType(f"{name} {encoding[:40]!r} is not supported; send the body uncompressed")


def is_curls_default(headers: Headers) -> bool:
    """Whether the body is declared to be a form, as `curl -d` does whatever it sends."""
    return headers.get("content-type", "").lower().startswith(_CURLS_DEFAULT)
