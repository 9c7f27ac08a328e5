"""From logits to tokens, all rows at once.

Order: temperature, top_k, top_p, min_p, then a draw by exponential race: the token with the largest p / E, E standard
exponential, has exactly the distribution p (Gumbel-max in another form).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nexusengine import native
from nexusengine.arrays import I4
from nexusengine.sampling.noise import exponential, row_keys
from nexusengine.sampling.table import SampledLogprobs, SamplingRows
from nexusengine.triton_kernels import launch

_CANDIDATES = 1024
"""Most likely tokens looked at first for top_k and top_p; rows that need more are done over the whole vocabulary."""
_COLDEST = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""


@dataclass(frozen=True, slots=True)
class DeviceLogprobs:
    """SampledLogprobs before it is fetched from the device."""

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def fetch(self) -> SampledLogprobs:
        """Waits for the device."""
        return SampledLogprobs(self.chosen.cpu().numpy(), self.top_ids.int().cpu().numpy(), self.top.cpu().numpy())


def sample(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, DeviceLogprobs | None]:
    """logits float32 `[N, V]` -> token ids i8 `[N]` on the same device; -1 where a row's logits are not finite.

    On CUDA by one Triton kernel (triton_kernels/sampling), which only launches; else by torch. Both follow the same
    rule from (seed, position) to a token, up to rounding at the filters' edges and in a race's finish. Of tokens that
    tie, the filters keep those of the lowest ids; torch's way only among its first candidates.
    """
    if launch.probe(logits.device)[0]:
        tokens = _sample_by_kernel(logits, rows)
        return tokens, _logprobs(logits, tokens.clamp_min(0), rows.logprobs)
    return _sample_by_torch(logits, rows)


def _sample_by_kernel(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    from nexusengine.triton_kernels import sampling

    packed = np.empty((len(logits), sampling.PARAMETERS), np.int32)
    packed[:, 0], packed[:, 2], packed[:, 3] = (
        values.view(np.int32) for values in (rows.temperature, rows.top_p, rows.min_p)
    )
    packed[:, 1] = rows.top_k
    packed[:, 4:] = row_keys(rows.seed, rows.position).numpy()
    parameters = torch.from_numpy(packed)
    if logits.device.type == "cuda":
        parameters = parameters.pin_memory().to(logits.device, non_blocking=True)
    return sampling.sample(logits, parameters, _COLDEST)


def _sample_by_torch(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, DeviceLogprobs | None]:
    tokens, finite = _most_likely(logits)
    random = rows.temperature >= _COLDEST
    filtered = random & ((rows.top_k > 0) | (rows.top_p < 1.0))
    for chosen, draw in ((random & ~filtered, _draw_all), (filtered, _draw_filtered)):
        index = np.nonzero(chosen)[0]
        if len(index):
            part = torch.from_numpy(index).to(logits.device)
            tokens[part] = draw(logits[part], rows.gather(index))
    return torch.where(finite, tokens, -1), _logprobs(logits, tokens, rows.logprobs)


def _most_likely(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids i8 `[N]`, whether all of a row's logits are finite)."""
    kernels = native.loaded() if logits.device.type == "cpu" else None
    if kernels is None or logits.dtype != torch.float32 or not logits.is_contiguous():
        return logits.argmax(dim=-1), torch.isfinite(logits).all(dim=-1)
    places = torch.empty(logits.shape[0], dtype=torch.long)
    call = native.Prepared(native.structs.Largest(logits.data_ptr(), places.data_ptr(), *logits.shape))
    kernels.run(call)
    return places.clamp_min(0), places >= 0


def _column(values: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device).unsqueeze(1)


def _race(logits: torch.Tensor, ids: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Index of the winner in each row of scaled, filtered logits `[N, K]` of the tokens `ids`."""
    keys = row_keys(rows.seed, rows.position).to(logits.device)
    return (logits - exponential(keys, ids).log()).argmax(dim=-1)


def _draw_all(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """No top_k, no top_p: the whole vocabulary races."""
    scaled = logits / _column(rows.temperature, logits)
    if (rows.min_p > 0).any():
        floor = scaled.amax(dim=-1, keepdim=True) + _column(rows.min_p, logits).log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    return _race(scaled, ids, rows)


def _draw_filtered(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The most likely tokens in order, cut by top_k, top_p and min_p; then the race among what is left."""
    vocabulary = logits.shape[1]
    few = min(_CANDIDATES, vocabulary)
    tokens, enough = _draw_candidates(logits, rows, few)
    if few == vocabulary or ((rows.top_k > 0) & (rows.top_k <= few)).all():
        return tokens  # known without waiting for the device
    if not enough.all():
        index = np.nonzero(~enough.cpu().numpy())[0]
        part = torch.from_numpy(index).to(logits.device)
        tokens[part], _ = _draw_candidates(logits[part], rows.gather(index), vocabulary)
    return tokens


def _draw_candidates(logits: torch.Tensor, rows: SamplingRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, whether the `count` most likely ones hold everything the filters keep)."""
    scaled, ids = _in_order(*torch.topk(logits / _column(rows.temperature, logits), count, dim=-1))
    vocabulary = logits.shape[1]
    top_k = _column(np.where(rows.top_k > 0, np.minimum(rows.top_k, vocabulary), vocabulary), logits)
    within = torch.arange(count, device=logits.device) < top_k
    # top_p counts the probability of what top_k left: known if those are in reach, or if top_k leaves everything
    total = torch.where(
        top_k <= count,
        scaled.masked_fill(~within, -torch.inf).logsumexp(-1, keepdim=True),
        (logits / _column(rows.temperature, logits)).logsumexp(-1, keepdim=True),
    )
    p = (scaled - total).exp()
    cumulative = p.cumsum(-1)
    top_p, min_p = _column(rows.top_p, logits), _column(rows.min_p, logits)
    nucleus = (cumulative - p < top_p) | (top_p >= 1.0)  # the sum of all may exceed 1 by rounding
    keep = within & nucleus & (p >= min_p * p[:, :1])
    enough = (top_k <= count) | ((top_k == vocabulary) & (cumulative[:, -1:] >= top_p) & (top_p < 1.0))
    winner = _race(scaled.masked_fill(~keep, -torch.inf), ids.int(), rows)
    return ids.gather(1, winner.unsqueeze(1)).squeeze(1), enough.squeeze(1)


def _in_order(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """topk's values and ids `[N, K]`, equal values by their ids; topk leaves their order open."""
    if values.device.type == "cpu" and not (values[:, 1:] == values[:, :-1]).any():
        return values, ids
    ids, by_id = ids.sort(dim=-1)
    values, order = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, wanted: I4) -> DeviceLogprobs | None:
    if not (wanted >= 0).any():
        return None
    everything = logits.log_softmax(dim=-1)
    top, ids = everything.topk(int(wanted.max()), dim=-1)
    chosen = everything.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return DeviceLogprobs(chosen, ids, top)
