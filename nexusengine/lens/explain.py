"""Plans in sentences: why a request did what it did in a step, and why the step was as long as it was."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nexusengine.lens.plan import Reason

_SENTENCES: Mapping[Reason, str] = {
    Reason.NONE: "it was not considered in this step",
    Reason.DECODE: "it computed its next token",
    Reason.PREFILL: "it computed the next piece of its prompt",
    Reason.ADMITTED: "it started: its first piece was computed",
    Reason.WAIT_TOKENS: "it waited: the step's token budget was used up",
    Reason.WAIT_BLOCKS: "it waited: too few KV blocks were free for its whole prompt",
    Reason.WAIT_SEATS: "it waited: as many sequences ran as may run at a time",
    Reason.WAIT_ORDER: "it waited: others went first",
    Reason.PREEMPTED: "its KV was taken back for others; it will be computed anew",
    Reason.RELEGATED: "it waited behind the others: its first token could not come in time any more",
    Reason.REFUSED: "it was refused: it had waited long and was not going to be served soon",
    Reason.WAIT_TIME: "it waited: more work would have made the step longer than a running request's promise allows",
    Reason.WAIT_TPOT: "it waited: with it decode steps would have come too near to the tightest promised time per token",
    Reason.PUT_OFF: "it was put off: in its turn it would have made more of the others late",
    Reason.AGED: "it had been relegated long ago and computed in the share kept for such requests",
    Reason.LEFTOVER: "it computed in what the others had left of the step",
    Reason.WAIT_SAVING: "it waited: decodes ran alone, to save up time for a larger piece of prompts in a later step",
}


def explain_request(reason: int, first_token_in_s: float = math.nan) -> str:
    """What one request did in a step and why. reason: from StepPlan.reasons. first_token_in_s: seconds from the step
    to its predicted first token, NaN where nothing is predicted."""
    text = _SENTENCES[Reason(reason)]
    if math.isnan(first_token_in_s):
        return f"{text[0].upper()}{text[1:]}."
    return f"{text[0].upper()}{text[1:]}; its first token was expected in {1000 * first_token_in_s:.0f} ms."


def explain_step(notes: Mapping[str, float], predicted_s: float, upper_s: float, limit_request: str = "") -> str:
    """Why the step was as long as it was. notes: from StepPlan.notes, of any policy. limit_request: id of the request
    in the slot notes["limit_slot"]."""
    text = f"Predicted to take {1000 * predicted_s:.1f} ms, at most {1000 * upper_s:.1f} ms"
    if "limit_ms" in notes:
        text += f"; it was allowed {notes['limit_ms']:.1f} ms"
        if notes.get("limit_slot", -1) >= 0:
            text += f" by the time per token of request {limit_request or int(notes['limit_slot'])}"
        elif "limit_slot" in notes:
            text += " so that a newcomer would not wait behind a huge step"
    if "decode_ms" in notes:
        text += f", its decodes alone {notes['decode_ms']:.1f} ms"
    if notes.get("saving"):
        text += "; prompts waited, to save up time for a longer step"
    counts = [f"{int(notes[key])} {word}" for key, word in _COUNTS.items() if notes.get(key)]
    return f"{text}{'; prompts: ' + ', '.join(counts) if counts else ''}."


_COUNTS = {"kept": "to be in time", "put_off": "put off", "relegated": "relegated"}
