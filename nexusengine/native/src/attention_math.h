// What attention is made of, by type of K and V: products of floats or of bfloat16 pairs, and the softmax kept online.
#pragma once
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace {

static constexpr float LOWEST = -__builtin_inff();
static constexpr int TOKENS = 64;       // of a tile of keys
static constexpr int QUERY_ROWS = 192;  // about so many rows of (query, head) a task, fewer if threads would be idle
static constexpr int ROWS_TOGETHER = 24;  // of these meet a tile at a time: scores stay in the first-level cache
static constexpr int SPLIT_TOKENS = 128;  // keys a task of a row that is split: never by threads, they must not change sums

// Where token `position` of a row lies, in bytes from the base.
INLINE int64_t kv_offset(const NexCache& c, const int32_t* blocks, int64_t position) {
    return blocks[position / c.block_size] * c.block_bytes + position % c.block_size * c.token_bytes;
}

INLINE float row_scale(const float*, int64_t) { return 1.0f; }
INLINE float row_scale(const bf16*, int64_t) { return 1.0f; }
INLINE float row_scale(const int8_t* row, int64_t dim) {
    float scale;
    std::memcpy(&scale, row + dim, 4);
    return scale;
}

// ---- products by type of cache ------------------------------------------------------------------------------------

// How two factors of a product are kept. Floats: one number a lane.
struct Floats {
    INLINE vf add(vf sum, const float* x, vf line) { return sum + splat(*x) * line; }
};

// How scores become weights: e^x, or 2^x for scores that were multiplied by log2 e (Binary).
struct Natural {
    INLINE vf of(vf x) { return exponential(x); }
};

// Whether products of this type of cache are of pairs, how many lanes n numbers take, and how scores become weights.
// pack: n numbers of a row, which stand there as floats, as a product needs them.
template <class T>
struct Products {
    typedef Natural Power;
    typedef Floats Lanes;
    static constexpr bool PAIRED = false;
    static constexpr float UNIT = 1.0f;  // of scores
    INLINE int64_t lanes(int64_t n) { return n; }
    INLINE void pack(float*, int64_t) {}
};

#if defined(__AVX512BF16__)
// Two bfloat16 numbers a lane, which follow each other along k: a product of twice as many at the price of one.
struct Pairs {
    INLINE vf add(vf sum, const float* x, vf line) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)line);
    }
};

// 2^x, only as exactly as bfloat16 needs.
struct Binary {
    // 2^x = 2^n 2^r, |r| <= 1/2, and a polynomial of degree 4 in r (by Chebyshev's points; within 8e-6). x <= 0, and 0
    // for what is smaller than 2^-150; NaN stays NaN.
    INLINE vf of(vf x) {
        x = larger(splat(-200.0f), x);
        const vf n = _mm512_roundscale_ps(x, 8), r = x - n;
        const vf p = (((9.67077e-3f * r + 5.587557e-2f) * r + 2.4022212e-1f) * r + 6.9312726e-1f) * r + 1.0f;
        return _mm512_scalef_ps(p, n);
    }
};

template <>
struct Products<bf16> {
    typedef Binary Power;
    typedef Pairs Lanes;
    static constexpr bool PAIRED = true;
    static constexpr float UNIT = 1.44269504088896341f;  // log2 e
    INLINE int64_t lanes(int64_t n) { return (n + 1) / 2; }
    INLINE void pack(float* row, int64_t n) {  // in place: what is written lies before what is still to be read
        for (int64_t d = 0; d < n; d += 2 * W)
            store(row + d / 2, (vf)_mm512_cvtne2ps_pbh(load(row + d + W), load(row + d)));
    }
};
#endif

// A query as its products need it, filled up with zeros to a multiple of 2 W.
template <class T>
INLINE void pack_query(const float* from, int64_t dim, float scale, float* to) {
    const int64_t wide = round_up(dim, 2 * W);
    scale *= Products<T>::UNIT;
    for (int64_t d = 0; d < wide; ++d) to[d] = d < dim ? from[d] * scale : 0.0f;
    Products<T>::pack(to, wide);
}

// Scores [TOKENS] of a head, `count` of them, into weights; returns what earlier sums are multiplied by.
template <class Power>
INLINE float online_softmax_update(float* scores, int count, float& maximum, float& total) {
    const int used = int(round_up(count, W));
    for (int t = count; t < used; ++t) scores[t] = LOWEST;
    vf peak = splat(maximum);  // a NaN is never larger: it shows in the sum
    for (int t = 0; t < used; t += W) peak = larger(load(scores + t), peak);
    const float highest = largest(peak);
    vf sums{};
    const vf shift = splat(highest);
    for (int t = 0; t < used; t += W) {
        vf e = Power::of(load(scores + t) - shift);
        store(scores + t, e);
        sums += e;
    }
    float factor = 1.0f;
    if (maximum == LOWEST) factor = 0.0f;
    else if (highest != maximum) factor = Power::of(splat(maximum - highest))[0];
    total = total * factor + sum(sums);
    maximum = highest;
    return factor;
}

}  // namespace
