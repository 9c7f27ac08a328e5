"""What is to be sent and when."""

from __future__ import annotations

from dataclasses import dataclass

from nexusengine.types import SLO


@dataclass(frozen=True, slots=True)
class WorkItem:
    """send_at_s: from the beginning of the run. The answer is exactly output_tokens long.

    slo_class, slo: what is asked for, and by what the client judges. block_ids: names of the prompt's blocks of
    `block_tokens` tokens; prompts whose first ids are equal begin with the same tokens.
    """

    send_at_s: float
    prompt_tokens: int
    output_tokens: int
    slo: SLO | None = None
    slo_class: str | None = None
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 0
