// Causal attention straight from the block table, with the softmax kept online (Milakov and Gimelshein, arXiv 1805.02867):
// running maximum m, sum l and weighted values, rescaled when the maximum rises.
//
// Rows of one query are tasks of their own, with all heads together, so that memory is read in the order it lies; a long
// row is split over tasks and merged at the end. Longer queries are tasks of (row, KV head, some queries): the query
// heads of a group and their queries are packed into the rows of two small matrix products, and K and V are copied tile
// by tile, K transposed. Slots behind a row's length are never read.
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
INLINE int64_t place(const NexCache& c, const int32_t* blocks, int64_t position) {
    return blocks[position / c.block_size] * c.block_bytes + position % c.block_size * c.token_bytes;
}

INLINE float row_scale(const float*, int64_t) { return 1.0f; }
INLINE float row_scale(const bf16*, int64_t) { return 1.0f; }
INLINE float row_scale(const int8_t* row, int64_t dim) {
    float scale;
    std::memcpy(&scale, row + dim, 4);
    return scale;
}

// ---- arithmetic by type of cache ----------------------------------------------------------------------------------

// How two factors of a product are kept. Floats: one number a lane.
struct Floats {
    INLINE vf add(vf sum, const float* x, vf line) { return sum + splat(*x) * line; }
};

// Two bfloat16 numbers a lane, which follow each other along k: a product of twice as many at the price of one.
struct Pairs {
#if defined(__AVX512BF16__)
    INLINE vf add(vf sum, const float* x, vf line) {
        int32_t pair;
        std::memcpy(&pair, x, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)line);
    }
#endif
};

#if defined(__AVX512BF16__)
// 2 W floats of a row as pairs.
INLINE void put_pairs(const float* from, float* to) {
    store(to, (vf)_mm512_cvtne2ps_pbh(load(from + W), load(from)));
}
#endif

// How scores become weights: e^x, or 2^x for scores that were multiplied by log2 e, and then only as exactly as bfloat16
// needs.
struct Natural {
    INLINE vf of(vf x) { return exponential(x); }
};
#if defined(__AVX512BF16__)
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
#endif

// Whether products of this type of cache are of pairs, and how scores become weights then.
template <class T>
struct Products {
    typedef Natural Power;
    static constexpr bool PAIRED = false;
    static constexpr float UNIT = 1.0f;  // of scores
};
#if defined(__AVX512BF16__)
template <>
struct Products<bf16> {
    typedef Binary Power;
    static constexpr bool PAIRED = true;
    static constexpr float UNIT = 1.44269504088896341f;  // log2 e
};
#endif

// A query as its products need it, filled up with zeros to a multiple of 2 W.
template <class T>
INLINE void put_query(const float* from, int64_t dim, float scale, float* to) {
    const int64_t wide = round_up(dim, 2 * W);
    scale *= Products<T>::UNIT;
    for (int64_t d = 0; d < wide; ++d) to[d] = d < dim ? from[d] * scale : 0.0f;
#if defined(__AVX512BF16__)
    if constexpr (Products<T>::PAIRED)  // in place: what is written lies before what is still to be read
        for (int64_t d = 0; d < wide; d += 2 * W) put_pairs(to + d, to + d / 2);
#endif
}

// ---- one query a row ---------------------------------------------------------------------------------------------

// The sums of G vectors times a factor, TOKENS apart.
template <int G>
INLINE void put_sums(const vf (&acc)[G], float factor, float* out) {
#if defined(__AVX512F__)
    if constexpr (G > 1) {  // together: fewer steps than one after the other
        auto low = [](vf a, vf b) __attribute__((always_inline)) { return (vf)_mm512_unpacklo_ps(a, b); };
        auto high = [](vf a, vf b) __attribute__((always_inline)) { return (vf)_mm512_unpackhi_ps(a, b); };
        const vf c = acc[G > 2 ? 2 : 0], d = acc[G > 3 ? 3 : 0];
        const __m512d first = (__m512d)(low(acc[0], acc[1]) + high(acc[0], acc[1]));
        const __m512d second = (__m512d)(low(c, d) + high(c, d));
        const vf four = (vf)_mm512_unpacklo_pd(first, second) + (vf)_mm512_unpackhi_pd(first, second);
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)) * factor;
        each<G>(EACH(g) { out[g * TOKENS] = sums[int(g)]; });
        return;
    }
