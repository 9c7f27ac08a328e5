"""How a model's makers sample from it: what counts where a request does not say.

From generation_config.json, from a GGUF file's general.sampling.* keys, or from a table here for models whose files
are silent. A temperature counts also without do_sample, as in vLLM; do_sample false is greedy, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusengine.errors import InvalidRequest
from nexusengine.loading import embedded
from nexusengine.loading.files import read_json
from nexusengine.obs.logs import get_logger
from nexusengine.types import SamplingParams

_OF_JSON = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_OF_GGUF = {f"general.sampling.{key}": name for key, name in [("temp", "temperature"), *_OF_JSON.items()]}
_UNSUPPORTED: Mapping[str, Collection[Any]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "num_beams": (1,),
    "general.sampling.penalty_repeat": (1,),
    "general.sampling.xtc_probability": (0,),
    "general.sampling.mirostat": (0,),
}
"""Settings that are ignored, with a warning unless they have one of these values, which change nothing."""
log = get_logger("model")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """None: the model does not say. As in SamplingParams: temperature 0 is greedy, top_k 0 keeps all."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def fill(self, params: SamplingParams, named: Collection[str]) -> SamplingParams:
        """`params` with these values for the fields that are not in `named`. Greedy parameters stay as they are."""
        if params.greedy:
            return params
        values = {name: getattr(self, name) for name in SAMPLED if name not in named}
        return dataclasses.replace(params, **{name: value for name, value in values.items() if value is not None})


SAMPLED = tuple(f.name for f in dataclasses.fields(SamplingDefaults))
_OF_FILE = {embedded.FILE_NAME: SamplingDefaults(temperature=0.0)}
"""SmolLM2-135M-Instruct in 4 bits. Its model card samples at temperature 0.2 and top_p 0.9; quantised, it then begins
its answer to "What is the capital of France?" with "The" (15 % at temperature 1) hardly more often than with "L'"
(14 %), which leads to nonsense without an end. Its most likely answer is the right one."""


def of_folder(folder: Path) -> SamplingDefaults:
    """The defaults of `folder`/generation_config.json.

    Raises:
        ModelLoadError: it is not JSON.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return SamplingDefaults()
    values = read_json(path)
    _warn_of_unsupported(values, path)
    if values.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    return _checked({name: values.get(key) for key, name in _OF_JSON.items()}, path)


def of_gguf(metadata: Mapping[str, Any], path: Path | str) -> SamplingDefaults:
    """The defaults of the file's metadata, or of the table."""
    _warn_of_unsupported(metadata, path)
    found = _checked({name: metadata[key] for key, name in _OF_GGUF.items() if key in metadata}, path)
    return _OF_FILE.get(Path(path).name, found) if found == SamplingDefaults() else found


def _checked(values: Mapping[str, Any], path: Path | str) -> SamplingDefaults:
    """Values that no request could have are left out, with a warning."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name == "top_k" and value == -1:  # some write it for "all"
            value = 0
        try:
            kept[name] = getattr(SamplingParams(**{name: value}), name)
        except InvalidRequest as error:
            log.warning("%s: %s; this default is ignored", path, error.message)
    return SamplingDefaults(**kept)


def _warn_of_unsupported(values: Mapping[str, Any], path: Path | str) -> None:
    for name, harmless in _UNSUPPORTED.items():
        if values.get(name) is not None and values[name] not in harmless:
            log.warning("%s: %s is %r, which is not supported and ignored", path, name, values[name])
