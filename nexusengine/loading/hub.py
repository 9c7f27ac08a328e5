"""Downloading from the Hugging Face hub.

Only safetensors, GGUF, configuration and tokenizer files are taken: no code, no pickles, and of weights only the files
that the checkpoint is made of. The hub library itself honours HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE,
and resumes a download whose connection was cut.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nexusengine.errors import ModelLoadError
from nexusengine.loading.config_json import read_config
from nexusengine.loading.gguf_names import choose
from nexusengine.loading.hub_errors import explained
from nexusengine.loading.safetensors_file import INDEX, SINGLE, indexed_files

_SMALL = ["*.json", "*.jinja", "tokenizer.model"]
_NOT = ["*/*"]
_TEMPLATES = "additional_chat_templates/*.jinja"

Report = Callable[[str, float], None]


def download(repository: str, revision: str | None, weights: bool, report: Report, quantisation: str = "") -> Path:
    """Download what a repository's model is made of; what is there already is not fetched again.

    Args:
        repository: OWNER/NAME.
        revision: a branch, tag or commit.
        weights: False: without the weights, where there is a config.json.
        quantisation: of a repository of GGUF files, the one to take (`Q4_K_M`).
        report: called with a phase and the fraction done.

    Returns:
        The local directory of the snapshot, or the GGUF file (the first, if it is split).

    Raises:
        ModelLoadError: with one sentence that says what to do.
    """
    report(f"downloading {repository}", 0.0)
    with explained(repository, revision):
        names = _names(repository, revision)
        if names is None:  # the hub cannot be asked: what is here already will do, if it is whole
            wanted = [*_SMALL, SINGLE] if weights and not quantisation else _SMALL
            folder = _here(repository, revision, wanted) or _fetch(repository, revision, wanted, _untold, _NOT)
            names, revision = (
                [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()],
                folder.name,
            )
        if quantisation or "config.json" not in names:
            return _fetch_gguf(repository, revision, names, quantisation, report)
        folder = _fetch(repository, revision, _small(names), _untold)
        if weights:
            _fetch_safetensors(repository, folder, names, report)
        return folder


def _untold(phase: str, fraction: float) -> None:
    """Small files are no progress that anybody waits for."""


def _small(names: list[str]) -> list[str]:
    """Patterns of the files beside the weights: those of the top folder, and further chat templates."""
    top = [name for name in names if "/" not in name and any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    return [glob.escape(name) for name in [*top, *(name for name in names if fnmatchcase(name, _TEMPLATES))]]


def _names(repository: str, revision: str | None) -> list[str] | None:
    """The repository's files; None where the hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return [file.rfilename for file in HfApi().model_info(repository, revision=revision).siblings or ()]
    except Exception:  # of whichever client the hub library has; the download that follows says why
        return None


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


def _here(repository: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The snapshot on this machine, if it has all that is wanted of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None


def _fetch_safetensors(repository: str, folder: Path, names: list[str], report: Report) -> None:
    """Fetch model.safetensors where there is one, else what the index names: as transformers chooses.

    Of the commit of `folder`, which the hub need not be asked for once more. Weights of a model that cannot be served
    are not fetched.
    """
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
    read_config(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelLoadError(
            f"{repository} has no tokenizer.json; transformers' AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) writes one, to a folder that the other files can be put into"
        )
    _fetch(repository, folder.name, [glob.escape(name) for name in wanted], report)


def _fetch_gguf(repository: str, revision: str | None, names: list[str], quantisation: str, report: Report) -> Path:
    if not quantisation and not any(name.endswith(".gguf") for name in names):
        raise ModelLoadError(f"{repository} has no config.json and no .gguf file: it holds no model that can be read")
    parts = choose(names, quantisation, repository).parts
    return _fetch(repository, revision, [glob.escape(name) for name in parts], report) / parts[0]


def _progress_bar(repository: str, report: Report) -> type:
    """A tqdm class that shows nothing and tells `report` which share of the bytes has arrived."""
    from huggingface_hub.utils.tqdm import tqdm

    told = 0.0  # what is there to come is only known once each file was begun: a share never falls

    class Bar(tqdm):
        """Counts for itself: a bar that is not shown does not count at all."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._of_bytes, self._arrived = kwargs.get("unit") == "B", 0.0
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._of_bytes:
                self._arrived += n or 0
                done = self._arrived / self.total if self.total else 0.0
                nonlocal told
                told = max(told, min(done, 1.0))
                report(f"downloading {repository}", told)
            shown: bool | None = super().update(n)
            return shown

    return Bar