#endif
    each<G>(EACH(g) { out[g * TOKENS] = sum(acc[g]) * factor; });
}

// scores [G] of one key against G queries of its group; q rows are padded with zeros to `wide`.
template <int G, class T>
INLINE void score(const float* q, int64_t wide, const T* key, int64_t dim, float* scores) {
    vf acc[G] = {};
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
        const vf k = load(key + d);
        each<G>(EACH(g) { acc[g] += load(q + g * wide + d) * k; });
    }
    if (d < dim) {
        const vf k = load_first(key + d, int(dim - d));
        each<G>(EACH(g) { acc[g] += load(q + g * wide + d) * k; });
    }
    put_sums<G>(acc, row_scale(key, dim), scores);
}

#if defined(__AVX512BF16__)
// The same of bfloat16 pairs; q [G][wide] holds a head's pairs in the first half.
template <int G>
INLINE void score(const float* q, int64_t wide, const bf16* key, int64_t dim, float* scores, Pairs) {
    vf acc[G] = {};
    for (int64_t d = 0; d < dim; d += 2 * W) {
        vf k{};
        if (d + 2 * W <= dim) k = load(reinterpret_cast<const float*>(key + d));
        else std::memcpy(&k, key + d, size_t(dim - d) * 2);
        each<G>(EACH(g) { acc[g] = _mm512_dpbf16_ps(acc[g], (__m512bh)load(q + g * wide + d / 2), (__m512bh)k); });
    }
    put_sums<G>(acc, 1.0f, scores);
}
#endif

// out [G][padded] += weights [G][TOKENS] times `count` values, each `offset` bytes behind its token's.
template <int G, class T>
INLINE void mix(const float* weights, const char* const* values, int64_t offset, int count, int64_t dim, int64_t padded,
                float* out) {
    auto value = [&](int t) __attribute__((always_inline)) { return reinterpret_cast<const T*>(values[t] + offset); };
    constexpr int D = W == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + D * W <= dim; d += D * W) {
        vf acc[G][D];
        each<G>(EACH(g) { each<D>(EACH(i) { acc[g][i] = load(out + g * padded + d + i * W); }); });
        for (int t = 0; t < count; ++t) {
            vf v[D];
            each<D>(EACH(i) { v[i] = load(value(t) + d + i * W); });
            each<G>(EACH(g) {
                const vf weight = splat(weights[g * TOKENS + t]);
                each<D>(EACH(i) { acc[g][i] += weight * v[i]; });
            });
        }
        each<G>(EACH(g) { each<D>(EACH(i) { store(out + g * padded + d + i * W, acc[g][i]); }); });
    }
    for (; d < dim; d += W) {
        const int n = dim - d < W ? int(dim - d) : W;
        vf acc[G];
        each<G>(EACH(g) { acc[g] = load(out + g * padded + d); });
        for (int t = 0; t < count; ++t) {
            const vf v = n < W ? load_first(value(t) + d, n) : load(value(t) + d);
            each<G>(EACH(g) { acc[g] += splat(weights[g * TOKENS + t]) * v; });
        }
        each<G>(EACH(g) { store(out + g * padded + d, acc[g]); });
    }
}

