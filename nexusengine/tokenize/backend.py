"""What the tokenizers library raises, as ModelLoadError; and a trial of what it has loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tokenizers

from nexusengine.errors import ModelLoadError

_SAMPLE = "Hello, world 1\n\t\u4e2d\U0001f999"


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises inside into a ModelLoadError: `what` and the reason."""
    try:
        yield
    except BaseException as error:  # the library raises bare Exception; its panics are not even that
        if isinstance(error, ModelLoadError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ModelLoadError(f"{what}: {' '.join(str(error).split())}") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def try_out(backend: tokenizers.Tokenizer, where: str) -> None:
    """Encode and decode a sample text: many defects show only then. Raises ModelLoadError."""
    with library_errors(f"{where} is not a usable tokenizer"):
        backend.decode(backend.encode(_SAMPLE).ids)
