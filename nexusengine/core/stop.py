"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through until the earliest stop string, which never comes out, not even its beginning.

    Of stop strings that begin at the same place the longest wins, unless a shorter one is complete first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain to be output, the stop string that matched or None)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(
            ((at, -len(s), s) for s in self._stops if (at := text.find(s)) >= 0),
            default=None,
        )
        if found is not None:
            self._held = ""
            return text[: found[0]], found[2]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string could begin."""
        longest = min(len(text), len(self._stops[0]) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(s) > length and s.startswith(end) for s in self._stops):
                return length
        return 0