// Scores [TOKENS] of a head, `count` of them, into weights; returns what earlier sums are multiplied by.
template <class Power>
INLINE float soften(float* scores, int count, float& maximum, float& total) {
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

// f(constant count, first head) for the query heads of each KV head, at most four at a time.
template <class F>
INLINE void head_groups(int64_t kv_heads, int64_t group, F f) {
    for (int64_t kv = 0; kv < kv_heads; ++kv)
        for (int64_t left = group, h = kv * group; left > 0; left -= 4, h += 4) {
            if (left >= 4) f(std::integral_constant<int, 4>{}, kv, h);
            else if (left == 3) f(std::integral_constant<int, 3>{}, kv, h);
            else if (left == 2) f(std::integral_constant<int, 2>{}, kv, h);
            else f(std::integral_constant<int, 1>{}, kv, h);
        }
}

// A share of a row's keys against all heads. state: [heads] maxima, [heads] totals, [heads][padded] values; scores
// [heads][TOKENS]. Keys are read token by token, all heads of each, in the order they lie; the values of the same tokens
// are asked for meanwhile, since they are read head by head.
template <class T>
static void decode_share(const NexAttention& a, const float* q, int64_t row, int64_t begin, int64_t end, float* scores,
                         float* state) {
    const int64_t dim = a.dim, padded = round_up(dim, W), wide = round_up(dim, 2 * W), group = a.heads / a.kv_heads;
    const int64_t head_bytes = a.cache.head_bytes;
    const int32_t* blocks = a.table + row * a.table_stride;
    float *maxima = state, *totals = state + a.heads, *out = state + 2 * a.heads;
    for (int64_t h = 0; h < a.heads; ++h) maxima[h] = LOWEST, totals[h] = 0.0f;
    std::memset(out, 0, size_t(a.heads * padded) * 4);
    for (int64_t at = begin; at < end; at += TOKENS) {
        const int count = end - at < TOKENS ? int(end - at) : TOKENS;
        const char *keys[TOKENS], *values[TOKENS];
        for (int t = 0; t < count; ++t) {
            const int64_t offset = place(a.cache, blocks, at + t);
            keys[t] = static_cast<const char*>(a.cache.k) + offset;
            values[t] = static_cast<const char*>(a.cache.v) + offset;
        }
        for (int t = 0; t < count; ++t) {
            for (int64_t line = 0; line < a.kv_heads * head_bytes; line += 64) __builtin_prefetch(values[t] + line);
            head_groups(a.kv_heads, group, [&](auto g, int64_t kv, int64_t h) __attribute__((always_inline)) {
                const T* key = reinterpret_cast<const T*>(keys[t] + kv * head_bytes);
                if constexpr (Products<T>::PAIRED) score<g>(q + h * wide, wide, key, dim, scores + h * TOKENS + t, Pairs{});
                else score<g>(q + h * wide, wide, key, dim, scores + h * TOKENS + t);
            });
        }
        for (int64_t h = 0; h < a.heads; ++h) {
            const float factor = soften<typename Products<T>::Power>(scores + h * TOKENS, count, maxima[h], totals[h]);
            if (factor != 1.0f)
                for (int64_t d = 0; d < padded; d += W) store(out + h * padded + d, load(out + h * padded + d) * factor);
            if (sizeof(T) == 1)
                for (int t = 0; t < count; ++t)
                    scores[h * TOKENS + t] *= row_scale(reinterpret_cast<const T*>(values[t] + h / group * head_bytes), dim);
        }
        head_groups(a.kv_heads, group, [&](auto g, int64_t kv, int64_t h) __attribute__((always_inline)) {
            mix<g, T>(scores + h * TOKENS, values, kv * head_bytes, count, dim, padded, out + h * padded);
        });
    }
}

// The shares of a row merged into its output.
template <class Power>
static void merge(const NexAttention& a, int64_t token, const float* states, int64_t shares, int64_t size) {
    const int64_t padded = round_up(a.dim, W);
    for (int64_t h = 0; h < a.heads; ++h) {
        float highest = LOWEST, total = 0.0f;
        for (int64_t s = 0; s < shares; ++s) highest = states[s * size + h] > highest ? states[s * size + h] : highest;
        float* out = a.out + token * a.out_stride + h * a.dim;
        for (int64_t d = 0; d < a.dim; ++d) out[d] = 0.0f;
        for (int64_t s = 0; s < shares; ++s) {
            const float* state = states + s * size;
            // of one share as it is, so that an infinite score gives NaN and not 0
            const float factor = shares == 1 ? 1.0f : Power::of(splat(state[h] - highest))[0];
            total += state[a.heads + h] * factor;
            const float* values = state + 2 * a.heads + h * padded;
            for (int64_t d = 0; d < a.dim; ++d) out[d] += values[d] * factor;
        }
        for (int64_t d = 0; d < a.dim; ++d) out[d] /= total;
    }
}

// ---- many queries a row ------------------------------------------------------------------------------------------

// sums [rows][columns] (+)= a [rows][k] times b [k][columns]; strides and k in lanes of P, columns a multiple of W.
template <class P, int ROWS, int VECTORS>
INLINE void product_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k, float* sums,
                         int64_t stride, bool add) {
    vf acc[ROWS][VECTORS];
    each<ROWS>(EACH(r) { each<VECTORS>(EACH(v) { acc[r][v] = add ? load(sums + r * stride + v * W) : vf{}; }); });
    for (int64_t i = 0; i < k; ++i) {
        vf line[VECTORS];
        each<VECTORS>(EACH(v) { line[v] = load(b + i * b_stride + v * W); });
        each<ROWS>(EACH(r) {
            each<VECTORS>(EACH(v) { acc[r][v] = P::add(acc[r][v], a + r * a_stride + i, line[v]); });
        });
    }
    each<ROWS>(EACH(r) { each<VECTORS>(EACH(v) { store(sums + r * stride + v * W, acc[r][v]); }); });
}

