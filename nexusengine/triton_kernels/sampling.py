"""From logits to tokens in one launch, without waiting for the device and without sorting.

top_k and top_p are thresholds on the ordered bits of the scaled logits, found digit by digit: eight passes over a row
for each, sixteen candidates a pass. Of tokens that tie with the last one kept, as many are kept as there is room for,
the lowest ids first: one pass to count and one to find the last of them. The draw is the
exponential race of sampling.sampler with the numbers of sampling.noise: it depends on a row's logits, seed and
position, and on no other row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nexusengine.triton_kernels import launch as launching

PARAMETERS = 6
"""Of a row, 32 bits each: temperature, top_k, top_p, min_p, and the two keys of its noise."""
_WIDTH = 512


@triton.jit
def _scaled(row, ids, there, temperature):
    return tl.div_rn(tl.load(row + ids, mask=there, other=float("-inf")), temperature)


@triton.jit
def _ordered(x):
    """Unsigned numbers in the order of float32 x."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)  # -0 becomes 0
    # not ~bits: up to Triton 3.6 its interpreter makes that a signed -1, which numpy refuses
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _kept(order, ids, floor, last):
    """Tokens of order > floor, and those of that order up to the id `last`."""
    return (order > floor) | ((order == floor) & (ids <= last))


@triton.jit
def _threshold(row, vocabulary, temperature, top, floor, last, target, MASS: tl.constexpr, WIDTH: tl.constexpr):
    """The largest number t for which the tokens of order >= t reach the target, 0 if none does.

    They reach it in number, or with MASS in their share of the probability of the tokens that `floor` and `last` keep.
    """
    digits = tl.arange(0, 16)
    found = tl.full([1], 0, tl.uint32)
    shift = tl.full([1], 28, tl.uint32)
    target = tl.zeros([1], tl.float32) + target
    for _ in range(8):
        steps = found + (digits.to(tl.uint32) << shift)
        sums = tl.zeros([WIDTH, 16], tl.float32)
        for start in range(0, vocabulary, WIDTH):
            ids = start + tl.arange(0, WIDTH)
            there = ids < vocabulary
            x = _scaled(row, ids, there, temperature)
            order = _ordered(x)
            kept = there & _kept(order, ids, floor, last)
            if MASS:
                share = tl.where(kept, tl.exp(x - top), 0.0)
            else:
                share = tl.where(kept, 1.0, 0.0)
            sums += tl.where(order[:, None] >= steps[None, :], share[:, None], 0.0)
        total = tl.sum(sums, 0)
        if MASS:
            everything = tl.sum(tl.where(digits == 0, total, 0.0), 0)
            target = tl.where(shift == 28, target * everything, target)
        reached = (total >= target) & (digits > 0)
        found += tl.sum(reached.to(tl.int32), 0).to(tl.uint32) << shift
        shift -= 4
    return found


@triton.jit
def _last_kept(row, vocabulary, temperature, top, floor, last, found, target, MASS: tl.constexpr, WIDTH: tl.constexpr):
    """The id of the last token of order `found` that is needed to reach the target of `_threshold`."""
    above = tl.zeros([1], tl.float32)
    everything = tl.zeros([1], tl.float32)
    each = tl.zeros([1], tl.float32)
    for start in range(0, vocabulary, WIDTH):
        ids = start + tl.arange(0, WIDTH)
        x = _scaled(row, ids, ids < vocabulary, temperature)
        order = _ordered(x)
        kept = (ids < vocabulary) & _kept(order, ids, floor, last)
        if MASS:
            share = tl.where(kept, tl.exp(x - top), 0.0)
        else:
            share = tl.where(kept, 1.0, 0.0)
        above += tl.sum(tl.where(order > found, share, 0.0), 0)
        everything += tl.sum(share, 0)
        each = tl.maximum(each, tl.max(tl.where(order == found, share, 0.0), 0))
    if MASS:
        target = target * everything
    wanted = tl.ceil((target - above) / tl.maximum(each, 1e-38) - 0.001)  # sums are rounded
    wanted = tl.maximum(wanted, 1.0)
    seen = tl.zeros([1], tl.float32)
    found_at = tl.full([1], 0x7FFFFFFF, tl.int32)
    for start in range(0, vocabulary, WIDTH):
        ids = start + tl.arange(0, WIDTH)
        order = _ordered(_scaled(row, ids, ids < vocabulary, temperature))
        alike = (ids < vocabulary) & (order == found) & _kept(order, ids, floor, last)
        rank = seen + tl.cumsum(alike.to(tl.float32), 0)
        found_at = tl.minimum(found_at, tl.min(tl.where(alike & (rank == wanted), ids, 0x7FFFFFFF), 0))
        seen += tl.sum(alike.to(tl.float32), 0)
    return tl.where(found == floor, tl.minimum(found_at, last), found_at)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _exponential(key, second_key, ids):
    """sampling.noise.exponential. Small numbers, which win races, by the series of -log(1 - u)."""
    x = _mix((ids.to(tl.uint32) * 0x9E3779B9) ^ key)
    x = _mix(x + second_key)
    u = ((x >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    series = 1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7 + u * (1 / 8)))))))
    return tl.where(u < 0.125, u * series, -tl.log(1.0 - tl.minimum(u, 0.99999994)))


