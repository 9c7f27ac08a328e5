"""From what the user calls a model to its files on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.loading.config_json import read_config
from nexusengine.loading.embedded import embedded_model
from nexusengine.loading.gguf_file import GGUFFile
from nexusengine.loading.safetensors_file import find_shards
from nexusengine.model_config import ModelConfig
from nexusengine.models.aliases import ALIASES

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk. path: its directory, or its .gguf file. kind "none": configuration and tokenizer only."""

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

    weights=False: what emulated devices need, without the weights.
    progress(phase, fraction) is called while something takes long. Raises ModelLoadError, or ConfigError if there is a
    revision and no repository for it.
    """
    report = progress or (lambda phase, fraction: None)
    target = ALIASES.get(ref.lower(), ref)
    path = Path(target).expanduser()
    if revision is not None and (target.startswith("embedded:") or path.exists()):
        raise ConfigError(f"revision {revision!r} was given, but model {ref!r} has none", param="revision")
    if target.startswith("embedded:"):
        return _local(ref, embedded_model(report), weights)
    if path.exists():
        return _local(ref, path, weights)
    if target.endswith(".gguf") or target.startswith((".", "/", "~")) or target.count("/") != 1:
        raise ModelLoadError(
            f"there is no model {ref!r}: not a short name (see `nexusengine models`), not a Hugging Face repository "
            "(OWNER/NAME), and no such directory or file"
        )
    from nexusengine.loading.hub import download

    return _local(ref, download(target, revision, weights, report), weights)


def _local(name: str, path: Path, weights: bool) -> ModelFiles:
    if path.is_file():
        return ModelFiles(name, path, "gguf", GGUFFile(path).config(), (path,))
    if (path / "config.json").is_file():
        shards = find_shards(path) if weights else ()
        if weights and not shards:
            raise ModelLoadError(f"{path} has a config.json but no *.safetensors weights")
        return ModelFiles(name, path, "safetensors" if shards else "none", read_config(path), shards)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) != 1:
        found = f"{len(ggufs)} .gguf files; name one of them" if ggufs else "no .gguf file"
        raise ModelLoadError(f"{path} has no config.json and {found}")
    return _local(name, ggufs[0], weights)