template <class P, int VECTORS>
static void product_columns(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t k,
                            float* sums, int64_t stride, bool add) {
    constexpr int ROWS = W == 8 ? 12 / VECTORS : 24 / VECTORS > 6 ? 6 : 24 / VECTORS;
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        product_tile<P, ROWS, VECTORS>(a + r * a_stride, a_stride, b, b_stride, k, sums + r * stride, stride, add);
    for (; r < rows; ++r)
        product_tile<P, 1, VECTORS>(a + r * a_stride, a_stride, b, b_stride, k, sums + r * stride, stride, add);
}

// stride: of b and of sums.
template <class P>
static void product(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t stride, int64_t columns,
                    int64_t k, float* sums, bool add) {
    constexpr int MOST = W == 8 ? 2 : 4;
    int64_t c = 0;
    for (; c + MOST * W <= columns; c += MOST * W)
        product_columns<P, MOST>(a, a_stride, rows, b + c, stride, k, sums + c, stride, add);
    if (MOST == 4 && c + 2 * W <= columns) {
        product_columns<P, 2>(a, a_stride, rows, b + c, stride, k, sums + c, stride, add);
        c += 2 * W;
    }
    for (; c < columns; c += W) product_columns<P, 1>(a, a_stride, rows, b + c, stride, k, sums + c, stride, add);
}

// A tile of keys, transposed [padded][TOKENS], and values [TOKENS][padded], as floats; zeros behind the last token.
template <class T>
static void copy_keys(const NexAttention& a, const int32_t* blocks, int64_t kv, int64_t at, int count, float* keys,
                      float* values) {
    const int64_t dim = a.dim, padded = round_up(dim, W), stop = round_up(count, W);
    for (int64_t t = 0; t < stop; t += W) {
        const T *key[W] = {}, *value[W] = {};
        float key_scale[W], value_scale[W];
        for (int i = 0; i < W && t + i < count; ++i) {
            const int64_t offset = place(a.cache, blocks, at + t + i) + kv * a.cache.head_bytes;
            key[i] = reinterpret_cast<const T*>(static_cast<const char*>(a.cache.k) + offset);
            value[i] = reinterpret_cast<const T*>(static_cast<const char*>(a.cache.v) + offset);
            key_scale[i] = row_scale(key[i], dim), value_scale[i] = row_scale(value[i], dim);
        }
        for (int64_t d = 0; d < dim; d += W) {
            const int n = dim - d < W ? int(dim - d) : W;
            vf square[W];
            for (int i = 0; i < W; ++i) {
                vf v{};
                square[i] = v;
                if (key[i] != nullptr) {
                    square[i] = n < W ? load_first(key[i] + d, n) : load(key[i] + d);
                    v = n < W ? load_first(value[i] + d, n) : load(value[i] + d);
                    if (sizeof(T) == 1) square[i] *= key_scale[i], v *= value_scale[i];
                }
                store(values + (t + i) * padded + d, v);
            }
            transpose(square);
            for (int i = 0; i < W; ++i) store(keys + (d + i) * TOKENS + t, square[i]);
        }
    }
}

