// Linear maps with integer arithmetic: rows of x are quantised to 8 bits on the fly and multiplied by weights of 8 or 4
// bits. Same tasks and tiles as gemm.h, other inner loops.
//
//   INT8: x = a * scale of the row; sums over all of k stay integers, the scales of row and output come at the end.
//   Q4:   x = a * scale of a block of 32 numbers; a block's integers are summed, then scaled into float sums. The
//         minimum of a weight's block is multiplied by the sum of x's block.
//
// Four numbers of k go together: one 32-bit lane of an output's weights times four bytes of x.
#pragma once
#include "gemm.h"

namespace {

// ---- four products at a time, by instruction set -------------------------------------------------------------------
// Dot8: weights -127 .. 127. Dot4: weights 0 .. 15. LANES: accumulators a panel; Group: four numbers of x as they are
// kept in a tile; OFFSET: added to x, taken off again through the sums of the weights.

#if defined(__AVX512VNNI__)
struct Dot8 {
    typedef int32_t Group;
    typedef __m512i Sum;
    static constexpr int LANES = 1, ROWS = 12, PANELS = 2, OFFSET = 128;
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_loadu_si512(p); }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi32(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(s, x, w); }
    INLINE void put(const Sum* s, int32_t* out) { _mm512_storeu_si512(out, s[0]); }
};
struct Dot4 : Dot8 {
    static constexpr int OFFSET = 0;
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(s, w, x); }
};
#elif defined(__AVX2__)
// 8 bits by 8 bits do not fit the 16-bit sums of maddubs, so these are widened to 16 first.
struct Dot8 {
    typedef int64_t Group;
    static constexpr int OFFSET = 0;
#if defined(__AVX512F__)
    typedef __m512i Sum;
    static constexpr int LANES = 2, ROWS = 12, PANELS = 1;
    INLINE __m512i weights(const int8_t* p, int lane) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane));
    }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi64(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_add_epi32(s, _mm512_madd_epi16(w, x)); }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 4, ROWS = 3, PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + lane));
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi64x(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi32(s, _mm256_madd_epi16(w, x)); }
#endif
    INLINE void put(const Sum* s, int32_t* out) {
        int32_t pairs[2 * PANEL];
        std::memcpy(pairs, s, sizeof(pairs));
        for (int i = 0; i < PANEL; ++i) out[i] = pairs[2 * i] + pairs[2 * i + 1];
    }
};
// 4 bits by 8 bits do fit: a whole block is summed in 16 bits (8 * 2 * 15 * 127 < 2^15).
struct Dot4 {
    typedef int32_t Group;
    static constexpr int OFFSET = 0;
#if defined(__AVX512F__)
    typedef __m512i Sum;
    static constexpr int LANES = 1, ROWS = 12, PANELS = 2;
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_loadu_si512(p); }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi32(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_add_epi16(s, _mm512_maddubs_epi16(w, x)); }
    INLINE void put(const Sum* s, int32_t* out) {
        _mm512_storeu_si512(out, _mm512_madd_epi16(s[0], _mm512_set1_epi16(1)));
    }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 2, ROWS = 6, PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane);
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi32(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(w, x)); }
    INLINE void put(const Sum* s, int32_t* out) {
        const __m256i ones = _mm256_set1_epi16(1);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_madd_epi16(s[0], ones));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 1, _mm256_madd_epi16(s[1], ones));
    }
#endif
};
#else
struct Dot8 {
    typedef int32_t Group;
    typedef vi Sum;
    static constexpr int LANES = 4, ROWS = 6, PANELS = 1, OFFSET = 0;
    INLINE vi weights(const int8_t* p, int lane) { return bits(load(reinterpret_cast<const float*>(p) + lane * W)); }
    INLINE vi numbers(Group g) { return vi{} + g; }
    INLINE Sum add(Sum s, vi w, vi x) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(s, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
#else
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) s += ((w << (24 - 8 * j)) >> 24) * ((x << (24 - 8 * j)) >> 24);
        return s;
#endif
    }
    INLINE void put(const Sum* s, int32_t* out) { std::memcpy(out, s, PANEL * 4); }
};
typedef Dot8 Dot4;
#endif

