// Rows of one query: all heads together, in splits of a row that are merged at the end.
#pragma once
#include "attention_math.h"

namespace {

// The sums of G vectors times a factor, TOKENS apart.
template <int G>
INLINE void store_sums(const vf (&acc)[G], float factor, float* out) {
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
        unroll<G>(EACH(g) { out[g * TOKENS] = sums[int(g)]; });
        return;
    }
#endif
    unroll<G>(EACH(g) { out[g * TOKENS] = sum(acc[g]) * factor; });
}

// scores [G] of one key against G queries of its group; q rows are padded with zeros to `wide`.
template <int G, class T>
INLINE void score(const float* q, int64_t wide, const T* key, int64_t dim, float* scores, Floats) {
    vf acc[G] = {};
    int64_t d = 0;
    for (; d + W <= dim; d += W) {
        const vf k = load(key + d);
        unroll<G>(EACH(g) { acc[g] += load(q + g * wide + d) * k; });
    }
    if (d < dim) {
        const vf k = load_first(key + d, int(dim - d));
        unroll<G>(EACH(g) { acc[g] += load(q + g * wide + d) * k; });
    }
    store_sums<G>(acc, row_scale(key, dim), scores);
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
        unroll<G>(EACH(g) { acc[g] = _mm512_dpbf16_ps(acc[g], (__m512bh)load(q + g * wide + d / 2), (__m512bh)k); });
    }
    store_sums<G>(acc, 1.0f, scores);
}
#endif

// out [G][padded] += weights [G][TOKENS] times `count` values, each `offset` bytes behind its token's.
template <int G, class T>
INLINE void accumulate_values(const float* weights, const char* const* values, int64_t offset, int count, int64_t dim, int64_t padded,
                float* out) {
    auto value = [&](int t) __attribute__((always_inline)) { return reinterpret_cast<const T*>(values[t] + offset); };
    constexpr int D = W == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + D * W <= dim; d += D * W) {
        vf acc[G][D];
        unroll<G>(EACH(g) { unroll<D>(EACH(i) { acc[g][i] = load(out + g * padded + d + i * W); }); });
        for (int t = 0; t < count; ++t) {
            vf v[D];
            unroll<D>(EACH(i) { v[i] = load(value(t) + d + i * W); });
            unroll<G>(EACH(g) {
                const vf weight = splat(weights[g * TOKENS + t]);
                unroll<D>(EACH(i) { acc[g][i] += weight * v[i]; });
            });
        }
        unroll<G>(EACH(g) { unroll<D>(EACH(i) { store(out + g * padded + d + i * W, acc[g][i]); }); });
    }
    for (; d < dim; d += W) {
        const int n = dim - d < W ? int(dim - d) : W;
        vf acc[G];
        unroll<G>(EACH(g) { acc[g] = load(out + g * padded + d); });
        for (int t = 0; t < count; ++t) {
            const vf v = n < W ? load_first(value(t) + d, n) : load(value(t) + d);
            unroll<G>(EACH(g) { acc[g] += splat(weights[g * TOKENS + t]) * v; });
        }
        unroll<G>(EACH(g) { store(out + g * padded + d, acc[g]); });
    }
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
static void decode_split(const NexAttention& a, const float* q, int64_t row, int64_t begin, int64_t end, float* scores,
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
            const int64_t offset = kv_offset(a.cache, blocks, at + t);
            keys[t] = static_cast<const char*>(a.cache.k) + offset;
            values[t] = static_cast<const char*>(a.cache.v) + offset;
        }
        for (int t = 0; t < count; ++t) {
            for (int64_t line = 0; line < a.kv_heads * head_bytes; line += 64) __builtin_prefetch(values[t] + line);
            head_groups(a.kv_heads, group, [&](auto g, int64_t kv, int64_t h) __attribute__((always_inline)) {
                const T* key = reinterpret_cast<const T*>(keys[t] + kv * head_bytes);
                score<g>(q + h * wide, wide, key, dim, scores + h * TOKENS + t, typename Products<T>::Lanes{});
            });
        }
        for (int64_t h = 0; h < a.heads; ++h) {
            const float factor = online_softmax_update<typename Products<T>::Power>(scores + h * TOKENS, count, maxima[h], totals[h]);
            if (factor != 1.0f)
                for (int64_t d = 0; d < padded; d += W) store(out + h * padded + d, load(out + h * padded + d) * factor);
            if (sizeof(T) == 1)
                for (int t = 0; t < count; ++t)
                    scores[h * TOKENS + t] *= row_scale(reinterpret_cast<const T*>(values[t] + h / group * head_bytes), dim);
        }
        head_groups(a.kv_heads, group, [&](auto g, int64_t kv, int64_t h) __attribute__((always_inline)) {
            accumulate_values<g, T>(scores + h * TOKENS, values, kv * head_bytes, count, dim, padded, out + h * padded);
        });
    }
}

// The splits of a row merged into its output.
template <class Power>
static void merge_splits(const NexAttention& a, int64_t token, const float* states, int64_t shares, int64_t size) {
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

}  // namespace
