"""From what the user calls a model to its files on this machine."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.loading import gguf_names
from nexusengine.loading.aliases import ALIASES
from nexusengine.loading.config_json import read_config
from nexusengine.loading.embedded import embedded_model
from nexusengine.loading.files import refuse_pointer
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.safetensors_file import find_shards
from nexusengine.loading.shown import short
from nexusengine.model_config import ModelConfig

Progress = Callable[[str, float], None]
_SMALL_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        path: its directory, or its .gguf file.
        kind: "none": configuration and tokenizer only.
    """

    name: str
    path: Path
    kind: Literal["safetensors", "gguf", "none"]
    config: ModelConfig
    weights: tuple[Path, ...]


def resolve_model(
    ref: str,
    *,
    revision: str | None = None,
    weights: bool = True,
    progress: Progress | None = None,
) -> ModelFiles:
    """Find, and download if need be, the model `ref`: alias, repository, directory or .gguf file.

    A repository may be followed by a colon and the quantisation of one of its GGUF files (`OWNER/NAME:Q4_K_M`).

    Args:
        ref: the model.
        revision: of a repository.
        weights: False: what emulated devices need, without the weights.
        progress: called with (phase, fraction) while something takes long.

    Raises:
        ModelLoadError: it cannot be found.
        ConfigError: there is a revision and no repository for it.
    """
    report = progress or (lambda phase, fraction: None)
    target = ALIASES.get(ref.lower(), ref)
    try:
        return _resolve(ref, target, revision, weights, report)
    except OSError as error:
        raise ModelLoadError(
            f"cannot load model {short(ref)}: {error.strerror or error}{_file(error)}; downloads are kept in "
            "NEXUSENGINE_CACHE and HF_HOME, which can be set to folders with space that can be written"
        ) from error


def _resolve(ref: str, target: str, revision: str | None, weights: bool, report: Progress) -> ModelFiles:
    path = Path(os.path.expanduser(target))
    there = not target.startswith("embedded:") and os.path.exists(path)
    if revision is not None and (target.startswith("embedded:") or there):
        raise ConfigError(f"revision {revision!r} was given, but model {ref!r} has none", param="revision")
    if target.startswith("embedded:"):
        return _local(ref, embedded_model(report), weights)
    if there:
        return _local(ref, path, weights)
    repository, _, quantisation = target.partition(":")
    if repository.endswith(".gguf") or target.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise ModelLoadError(
            f"there is no model {short(ref)}{_did_you_mean(ref)}: not a short name (see `nexusengine models`), not a "
            "Hugging Face repository (OWNER/NAME, or OWNER/NAME:Q4_K_M for one of its GGUF files), and no such "
            "directory or file"
        )
    from nexusengine.loading.hub import download

    return _local(ref, download(repository, revision, weights, report, quantisation), weights)


def _did_you_mean(ref: str) -> str:
    near = difflib.get_close_matches(ref.lower(), ALIASES, n=1, cutoff=0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _local(name: str, path: Path, weights: bool) -> ModelFiles:
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ModelLoadError(f"{path} is one file of a checkpoint; name its folder, {path.parent}")
        file = GGUFFile(path)
        return ModelFiles(name, path, "gguf", file.config(), file.paths)
    if (path / "config.json").is_file():
        config = read_config(path)
        for small in _SMALL_FILES:
            if (path / small).is_file():
                refuse_pointer(path / small)
        shards = find_shards(path) if weights else ()
        if weights and not shards:
            raise ModelLoadError(f"{path} has a config.json but no *.safetensors weights{_instead(path)}")
        return ModelFiles(name, path, "safetensors" if shards else "none", config, shards)
    if not path.is_dir():
        raise ModelLoadError(f"{path} is neither a file nor a folder")
    found = gguf_names.models(file.name for file in path.glob("*.gguf") if file.is_file())
    if len(found) != 1:
        several = ", ".join(model.parts[0] for model in found)
        what = f"{len(found)} .gguf files; name one of them: {several}" if found else f"no .gguf file{_instead(path)}"
        raise ModelLoadError(f"{path} has no config.json and {what}")
    if found[0].missing:
        raise ModelLoadError(f"{path / found[0].missing[0]} is missing, of a model in {len(found[0].parts)} parts")
    return _local(name, path / found[0].parts[0], weights)


def _instead(path: Path) -> str:
    """A hint at what a folder holds that looks like weights and is not read."""
    other = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".onnx"))
    return f"; {', '.join(other[:5])} there is not read" if other else ""


def _file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
