"""Downloading from the Hugging Face hub.

Only safetensors, GGUF, configuration and tokenizer files are taken: no code, no pickles, and of weights only the files
that the checkpoint is made of. The hub library itself honours HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE,
and resumes a download that was cut.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.gguf_names import choose
from nexusengine.loading.hub_errors import explained
from nexusengine.loading.safetensors_file import INDEX, SINGLE, indexed_files

_SMALL = ["*.json", "*.jinja", "tokenizer.model"]
_NOT = ["*/*"]

Report = Callable[[str, float], None]


def download(repository: str, revision: str | None, weights: bool, report: Report, quantisation: str = "") -> Path:
    """Download what a repository's model is made of; what is there already is not fetched again.

    quantisation: of a repository of GGUF files, the one to take (`Q4_K_M`). weights=False: without the weights, where
    there is a config.json.
    Returns the local directory of the snapshot, or the GGUF file (the first, if it is split).
    Raises ModelLoadError with one sentence that says what to do.
    """
    report(f"downloading {repository}", 0.0)
    with explained(repository, revision):
        folder = _fetch(repository, revision, _SMALL, report, ignore=_NOT)
        if not quantisation and (folder / "config.json").is_file():
            if weights:
                _fetch_safetensors(repository, revision, folder, report)
            return folder
        return _fetch_gguf(repository, revision, folder, quantisation, report)


def _fetch(
    repository: str, revision: str | None, patterns: list[str], report: Report, ignore: list[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    bar = _progress_bar(repository, report)
    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignore, tqdm_class=bar
        )
    )


def _fetch_safetensors(repository: str, revision: str | None, folder: Path, report: Report) -> None:
    """model.safetensors where there is one, else what the index names: as transformers chooses."""
    names = _listed(repository, revision, folder)
    if SINGLE in names:
        wanted = [SINGLE]
    elif INDEX in names:
        wanted = indexed_files(folder / INDEX)
    elif any(name.endswith(".gguf") for name in names):
        raise ModelLoadError(
            f"{repository} has a config.json but no {SINGLE}; of its GGUF files, name one by its quantisation: "
            f"{repository}:{choose(names, '', repository).quantisation}"
        )
    else:
        other = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth")))
        raise ModelLoadError(
            f"{repository} has neither {SINGLE} nor {INDEX}" + (f"; its weights are in {', '.join(other[:5])}, which "
            "are not read" if other else "")
        )  # fmt: skip
    _fetch(repository, revision, [glob.escape(name) for name in wanted], report)


def _fetch_gguf(repository: str, revision: str | None, folder: Path, quantisation: str, report: Report) -> Path:
    names = _listed(repository, revision, folder)
    if not quantisation and not any(name.endswith(".gguf") for name in names):
        raise ModelLoadError(f"{repository} has no config.json and no .gguf file: it holds no model that can be read")
    chosen = choose(names, quantisation, repository)
    _fetch(repository, revision, [glob.escape(name) for name in chosen.parts], report)
    return folder / chosen.parts[0]


def _listed(repository: str, revision: str | None, folder: Path) -> list[str]:
    """Names of the repository's files; where the hub cannot be asked, of those that are here."""
    from huggingface_hub import HfApi

    try:
        # the commit of the snapshot, not the revision: the branch may have moved in between
        return list(HfApi().list_repo_files(repository, revision=folder.name))
    except Exception:  # of the hub's client, whichever that is; it is raised again where nothing is here
        here = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        if not any(name.endswith((".safetensors", ".gguf")) for name in here):
            raise
        return here


def _progress_bar(repository: str, report: Report) -> type:
    """A tqdm class that also tells `report` which share of the bytes has arrived."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """Counts for itself: a bar that is not shown, because stderr is no terminal, does not count at all."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._of_bytes, self._arrived = kwargs.get("unit") == "B", 0.0
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._of_bytes:
                self._arrived += n or 0
                done = self._arrived / self.total if self.total else 0.0
                report(f"downloading {repository}", min(done, 1.0))
            shown: bool | None = super().update(n)
            return shown

    return Bar