// sums [ROWS][32] = tile [groups][ROWS] times panels [groups][16][4], as many as the registers hold.
template <class D, int ROWS>
static void multiply_integers(const typename D::Group* tile, int64_t groups, const int8_t* first, const int8_t* second,
                              int32_t* sums) {
    constexpr int N = D::PANELS * D::LANES;
    typename D::Sum acc[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v) acc[r][v] = typename D::Sum{};
    for (int64_t g = 0; g < groups; ++g) {
        decltype(D::numbers(0)) w[N];
#pragma GCC unroll 16
        for (int v = 0; v < N; ++v)
            w[v] = v < D::LANES ? D::weights(first + g * 4 * PANEL, v) : D::weights(second + g * 4 * PANEL, v - D::LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            auto x = D::numbers(tile[g * ROWS + r]);
#pragma GCC unroll 16
            for (int v = 0; v < N; ++v) acc[r][v] = D::add(acc[r][v], w[v], x);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < D::PANELS; ++p) D::put(&acc[r][p * D::LANES], sums + r * 2 * PANEL + p * PANEL);
}

template <class D>
static auto multiply_integers_for(int rows)
    -> void (*)(const typename D::Group*, int64_t, const int8_t*, const int8_t*, int32_t*) {
#define NEX_CASE(R) \
    case R: return multiply_integers<D, (R <= D::ROWS ? R : 1)>;
    switch (rows) {
        NEX_CASE(1) NEX_CASE(2) NEX_CASE(3) NEX_CASE(4) NEX_CASE(5) NEX_CASE(6)
        NEX_CASE(7) NEX_CASE(8) NEX_CASE(9) NEX_CASE(10) NEX_CASE(11) NEX_CASE(12)
    }
#undef NEX_CASE
    return nullptr;
}

// Both panels of a pair. second null: there is one, and what is in the other's columns does not matter.
template <class D>
static void multiply_integers_pair(int rows, const typename D::Group* tile, int64_t groups, const int8_t* first,
                                   const int8_t* second, int32_t* sums) {
    auto kernel = multiply_integers_for<D>(rows);
    kernel(tile, groups, first, second != nullptr ? second : first, sums);
    if (second != nullptr && D::PANELS == 1) kernel(tile, groups, second, second, sums + PANEL);
}

// ---- x in integers ---------------------------------------------------------------------------------------------------

INLINE void put_group(int32_t* to, const int32_t* four) {
    *to = int32_t(uint32_t(four[0] & 255) | uint32_t(four[1] & 255) << 8 | uint32_t(four[2] & 255) << 16 | uint32_t(four[3] & 255) << 24);
}
INLINE void put_group(int64_t* to, const int32_t* four) {
    const int16_t narrow[4] = {int16_t(four[0]), int16_t(four[1]), int16_t(four[2]), int16_t(four[3])};
    std::memcpy(to, narrow, 8);
}

// Where a tile's integers, scales and block sums lie. blocks: 1 for INT8, k / 32 for Q4.
template <class D>
struct IntegerTile {
    typename D::Group* groups;  // [k / 4][height]
    float* scales;              // [blocks][height]
    float* totals;              // [blocks][height]: scale times the sum of the integers
};

// Rows of x, normalised, as integers of `block` numbers a scale. A block with a NaN or an infinity gets a NaN for a scale.
template <class D>
static void quantise_tile(const NexLinear& op, int64_t row, int height, int64_t block, float* line, const IntegerTile<D>& to) {
    const int64_t k = op.weight->k, filled = round_up(k, 64);
    for (int r = 0; r < height; ++r) {
        const float* x = op.x + (row + r) * op.x_stride;
        const float factor = op.norm == nullptr ? 1.0f : inverse_rms(x, k, op.eps);
        if (op.norm == nullptr) std::memcpy(line, x, size_t(k) * 4);
        else
            for (int64_t i = 0; i < k; ++i) line[i] = x[i] * factor * op.norm[i];
        for (int64_t i = k; i < filled; ++i) line[i] = 0.0f;
        for (int64_t b = 0, at = 0; at < k; ++b, at += block) {
            const int64_t end = at + block < k ? at + block : k;
            vf peak{}, strange{};
            for (int64_t i = at; i < end; i += W) {
                vf v = load(line + i);
                peak = larger(select(v < vf{}, -v, v), peak);
                strange += v * 0.0f;
            }
            const float size = largest(peak), odd = sum(strange);
            const float scale = size / 127.0f + odd, inverse = size > 0.0f && odd == 0.0f ? 127.0f / size : 0.0f;
            const vf round = splat(12582912.0f);  // see exponential
            vi total{};
            for (int64_t i = at; i < end; i += W) {
                vf v = odd == 0.0f ? load(line + i) : vf{};
                vi q = bits(v * inverse + round) - bits(round);
                total += q;
                int32_t numbers[W];
                q += D::OFFSET;
                std::memcpy(numbers, &q, sizeof(q));
                for (int j = 0; j < W && i + j < end; j += 4) put_group(to.groups + (i + j) / 4 * height + r, numbers + j);
            }
            to.scales[b * height + r] = scale;
            to.totals[b * height + r] = sum(__builtin_convertvector(total, vf)) * scale;
        }
    }
}

// ---- tasks -------------------------------------------------------------------------------------------------------------

// Integers of a piece of a Q4 panel [count / 4][16][4].
static void unpack_integers(const NexWeight& w, int64_t panel, int64_t k0, int64_t count, int8_t* out) {
    const uint8_t* from = static_cast<const uint8_t*>(w.data) + panel * panel_bytes(w) + k0 / 2 * PANEL;
    for (int64_t i = 0; i < count / 8; ++i)
        for (int j = 0; j < 4 * PANEL; ++j) {
            out[i * 8 * PANEL + j] = int8_t(from[i * 4 * PANEL + j] & 15);
            out[i * 8 * PANEL + 4 * PANEL + j] = int8_t(from[i * 4 * PANEL + j] >> 4);
        }
}

// Integer sums of a block into float sums.
static void add_block(const NexWeight& w, int64_t panel, int64_t block, int height, const int32_t* integers, const float* scales,
                      const float* totals, float* sums, bool add) {
    const int64_t at = (panel * (w.k / 32) + block) * PANEL;
#pragma GCC unroll 4
    for (int v = 0; v < PANEL_VECTORS; ++v) {
        const vf scale = load(static_cast<const half*>(w.scale) + at + v * W);
        const vf minimum = load(static_cast<const half*>(w.minimum) + at + v * W);
        for (int r = 0; r < height; ++r) {
            vi found = bits(load(reinterpret_cast<const float*>(integers) + r * 2 * PANEL + v * W));
            float* sum = sums + r * 2 * PANEL + v * W;
            vf total = add ? load(sum) : vf{};
            total += __builtin_convertvector(found, vf) * (scale * scales[r]);
            store(sum, total + minimum * totals[r]);
        }
    }
}

template <class D>
static void integer_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t pair, int64_t t0,
                         int64_t t1, float* sums, int8_t* pieces) {
    const NexWeight& w = *op.weight;
    const int64_t half_panels = panels_of(w.n / 2), all = op.finish == NEX_GATED ? 2 * half_panels : panels_of(w.n);
    const int64_t first = op.finish == NEX_GATED ? pair : 2 * pair;
    const int64_t second = op.finish == NEX_GATED ? half_panels + pair : first + 1;
    const bool two = second < all;
    const int64_t row = tiles.begin(t0);
    if (w.kind == NEX_INT8) {
        const int64_t groups = (w.k + 3) / 4;
        const int8_t* data = static_cast<const int8_t*>(w.data);
        const int8_t *a = data + first * groups * 4 * PANEL, *b = two ? data + second * groups * 4 * PANEL : nullptr;
        const float *scale = static_cast<const float*>(w.scale), *total = static_cast<const float*>(w.minimum);
        for (int64_t t = t0; t < t1; ++t) {
            const int height = tiles.height(t);
            float* out = sums + (tiles.begin(t) - row) * 2 * PANEL;
            int32_t found[12 * 2 * PANEL];
            multiply_integers_pair<D>(height, copied[t].groups, groups, a, b, found);
            for (int r = 0; r < height; ++r)
                for (int p = 0; p < (two ? 2 : 1); ++p) {
                    const int64_t at = (p == 0 ? first : second) * PANEL;
                    const int32_t* integers = found + r * 2 * PANEL + p * PANEL;
                    for (int i = 0; i < PANEL; ++i)
                        out[r * 2 * PANEL + p * PANEL + i] =
                            float(integers[i] - D::OFFSET * int32_t(total[at + i])) * scale[at + i] * copied[t].scales[r];
                }
        }
    } else {
        for (int64_t k = 0; k < w.k; k += PIECE) {
            const int64_t count = w.k - k < PIECE ? w.k - k : PIECE;
            unpack_integers(w, first, k, count, pieces);
            if (two) unpack_integers(w, second, k, count, pieces + PIECE * PANEL);
            for (int64_t t = t0; t < t1; ++t) {
                const int height = tiles.height(t);
                float* out = sums + (tiles.begin(t) - row) * 2 * PANEL;
                for (int64_t i = 0; i < count; i += 32) {
                    const int64_t block = (k + i) / 32;
                    int32_t found[12 * 2 * PANEL];
                    multiply_integers_pair<D>(height, copied[t].groups + (k + i) / 4 * height, 8, pieces + i * PANEL,
                                              two ? pieces + (PIECE + i) * PANEL : nullptr, found);
                    const float *scales = copied[t].scales + block * height, *totals = copied[t].totals + block * height;
                    add_block(w, first, block, height, found, scales, totals, out, k + i > 0);
                    if (two) add_block(w, second, block, height, found + PANEL, scales, totals, out + PANEL, k + i > 0);
                }
            }
        }
    }
    finish(op, pair, row, tiles.begin(t1) - row, sums);
}

