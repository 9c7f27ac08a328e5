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

static constexpr int64_t BLOCK_PIECE = 512;  // numbers of k of Q4 that are unpacked at a time

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
    static constexpr int ROWS = 10, OFFSET = 0;  // with 12 rows, sums would not stay in registers
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(s, w, x); }
    INLINE vi total(Sum s) { return reinterpret_cast<vi>(s); }
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
    INLINE vi total(Sum s) { return reinterpret_cast<vi>(_mm512_madd_epi16(s, _mm512_set1_epi16(1))); }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 2, ROWS = 6, PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane);
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi32(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(w, x)); }
    INLINE vi total(Sum s) { return reinterpret_cast<vi>(_mm256_madd_epi16(s, _mm256_set1_epi16(1))); }
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
    INLINE vi total(Sum s) { return s; }
};
typedef Dot8 Dot4;
#endif

// acc [ROWS][N] += tile [ROWS] times a group of panels [16][4], as many panels as the registers hold.
template <class D, int ROWS, class Sums>
INLINE void add_group(const typename D::Group* tile, const int8_t* first, const int8_t* second, Sums& acc) {
    constexpr int N = D::PANELS * D::LANES;
    auto weights = [&](int v) __attribute__((always_inline)) {
        return v < D::LANES ? D::weights(first, v) : D::weights(second, v - D::LANES);
    };
    if constexpr (ROWS < N) {  // the smaller side stays in registers
        decltype(D::numbers(0)) x[ROWS];
        each<ROWS>(EACH(r) { x[r] = D::numbers(tile[r]); });
        each<N>(EACH(v) {
            const auto w = weights(v);
            each<ROWS>(EACH(r) { acc[r][v] = D::add(acc[r][v], w, x[r]); });
        });
    } else {
        decltype(D::numbers(0)) w[N];
        each<N>(EACH(v) { w[v] = weights(v); });
        each<ROWS>(EACH(r) {
            const auto x = D::numbers(tile[r]);
            each<N>(EACH(v) { acc[r][v] = D::add(acc[r][v], w[v], x); });
        });
    }
}

// sums [ROWS][32] = tile [groups][ROWS] times panels [groups][16][4].
template <class D, int ROWS>
static void multiply_integers(const typename D::Group* tile, int64_t groups, const int8_t* first, const int8_t* second,
                              int32_t* sums) {
    typename D::Sum acc[ROWS][D::PANELS * D::LANES] = {};
    for (int64_t g = 0; g < groups; ++g)
        add_group<D, ROWS>(tile + g * ROWS, first + g * 4 * PANEL, second + g * 4 * PANEL, acc);
    each<ROWS>(EACH(r) {
        each<D::PANELS>(EACH(p) {
            typename D::Sum part[D::LANES];
            each<D::LANES>(EACH(i) { part[i] = acc[r][p * D::LANES + i]; });
            D::put(part, sums + r * 2 * PANEL + p * PANEL);
        });
    });
}

// sums [ROWS][32] += `blocks` blocks of 8 groups, each block scaled: by scale [blocks][16] of its outputs, by x_scale
// [blocks][ROWS] of its rows.
template <class D, int ROWS>
static void multiply_blocks(const typename D::Group* tile, int64_t blocks, const int8_t* first, const int8_t* second,
                            const float* first_scale, const float* second_scale, const float* x_scale, float* sums) {
    constexpr int N = D::PANELS * D::LANES;
    for (int64_t b = 0; b < blocks; ++b) {
        typename D::Sum acc[ROWS][N] = {};
        for (int64_t g = 8 * b; g < 8 * b + 8; ++g)
            add_group<D, ROWS>(tile + g * ROWS, first + g * 4 * PANEL, second + g * 4 * PANEL, acc);
        each<N>(EACH(v) {
            const vf scale = v < D::LANES ? load(first_scale + b * PANEL + v * W)
                                          : load(second_scale + b * PANEL + (v - D::LANES) * W);
            each<ROWS>(EACH(r) {
                float* sum = sums + r * 2 * PANEL + v * W;
                const vf found = __builtin_convertvector(D::total(acc[r][v]), vf) * scale;
                store(sum, load(sum) + found * splat(x_scale[b * ROWS + r]));
            });
        });
    }
}

