"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

import copy
from collections.abc import Sequence


class _Matcher:
    """Counts how much of one string the text so far ends with (Knuth, Morris and Pratt 1977).

    Linear in the text however the string repeats itself. The table grows with the match, so that a long string costs
    nothing until it is met.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._shorter = [0, 0]  # [k]: length of the next longest beginning that string[:k] ends with

    def push(self, char: str) -> bool:
        """True when the string is complete with this character."""
        self.matched = self._extend(self.matched, char)
        if self.matched == len(self._shorter):
            self._shorter.append(self._extend(self._shorter[-1], char))
        return self.matched == len(self.string)

    def _extend(self, length: int, char: str) -> int:
        while length and self.string[length] != char:
            length = self._shorter[length]
        return length + (self.string[length] == char)


class StopStrings:
    """Lets text through until the first stop string is complete, which never comes out, not even its beginning.

    Of stop strings complete with the same character the longest wins. What is found does not depend on where the
    pieces were cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(s) for s in sorted(stops, key=len, reverse=True)]
        self._held = ""

    def copy(self) -> StopStrings:
        """One in the same state, to try out text that may not stay as it is."""
        other = copy.copy(self)
        other._matchers = [copy.copy(m) for m in self._matchers]  # their tables are shared: a string has but one
        return other

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._matchers)

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain to be output, the stop string that matched or None). Not to be used after a match."""
        if not self._matchers:
            return text, None
        held = len(self._held)
        text = self._held + text
        for end in range(held, len(text)):
            complete = [m for m in self._matchers if m.push(text[end])]
            if complete:
                self._held = ""
                return text[: end + 1 - len(complete[0].string)], complete[0].string
        keep = len(text) - max(m.matched for m in self._matchers)
        self._held = text[keep:]
        return text[:keep], None

    def finish(self) -> str:
        """The text that was held back, once no more comes."""
        held, self._held = self._held, ""
        return held
