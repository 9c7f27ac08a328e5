"""A request as the simulator knows it: with the number of tokens it will generate, which no policy may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nexusengine.types import SLO, EngineRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """request: what server, router and engine see; its prompt is a range that only has a length.

    output_tokens: after how many it ends. names: of the prompt's full KV blocks, for the prefix cache; may be empty.
    think_s, then: in a closed loop, the job that arrives `think_s` after this one has ended.
    """

    request: EngineRequest
    output_tokens: int
    names: tuple[bytes, ...] = ()
    think_s: float = 0.0
    then: Job | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


@cache
def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)


def make_job(
    request_id: str,
    arrival_s: float,
    prompt_tokens: int,
    output_tokens: int,
    *,
    slo: SLO | None = None,
    slo_class: str | None = None,
    names: Sequence[bytes] = (),
    max_tokens: int | None = None,
) -> Job:
    """max_tokens: the limit that the client states; by default exactly what comes."""
    request = EngineRequest(
        request_id=request_id,
        prompt_token_ids=range(prompt_tokens),  # type: ignore[arg-type]  # only its length is ever used
        sampling=_sampling(max_tokens or output_tokens),
        arrival_s=arrival_s,
        slo=slo,
        slo_class=slo_class,
    )
    return Job(request, output_tokens, tuple(names))


def block_names(hash_ids: Sequence[int], trace_block_tokens: int, block_size: int, prompt_tokens: int) -> list[bytes]:
    """Names of a prompt's full KV blocks from the block ids of a trace, whose blocks are larger: a trace's id stands
    for everything up to the end of its block, so the name of a KV block is that id and its place inside."""
    if trace_block_tokens % block_size:
        raise ValueError(f"trace blocks of {trace_block_tokens} tokens are not made of KV blocks of {block_size}")
    inside = trace_block_tokens // block_size
    full = min(prompt_tokens // block_size, len(hash_ids) * inside)
    return [(hash_ids[i // inside] * inside + i % inside).to_bytes(12, "little") for i in range(full)]
