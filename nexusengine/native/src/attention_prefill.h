// Rows of many queries: the query heads of a group and their queries are the rows of two small matrix products.
#pragma once
#include "attention_math.h"

namespace {

// sums [rows][columns] (+)= a [rows][k] times b [k][columns]; strides and k in lanes of P, columns a multiple of W.
template <class P, int ROWS, int VECTORS>
INLINE void product_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t k, float* sums,
                         int64_t stride, bool add) {
    vf acc[ROWS][VECTORS];
    unroll<ROWS>(EACH(r) { unroll<VECTORS>(EACH(v) { acc[r][v] = add ? load(sums + r * stride + v * W) : vf{}; }); });
    for (int64_t i = 0; i < k; ++i) {
        vf line[VECTORS];
        unroll<VECTORS>(EACH(v) { line[v] = load(b + i * b_stride + v * W); });
        unroll<ROWS>(EACH(r) {
            unroll<VECTORS>(EACH(v) { acc[r][v] = P::add(acc[r][v], a + r * a_stride + i, line[v]); });
        });
    }
    unroll<ROWS>(EACH(r) { unroll<VECTORS>(EACH(v) { store(sums + r * stride + v * W, acc[r][v]); }); });
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
static void copy_tile(const NexAttention& a, const int32_t* blocks, int64_t kv, int64_t at, int count, float* keys,
                      float* values, Floats) {
    const int64_t dim = a.dim, padded = round_up(dim, W), stop = round_up(count, W);
    for (int64_t t = 0; t < stop; t += W) {
        const T *key[W] = {}, *value[W] = {};
        float key_scale[W], value_scale[W];
        for (int i = 0; i < W && t + i < count; ++i) {
            const int64_t offset = kv_offset(a.cache, blocks, at + t + i) + kv * a.cache.head_bytes;
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
template <class T>
static void copy_tile(const NexAttention& a, const int32_t* blocks, int64_t kv, int64_t at, int count, float* keys,
                      float* values, Pairs) {
    const int64_t dim = a.dim, padded = round_up(dim, W), stop = round_up(count, W);
    for (int64_t t = 0; t < stop; t += W) {
        const char *key[W] = {}, *value[W] = {};
        for (int i = 0; i < W && t + i < count; ++i) {
            const int64_t offset = kv_offset(a.cache, blocks, at + t + i) + kv * a.cache.head_bytes;
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
static void attend_tile(const QueryScratch& s, int64_t begin, int64_t end, int64_t group, int64_t seen, int tokens, int64_t dim) {
    typedef Products<T> P;
    const int64_t padded = round_up(dim, W), wide = round_up(dim, 2 * W), rows = end - begin;
    auto seen_of = [&](int64_t r) {
        const int64_t n = seen + r / group - begin / group;
        return n < tokens ? int(n) : tokens;
    };
    const int most = seen_of(end - 1), used = int(round_up(most, 2 * W));
    const float* queries = s.queries + begin * wide;
    float* mixed = s.mixed + begin * padded;
    product<typename P::Lanes>(queries, wide, rows, s.keys, TOKENS, round_up(most, W), P::lanes(dim), s.scores, false);
    for (int64_t r = begin; r < end; ++r) {
        float* scores = s.scores + (r - begin) * TOKENS;
        const int n = seen_of(r);
        const float factor = online_softmax_update<typename P::Power>(scores, n, s.maxima[r], s.totals[r]);
        for (int t = int(round_up(n, W)); t < used; t += W) store(scores + t, vf{});
        P::pack(scores, used);
        if (factor != 1.0f)
            for (int64_t d = 0; d < padded; d += W) store(s.mixed + r * padded + d, load(s.mixed + r * padded + d) * factor);
    }
    product<typename P::Lanes>(s.scores, TOKENS, rows, s.values, padded, padded, P::lanes(most), mixed, true);
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
        pack_query<T>(from, dim, a.scale, s.queries + r * wide);
        s.maxima[r] = LOWEST, s.totals[r] = 0.0f;
    }
    std::memset(s.mixed, 0, size_t(rows * padded) * 4);
    const int64_t before = length - total_queries + first;  // keys that the first query sees besides its own
    const int64_t keys = before + count;
    for (int64_t at = 0; at < keys; at += TOKENS) {
        const int tokens = keys - at < TOKENS ? int(keys - at) : TOKENS;
        copy_tile<T>(a, blocks, kv, at, tokens, s.keys, s.values, typename Products<T>::Lanes{});
        // rows before the first see nothing of this tile
        for (int64_t r = at > before ? (at - before) * group : 0; r < rows; r += ROWS_TOGETHER)
            attend_tile<T>(s, r, r + ROWS_TOGETHER < rows ? r + ROWS_TOGETHER : rows, group, before + r / group + 1 - at, tokens, dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* to = a.out + (start + first + r / group) * a.out_stride + (kv * group + r % group) * dim;
        const float inverse = 1.0f / s.totals[r];
        for (int64_t d = 0; d < dim; ++d) to[d] = s.mixed[r * padded + d] * inverse;
    }
}

}  // namespace
