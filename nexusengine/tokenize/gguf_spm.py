"""SentencePiece's BPE as a list of merges.

SentencePiece has scores and no merges: of all neighbours that together are a token, those with the highest score are
joined first, the leftmost of equals before the others. The tokenizers library wants merges in order.
"""

from __future__ import annotations

from nexusengine.tokenize.gguf_vocab import BYTE, Vocabulary

SPACE = "\u2581"


def merges_of(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All ways to put two tokens together to a third, in the order in which they are to be tried."""
    parts = {token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind != BYTE}
    merges: list[tuple[str, str]] = []
    for i in sorted(range(len(vocabulary.tokens)), key=lambda i: -vocabulary.scores[i]):
        token = vocabulary.tokens[i]
        if len(token) == 2:
            if token[0] in parts and token[1] in parts:
                merges.append((token[0], token[1]))
            continue
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in parts and token[cut:] in parts]
        merges.extend((token[:cut], token[cut:]) for cut in _leftmost_first(token, cuts))
    return merges


def _leftmost_first(token: str, cuts: list[int]) -> list[int]:
    """The cuts of one token in an order that joins the leftmost of two overlapping neighbours.

    Two ways to make the same token overlap, in parts A B C, where B is both its beginning and its end; A B is the
    leftmost and has to come before B C. Longest left part first is that order but where B is longer than half the
    token, and B's end would be the beginning of another.
    """
    order = sorted(cuts, reverse=True)
    for left in order:
        right = len(token) - left  # A B cuts at `left`, B C at `right`, if B, `right` long, is beginning and end
        border = token[:right] == token[left:]
        mirrored = token[:left] == token[right:]
        if left < right and border and not mirrored and right in cuts:
            order.remove(left)
            order.insert(order.index(right), left)
    return order


def never_crosses_words(merges: list[tuple[str, str]]) -> bool:
    """Whether no merge joins the end of a word to the space before the next: then words can be merged one by one."""
    return not any(SPACE in (left + right).lstrip(SPACE) for left, right in merges)