#if defined(__AVX512BF16__)
// A tile of bfloat16 keys [padded / 2][TOKENS] and values [TOKENS / 2][padded], as pairs. dim is even.
static void copy_pairs(const NexAttention& a, const int32_t* blocks, int64_t kv, int64_t at, int count, float* keys,
                       float* values) {
    const int64_t dim = a.dim, padded = round_up(dim, W), stop = round_up(count, W);
    for (int64_t t = 0; t < stop; t += W) {
        const char *key[W] = {}, *value[W] = {};
        for (int i = 0; i < W && t + i < count; ++i) {
            const int64_t offset = place(a.cache, blocks, at + t + i) + kv * a.cache.head_bytes;
            key[i] = static_cast<const char*>(a.cache.k) + offset;
            value[i] = static_cast<const char*>(a.cache.v) + offset;
        }
        for (int64_t d = 0; d < dim / 2; d += W) {
            const int n = dim / 2 - d < W ? int(dim / 2 - d) : W;
            vf square[W];
            for (int i = 0; i < W; ++i) {
                const float* from = reinterpret_cast<const float*>(key[i]) + d;
                square[i] = key[i] == nullptr ? vf{} : n == W ? load(from) : load_first(from, n);
            }
            transpose(square);
            for (int i = 0; i < W && d + i < padded / 2; ++i) store(keys + (d + i) * TOKENS + t, square[i]);
        }
        for (int i = 0; i < W; i += 2)
            for (int64_t d = 0; d < padded; d += W) {
                const int n = dim - d < W ? int(dim - d) : W;
                vf pair[2] = {};  // widened: the number in the upper half
                for (int j = 0; j < 2; ++j) {
                    const bf16* from = reinterpret_cast<const bf16*>(value[i + j]) + d;
                    if (value[i + j] != nullptr) pair[j] = n == W ? load(from) : load_first(from, n);
                }
                store(values + (t + i) / 2 * padded + d, from_bits((vi)((vu)bits(pair[0]) >> 16) | bits(pair[1])));
            }
    }
}
#endif

struct QueryScratch {
    float *queries, *scores, *mixed, *keys, *values, *maxima, *totals;
};

// Rows begin .. end of a task against one tile of keys; the first row sees `seen` of them, one more for each query.
template <class T>
static void meet_tile(const QueryScratch& s, int64_t begin, int64_t end, int64_t group, int64_t seen, int tokens, int64_t dim) {
    const int64_t padded = round_up(dim, W), wide = round_up(dim, 2 * W), rows = end - begin;
    auto seen_of = [&](int64_t r) {
        const int64_t n = seen + r / group - begin / group;
        return n < tokens ? int(n) : tokens;
    };
    const int most = seen_of(end - 1), used = int(round_up(most, 2 * W));
    const float* queries = s.queries + begin * wide;
    float* mixed = s.mixed + begin * padded;
#if defined(__AVX512BF16__)
    if constexpr (Products<T>::PAIRED)
        product<Pairs>(queries, wide, rows, s.keys, TOKENS, round_up(most, W), dim / 2, s.scores, false);
#endif
    if constexpr (!Products<T>::PAIRED)
        product<Floats>(queries, wide, rows, s.keys, TOKENS, round_up(most, W), dim, s.scores, false);
    for (int64_t r = begin; r < end; ++r) {
        float* scores = s.scores + (r - begin) * TOKENS;
        const int n = seen_of(r);
        const float factor = soften<typename Products<T>::Power>(scores, n, s.maxima[r], s.totals[r]);
        for (int t = int(round_up(n, W)); t < used; t += W) store(scores + t, vf{});
#if defined(__AVX512BF16__)
        if constexpr (Products<T>::PAIRED)
            for (int t = 0; t < used; t += 2 * W) put_pairs(scores + t, scores + t / 2);
#endif
        if (factor != 1.0f)
            for (int64_t d = 0; d < padded; d += W) store(s.mixed + r * padded + d, load(s.mixed + r * padded + d) * factor);
    }
#if defined(__AVX512BF16__)
    if constexpr (Products<T>::PAIRED)
        product<Pairs>(s.scores, TOKENS, rows, s.values, padded, padded, (most + 1) / 2, mixed, true);
#endif
    if constexpr (!Products<T>::PAIRED) product<Floats>(s.scores, TOKENS, rows, s.values, padded, padded, most, mixed, true);
}

