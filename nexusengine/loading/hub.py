"""Downloading from the Hugging Face hub. Only safetensors, configuration and tokenizer files are taken: no code, no
pickles. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by the hub library itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError

_SMALL = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]
_NOT = ["original/*", "*/*"]


def download(repository: str, revision: str | None, weights: bool, report: Callable[[str, float], None]) -> Path:
    """The local directory of a repository's snapshot; what is there already is not fetched again.

    Raises ModelLoadError with one sentence that says what to do.
    """
    from httpx import HTTPError
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    where = repository + (f" at revision {revision}" if revision else "")
    report(f"downloading {repository}", 0.0)
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_SMALL + (_WEIGHTS if weights else []),
                ignore_patterns=_NOT,
                tqdm_class=_progress_bar(repository, report),
            )
        )
    except hub.GatedRepoError:
        raise ModelLoadError(
            f"{where} needs its licence accepted: do that on its page at the hub, then set HF_TOKEN to a token of yours"
        ) from None
    except hub.RevisionNotFoundError:
        raise ModelLoadError(f"repository {repository} has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise ModelLoadError(
            f"there is no repository {repository} at the hub, or it is private; if it is, set HF_TOKEN"
        ) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise ModelLoadError(
            f"{where} is not on this machine and the hub cannot be reached; connect, or name a local directory"
        ) from None
    except hub.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = "HF_TOKEN is missing, wrong or expired" if status in (401, 403) else f"HTTP status {status}"
        raise ModelLoadError(f"the hub refused {where}: {reason}") from None
    except (HTTPError, OSError) as error:
        raise ModelLoadError(f"downloading {where} failed: {error}") from None


def _progress_bar(repository: str, report: Callable[[str, float], None]) -> type:
    """A tqdm class that also tells `report` which share of the bytes has arrived."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    arrived = 0.0

    class Bar(tqdm):
        """Counts for itself: a bar that is not shown, because stderr is no terminal, does not count at all."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._of_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal arrived
            if self._of_bytes:
                with lock:
                    arrived += n or 0
                    done = arrived / self.total if self.total else 0.0
                report(f"downloading {repository}", min(done, 1.0))
            shown: bool | None = super().update(n)
            return shown

    return Bar