template <class D>
static void linear_integers(const NexLinear& op, int threads) {
    const NexWeight& w = *op.weight;
    const Tiles tiles(op.rows, D::ROWS);
    const int64_t pairs = op.finish == NEX_GATED ? panels_of(w.n / 2) : (panels_of(w.n) + 1) / 2;
    const int64_t shares = shares_of(tiles, pairs, threads);
    const int64_t block = w.kind == NEX_Q4 ? 32 : w.k, blocks = w.kind == NEX_Q4 ? w.k / 32 : 1;
    const int64_t groups = (w.k + 3) / 4;
    const bool shared = op.rows > PRIVATE_ROWS;
    // every tile: its groups, then scales and totals
    const int64_t row_bytes = round_up(groups * int64_t(sizeof(typename D::Group)) + 8 * blocks, 8);
    static thread_local Scratch copies, locals;
    const size_t list_bytes = size_t(tiles.count) * sizeof(IntegerTile<D>), copy_bytes = list_bytes + size_t(op.rows * row_bytes);
    char* common = shared ? copies.get<char>(copy_bytes) : nullptr;
    auto lay_out = [&](char* memory) {
        auto* list = reinterpret_cast<IntegerTile<D>*>(memory);
        memory += list_bytes;
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t height = tiles.height(t);
            list[t].groups = reinterpret_cast<typename D::Group*>(memory);
            list[t].scales = reinterpret_cast<float*>(list[t].groups + groups * height);
            list[t].totals = list[t].scales + blocks * height;
            memory += height * row_bytes;
        }
        return list;
    };
    IntegerTile<D>* list = shared ? lay_out(common) : nullptr;