// Queries first .. last of a row (counted in the row) for one KV head.
template <class T>
static void chunk_task(const NexAttention& a, int64_t row, int64_t kv, int64_t first, int64_t last, const QueryScratch& s) {
    const int64_t dim = a.dim, padded = round_up(dim, W), wide = round_up(dim, 2 * W), group = a.heads / a.kv_heads;
    const int64_t start = a.starts[row], total_queries = a.starts[row + 1] - start, length = a.lengths[row];
    const int64_t count = last - first, rows = count * group;  // row r: query r / group, head r % group
    const int32_t* blocks = a.table + row * a.table_stride;
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = a.q + (start + first + r / group) * a.q_stride + (kv * group + r % group) * dim;
        put_query<T>(from, dim, a.scale, s.queries + r * wide);
        s.maxima[r] = LOWEST, s.totals[r] = 0.0f;
    }
    std::memset(s.mixed, 0, size_t(rows * padded) * 4);
    const int64_t before = length - total_queries + first;  // keys that the first query sees besides its own
    const int64_t keys = before + count;
    for (int64_t at = 0; at < keys; at += TOKENS) {
        const int tokens = keys - at < TOKENS ? int(keys - at) : TOKENS;
        if constexpr (!Products<T>::PAIRED) copy_keys<T>(a, blocks, kv, at, tokens, s.keys, s.values);
#if defined(__AVX512BF16__)
        if constexpr (Products<T>::PAIRED) copy_pairs(a, blocks, kv, at, tokens, s.keys, s.values);
#endif
        // rows before the first see nothing of this tile
        for (int64_t r = at > before ? (at - before) * group : 0; r < rows; r += ROWS_TOGETHER)
            meet_tile<T>(s, r, r + ROWS_TOGETHER < rows ? r + ROWS_TOGETHER : rows, group, before + r / group + 1 - at, tokens, dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* to = a.out + (start + first + r / group) * a.out_stride + (kv * group + r % group) * dim;
        const float inverse = 1.0f / s.totals[r];
        for (int64_t d = 0; d < dim; ++d) to[d] = s.mixed[r * padded + d] * inverse;
    }
}

// ---- the batch -----------------------------------------------------------------------------------------------------

struct Task {
    int32_t row, kv;         // kv < 0: a share of a row of one query
    int32_t first, last;     // keys of a share, queries of a chunk
    int64_t state;           // of a share: where its state lies
};