#define NEX_CASES(FUNCTION) \
    NEX_CASE(FUNCTION, 1) NEX_CASE(FUNCTION, 2) NEX_CASE(FUNCTION, 3) NEX_CASE(FUNCTION, 4) NEX_CASE(FUNCTION, 5) \
    NEX_CASE(FUNCTION, 6) NEX_CASE(FUNCTION, 7) NEX_CASE(FUNCTION, 8) NEX_CASE(FUNCTION, 9) NEX_CASE(FUNCTION, 10) \
    NEX_CASE(FUNCTION, 11) NEX_CASE(FUNCTION, 12)
#define NEX_CASE(FUNCTION, R) \
    case R: return FUNCTION<D, (R <= D::ROWS ? R : 1)>;

template <class D>
static auto multiply_integers_for(int rows)
    -> void (*)(const typename D::Group*, int64_t, const int8_t*, const int8_t*, int32_t*) {
    switch (rows) { NEX_CASES(multiply_integers) }
    return nullptr;
}

template <class D>
static auto multiply_blocks_for(int rows) -> void (*)(const typename D::Group*, int64_t, const int8_t*, const int8_t*,
                                                      const float*, const float*, const float*, float*) {
    switch (rows) { NEX_CASES(multiply_blocks) }
    return nullptr;
}
#undef NEX_CASE
#undef NEX_CASES

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

// Halves as floats.
static void unpack_halves(const void* from, int64_t at, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += W) store(out + i, load(static_cast<const half*>(from) + at + i));
}

// What a thread works with. sums [rows of a task][32]; the rest for a piece of two panels of Q4.
struct IntegerScratch {
    float *sums, *line, *scales, *minima;
    int8_t* numbers;
};

template <class D>
static void int8_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t first, int64_t second,
                      int64_t t0, int64_t t1, float* sums) {
    const NexWeight& w = *op.weight;
    const int64_t groups = (w.k + 3) / 4;
    const int8_t *a = static_cast<const int8_t*>(w.data) + first * groups * 4 * PANEL, *b = nullptr;
    if (second >= 0) b = static_cast<const int8_t*>(w.data) + second * groups * 4 * PANEL;
    const float *scale = static_cast<const float*>(w.scale), *total = static_cast<const float*>(w.minimum);
    for (int64_t t = t0; t < t1; ++t) {
        const int height = tiles.height(t);
        float* out = sums + (tiles.begin(t) - tiles.begin(t0)) * 2 * PANEL;
        alignas(64) int32_t found[12 * 2 * PANEL];
        auto kernel = multiply_integers_for<D>(height);
        kernel(copied[t].groups, groups, a, b != nullptr ? b : a, found);
        if (b != nullptr && D::PANELS == 1) kernel(copied[t].groups, groups, b, b, found + PANEL);
        for (int p = 0; p < (b != nullptr ? 2 : 1); ++p)
            for (int v = 0; v < PANEL; v += W) {
                const int64_t at = (p == 0 ? first : second) * PANEL + v;
                const vf factor = load(scale + at), off = load(total + at) * float(D::OFFSET);
                for (int r = 0; r < height; ++r) {
                    const int64_t i = r * 2 * PANEL + p * PANEL + v;
                    // both are whole numbers, exact in 32 bits; only their difference is rounded
                    vi whole = bits(load(reinterpret_cast<const float*>(found) + i)) - __builtin_convertvector(off, vi);
                    store(out + i, __builtin_convertvector(whole, vf) * factor * copied[t].scales[r]);
                }
            }
    }
}