@triton.jit
def _winner(best, at):
    """The least id of those with the largest score."""
    return tl.min(tl.where(best == tl.max(best, 0), at, 0x7FFFFFFF), 0)


@triton.jit
def _sample_kernel(logits, parameters, tokens, stride, vocabulary, COLDEST: tl.constexpr, WIDTH: tl.constexpr):
    """A program: one row."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    own = parameters + number * 6
    temperature = tl.load(own).to(tl.float32, bitcast=True)
    top_k = tl.load(own + 1)
    top_p = tl.load(own + 2).to(tl.float32, bitcast=True)
    min_p = tl.load(own + 3).to(tl.float32, bitcast=True)
    key = tl.load(own + 4).to(tl.uint32, bitcast=True)
    second_key = tl.load(own + 5).to(tl.uint32, bitcast=True)

    best = tl.full([WIDTH], float("-inf"), tl.float32)
    at = tl.zeros([WIDTH], tl.int32)
    broken = tl.zeros([WIDTH], tl.int32)
    for start in range(0, vocabulary, WIDTH):
        ids = start + tl.arange(0, WIDTH)
        there = ids < vocabulary
        x = tl.load(row + ids, mask=there, other=float("-inf"))
        finite = tl.abs(x) < float("inf")
        broken = tl.where(there & (finite == 0), 1, broken)
        better = x > best
        best = tl.where(better, x, best)
        at = tl.where(better, ids, at)
    token = _winner(best, at)

    if temperature >= COLDEST:
        top = tl.div_rn(tl.max(best, 0), temperature)
        floor = tl.full([1], 0, tl.uint32)
        last = tl.full([1], 0x7FFFFFFF, tl.int32)
        if top_k > 0:
            most = tl.zeros([1], tl.float32) + top_k.to(tl.float32)
            found = _threshold(row, vocabulary, temperature, top, floor, last, most, False, WIDTH)
            last = _last_kept(row, vocabulary, temperature, top, floor, last, found, most, False, WIDTH)
            floor = found
        if top_p < 1.0:
            share = tl.zeros([1], tl.float32) + top_p
            found = _threshold(row, vocabulary, temperature, top, floor, last, share, True, WIDTH)
            if tl.max(found, 0) > 0:
                last = _last_kept(row, vocabulary, temperature, top, floor, last, found, share, True, WIDTH)
                floor = found
        least = tl.where(min_p > 0.0, top + tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
        best = tl.full([WIDTH], float("-inf"), tl.float32)
        at = tl.zeros([WIDTH], tl.int32)
        for start in range(0, vocabulary, WIDTH):
            ids = start + tl.arange(0, WIDTH)
            there = ids < vocabulary
            x = _scaled(row, ids, there, temperature)
            kept = there & _kept(_ordered(x), ids, floor, last) & (x >= least)
            score = tl.where(kept, x - tl.log(_exponential(key, second_key, ids)), float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            at = tl.where(better, ids, at)
        token = _winner(best, at)
    token = tl.where(tl.max(broken, 0) == 0, token, -1)
    tl.store(tokens + number, token.to(tl.int64))


def sample(logits: torch.Tensor, parameters: torch.Tensor, coldest: float = 1e-5) -> torch.Tensor:
    """Sample one token a row.

    Args:
        logits: float32 `[N, V]`.
        parameters: i4 `[N, PARAMETERS]`.
        coldest: temperatures below are greedy.

    Returns:
        Token ids i8 `[N]`; -1 where a row's logits are not finite.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    launching.launch(
        _sample_kernel,
        (len(logits),),
        logits, parameters, tokens, logits.stride(0), logits.shape[1],
        COLDEST=coldest, WIDTH=_WIDTH, num_warps=8, num_stages=1,
    )  # fmt: skip
    return tokens