#pragma omp parallel num_threads(threads)
    {
        const size_t sums_bytes = size_t(TASK_TILES) * size_t(D::ROWS) * 2 * PANEL * 4;
        const size_t line_bytes = size_t(round_up(w.k, 64)) * 4;
        char* memory = locals.get<char>(sums_bytes + line_bytes + 2 * PIECE * PANEL + (shared ? 0 : copy_bytes));
        float *sums = reinterpret_cast<float*>(memory), *line = reinterpret_cast<float*>(memory + sums_bytes);
        int8_t* pieces = reinterpret_cast<int8_t*>(memory + sums_bytes + line_bytes);
        IntegerTile<D>* mine = list;
        if (shared) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles.count; ++t)
                quantise_tile<D>(op, tiles.begin(t), tiles.height(t), block, line, mine[t]);
        } else {
            mine = lay_out(memory + sums_bytes + line_bytes + 2 * PIECE * PANEL);
            for (int64_t t = 0; t < tiles.count; ++t)
                quantise_tile<D>(op, tiles.begin(t), tiles.height(t), block, line, mine[t]);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < pairs * shares; ++task) {
            const int64_t pair = task / shares, share = task % shares;
            integer_task<D>(op, tiles, mine, pair, share * tiles.count / shares, (share + 1) * tiles.count / shares, sums,
                            pieces);
        }
    }
}

}  // namespace