template <class T>
static void attention_of(const NexAttention& a, const NexTeam& team) {
    const int64_t dim = a.dim, padded = round_up(dim, W), wide = round_up(dim, 2 * W), group = a.heads / a.kv_heads;
    const int64_t state_size = round_up(2 * a.heads + a.heads * padded, 16);
    int64_t queries = QUERY_ROWS / group > 4 ? QUERY_ROWS / group : 4;
    int64_t tasks = 0, shares = 0, chunks = 0;
    auto chunks_of = [&](int64_t row) {
        const int64_t count = a.starts[row + 1] - a.starts[row];
        return count > 1 ? (count + queries - 1) / queries * a.kv_heads : 0;
    };
    for (;; queries /= 2) {
        chunks = 0;
        for (int64_t r = 0; r < a.rows; ++r) chunks += chunks_of(r);
        if (chunks == 0 || chunks >= 4 * team.threads || queries < 16) break;
    }
    constexpr int64_t share = SPLIT_TOKENS;
    for (int64_t r = 0; r < a.rows; ++r)
        if (a.starts[r + 1] - a.starts[r] == 1) shares += (a.lengths[r] + share - 1) / share;
    static thread_local Scratch task_memory, state_memory, local_memory;
    Task* list = task_memory.get<Task>(size_t(chunks + shares));
    float* states = state_memory.get<float>(size_t(shares * state_size));
    // chunks first, dealt to the threads by their keys: what is long must not begin last, nor all with one thread
    auto dealt = [&](int64_t i) {
        const int64_t thread = i % team.threads, more = chunks % team.threads;
        return thread * (chunks / team.threads) + (thread < more ? thread : more) + i / team.threads;
    };
    for (int64_t r = a.rows - 1; r >= 0; --r) {
        const int64_t count = a.starts[r + 1] - a.starts[r];
        if (count <= 1) continue;
        for (int64_t first = (count - 1) / queries * queries; first >= 0; first -= queries)
            for (int64_t kv = 0; kv < a.kv_heads; ++kv)
                list[dealt(tasks++)] = {int32_t(r), int32_t(kv), int32_t(first), int32_t(first + queries < count ? first + queries : count), 0};
    }
    int64_t states_used = 0, split = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
        if (a.starts[r + 1] - a.starts[r] != 1) continue;
        split += a.lengths[r] > share;
        for (int64_t at = 0; at < a.lengths[r]; at += share, states_used += state_size)
            list[tasks++] = {int32_t(r), -1, int32_t(at), int32_t(at + share < a.lengths[r] ? at + share : a.lengths[r]), states_used};
    }
    const int64_t most_rows = queries * group;
    const int64_t score_rows = ROWS_TOGETHER > a.heads ? ROWS_TOGETHER : a.heads;
    const size_t local = size_t(score_rows * TOKENS + most_rows * (round_up(dim, 2 * W) + padded + 2) + a.heads * wide + 2 * TOKENS * padded + 8 * 16);
    parallel(team, tasks, 1, [&](NexClaims& claims) {
        float* memory = local_memory.get<float>(local);
        QueryScratch s;
        auto take = [&](int64_t size) {
            float* taken = memory;
            memory += round_up(size, 16);
            return taken;
        };
        s.scores = take(score_rows * TOKENS), s.mixed = take(most_rows * padded), s.queries = take(most_rows * round_up(dim, 2 * W));
        s.keys = take(TOKENS * padded), s.values = take(TOKENS * padded);
        s.maxima = take(most_rows), s.totals = take(most_rows);
        float* query = take(a.heads * wide);
        for (int64_t i; (i = next(claims)) >= 0;) {
            const Task& task = list[i];
            if (task.kv >= 0) {
                chunk_task<T>(a, task.row, task.kv, task.first, task.last, s);
                continue;
            }
            const float* from = a.q + a.starts[task.row] * a.q_stride;
            for (int64_t h = 0; h < a.heads; ++h) put_query<T>(from + h * dim, dim, a.scale, query + h * wide);
            decode_share<T>(a, query, task.row, task.first, task.last, s.scores, states + task.state);
            if (task.first == 0 && task.last == a.lengths[task.row])
                merge<typename Products<T>::Power>(a, a.starts[task.row], states + task.state, 1, state_size);
        }
    });
    // rows that were split: their states lie one behind the other
    if (split == 0) return;
    parallel_for(team, tasks - chunks, 4, [&](int64_t i) {
        const Task& task = list[chunks + i];
        const int64_t length = a.lengths[task.row];
        if (task.first == 0 && task.last < length)
            merge<typename Products<T>::Power>(a, a.starts[task.row], states + task.state, (length + share - 1) / share, state_size);
    });
}

static void attention(const NexAttention& a, const NexTeam& team) {
    if (a.cache.kind == NEX_F32) attention_of<float>(a, team);
    else if (a.cache.kind == NEX_BF16) attention_of<bf16>(a, team);
    else attention_of<int8_t>(a, team);
}

}  // namespace