template <class D>
static void q4_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t first, int64_t second,
                    int64_t t0, int64_t t1, const IntegerScratch& s) {
    const NexWeight& w = *op.weight;
    constexpr int64_t BLOCKS = BLOCK_PIECE / 32 * PANEL;
    for (int64_t k = 0; k < w.k; k += BLOCK_PIECE) {
        const int64_t count = w.k - k < BLOCK_PIECE ? w.k - k : BLOCK_PIECE, block = k / 32, blocks = count / 32;
        for (int p = 0; p < (second >= 0 ? 2 : 1); ++p) {
            const int64_t panel = p == 0 ? first : second, at = (panel * (w.k / 32) + block) * PANEL;
            unpack_integers(w, panel, k, count, s.numbers + p * BLOCK_PIECE * PANEL);
            unpack_halves(w.scale, at, blocks * PANEL, s.scales + p * BLOCKS);
            unpack_halves(w.minimum, at, blocks * PANEL, s.minima + p * BLOCKS);
        }
        const int8_t *a = s.numbers, *b = second >= 0 ? a + BLOCK_PIECE * PANEL : nullptr;
        for (int64_t t = t0; t < t1; ++t) {
            const int height = tiles.height(t);
            float* out = s.sums + (tiles.begin(t) - tiles.begin(t0)) * 2 * PANEL;
            // the minima times the sums of x: an ordinary product over blocks
            multiply_pair(height, copied[t].totals + block * height, blocks, s.minima, b != nullptr ? s.minima + BLOCKS : nullptr,
                          out, k > 0);
            auto kernel = multiply_blocks_for<D>(height);
            const auto* groups = copied[t].groups + k / 4 * height;
            const float* scales = copied[t].scales + block * height;
            kernel(groups, blocks, a, b != nullptr ? b : a, s.scales, b != nullptr ? s.scales + BLOCKS : s.scales, scales, out);
            if (b != nullptr && D::PANELS == 1)
                kernel(groups, blocks, b, b, s.scales + BLOCKS, s.scales + BLOCKS, scales, out + PANEL);
        }
    }
}

template <class D, bool Q4>
static void linear_integers(const NexLinear& op, int threads) {
    const NexWeight& w = *op.weight;
    const Tiles tiles(op.rows, D::ROWS);
    const int64_t pairs = op.finish == NEX_GATED ? panels_of(w.n / 2) : (panels_of(w.n) + 1) / 2;
    const int64_t shares = shares_of(tiles, pairs, threads);
    const int64_t block = Q4 ? 32 : w.k, blocks = Q4 ? w.k / 32 : 1;
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
        constexpr int64_t sums = TASK_TILES * D::ROWS * 2 * PANEL, blocks_piece = 2 * BLOCK_PIECE / 32 * PANEL;
        const int64_t floats = sums + 2 * blocks_piece + round_up(w.k, 64), numbers = 2 * BLOCK_PIECE * PANEL;
        char* memory = locals.get<char>(size_t(4 * floats + numbers) + (shared ? 0 : copy_bytes));
        float* line = reinterpret_cast<float*>(memory) + sums + 2 * blocks_piece;
        const IntegerScratch s{reinterpret_cast<float*>(memory), line, line - 2 * blocks_piece, line - blocks_piece,
                               reinterpret_cast<int8_t*>(memory) + 4 * floats};
        IntegerTile<D>* mine = list;
        if (shared) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tiles.count; ++t)
                quantise_tile<D>(op, tiles.begin(t), tiles.height(t), block, line, mine[t]);
        } else {
            mine = lay_out(memory + 4 * floats + numbers);
            for (int64_t t = 0; t < tiles.count; ++t)
                quantise_tile<D>(op, tiles.begin(t), tiles.height(t), block, line, mine[t]);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < pairs * shares; ++task) {
            const int64_t pair = task / shares, share = task % shares;
            const int64_t t0 = share * tiles.count / shares, t1 = (share + 1) * tiles.count / shares;
            const bool gated = op.finish == NEX_GATED;
            const int64_t first = gated ? pair : 2 * pair, next = gated ? pairs + pair : first + 1;
            const int64_t second = gated || next < panels_of(w.n) ? next : -1;
            if constexpr (Q4) q4_task<D>(op, tiles, mine, first, second, t0, t1, s);
            else int8_task<D>(op, tiles, mine, first, second, t0, t1, s.sums);
            finish(op, pair, tiles.begin(t0), tiles.begin(t1) - tiles.begin(t0), s.sums);
        }
    }
}

}  // namespace
