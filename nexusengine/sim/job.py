"""A request as the simulator knows it: with the number of tokens it will generate, which no policy may see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from nexusengine.types import SLO, EngineRequest, SamplingParams

_NAME_BYTES = 12


@dataclass(frozen=True, slots=True)
class TraceBlocks:
    """What the prefix cache goes by: a trace's ids for the blocks of a sequence.

    Attributes:
        ids: one for each block.
        tokens: in a block.
        named_tokens: how many of the sequence's first tokens they name: the prompt, and the output where that is known.
        scope: ids of different scopes (sessions whose ids are their own) never name the same content.
    """

    ids: Sequence[int]
    tokens: int
    named_tokens: int
    scope: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """request: what server, router and engine see; its prompt is a range that only has a length.

    output_tokens: after how many it ends. blocks: names of the content of its prompt, and of its output where known.
    think_s, then: in a closed loop, the job that arrives `think_s` after this one has ended.
    """

    request: EngineRequest
    output_tokens: int
    blocks: TraceBlocks | None = None
    think_s: float = 0.0
    then: Job | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def block_names(self, block_size: int) -> list[bytes]:
        """Names of its full KV blocks.

        A trace's blocks are larger: an id stands for everything up to the end of its block, so the name of a KV block
        is that id and its place inside.

        Raises:
            ValueError: KV blocks do not fit into a trace's.
        """
        blocks = self.blocks
        if blocks is None:
            return []
        inside, rest = divmod(blocks.tokens, block_size)
        if rest:
            raise ValueError(f"trace blocks of {blocks.tokens} tokens are not made of KV blocks of {block_size} tokens")
        full = min(blocks.named_tokens // block_size, len(blocks.ids) * inside)
        scope = blocks.scope << 64
        names = [
            (scope + block * inside + i).to_bytes(_NAME_BYTES, "little")
            for block in blocks.ids[: -(-full // inside)]
            for i in range(inside)
        ]
        return names[:full]


@cache
def _sampling(max_tokens: int | None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)


def make_job(
    request_id: str,
    arrival_s: float,
    prompt_tokens: int,
    output_tokens: int,
    *,
    slo: SLO | None = None,
    slo_class: str | None = None,
    blocks: TraceBlocks | None = None,
    max_tokens: int | Literal["exact"] | None = "exact",
    priority: int = 0,
    tenant: str | None = None,
) -> Job:
    """max_tokens: the limit that the client states, None for none; "exact": what comes, which a policy can then see."""
    request = EngineRequest(
        request_id=request_id,
        prompt_token_ids=range(prompt_tokens),  # type: ignore[arg-type]  # only its length is ever used
        sampling=_sampling(output_tokens if max_tokens == "exact" else max_tokens),
        arrival_s=arrival_s,
        slo=slo,
        slo_class=slo_class,
        priority=priority,
        tenant=tenant,
    )
    return Job(request, output_tokens, blocks)
