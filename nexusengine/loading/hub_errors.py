"""What can go wrong between this machine and the Hugging Face hub, each as one sentence that says what to do.

The hub library raises what its HTTP client raises, and which client that is changes with its version. So no client is
named here: what the hub library has no class for is told by its own words.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from nexusengine.errors import ModelLoadError
from nexusengine.loading.shown import short

_ODD_ANSWER = (
    "the reply is not one of the Hugging Face hub, but perhaps a login page of this network or of a proxy; log in with "
    "a browser, or set HF_ENDPOINT"
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the hub library raises inside into a ModelLoadError of one sentence."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:  # the hub library passes on what its client, its store and the disk raise
        raise ModelLoadError(_sentence(error, repository, revision)) from error


def _sentence(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub import errors as hub

    where = repository + (f" at revision {revision}" if revision else "")
    if isinstance(error, hub.GatedRepoError):
        return (
            f"{where} needs its licence accepted: do that on its page at the hub, then set HF_TOKEN to a token of yours"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return f"repository {repository} has no revision {revision!r}"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"there is no repository {repository} at the hub, or it is private; if it is, set HF_TOKEN"
    if isinstance(error, hub.HFValidationError):
        return f"{short(repository)} is not the name of a repository at the hub (OWNER/NAME)"
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return _unreachable(error, repository, revision)
    if isinstance(error, hub.HfHubHTTPError):
        return f"the hub refused {where}: {_status(error)}"
    if isinstance(error, hub.FileMetadataError | ValueError | AssertionError | KeyError | TypeError):
        return f"downloading {where} failed: {_ODD_ANSWER}"
    if isinstance(error, OSError) and error.errno in _DISK:
        return (
            f"downloading {where} failed: {error.strerror}{_file(error)}; free some space, or set HF_HOME to a folder "
            "that has it, and start again: files that arrived whole are kept"
        )
    if isinstance(error, OSError) and error.errno in _DENIED:
        return (
            f"downloading {where} failed: {error.strerror}{_file(error)}; set HF_HOME to a folder that can be written"
        )
    return f"downloading {where} failed: {_first_line(error)}; start again: files that arrived whole are kept"


def _unreachable(error: Exception, repository: str, revision: str | None) -> str:
    """The hub library tries what is on the disk where the hub fails; why the hub did is the cause of its error."""
    from huggingface_hub import errors as hub

    where = repository + (f" at revision {revision}" if revision else "")
    cause = error.__cause__
    if isinstance(cause, hub.HfHubHTTPError | hub.FileMetadataError):
        return _sentence(cause, repository, revision)
    reason = f" ({_first_line(cause)})" if cause and not isinstance(cause, hub.OfflineModeIsEnabled) else ""
    return f"{where} is not on this machine and the hub cannot be reached{reason}; connect, or name a local directory"


def _status(error: Exception) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return "HF_TOKEN is missing, wrong or expired"
    if status == 429:
        after = response.headers.get("Retry-After") if response is not None else None
        wait = f"after {after} s" if after and after.isdigit() else "in a few minutes"
        return f"too many requests from this address (HTTP status 429); try again {wait}, or set HF_TOKEN"
    if isinstance(status, int) and status >= 500:
        return f"it has an internal error (HTTP status {status}); try again later"
    return f"HTTP status {status}"


def _file(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
