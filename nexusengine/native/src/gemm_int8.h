// Linear maps with integer arithmetic: rows of x are quantised to 8 bits on the fly and multiplied by weights of 8 or 4
// bits. Same tasks and tiles as gemm.h, other inner loops.
//
// x = a * scale of a block of 64 (INT8) or 32 (Q4) numbers of a row: one scale a row would lose what lies beside an
// outlier. A block's products are summed as integers, then scaled into float sums. INT8 has one scale an output, which
// comes at the end; Q4 has one a block, and a minimum that is multiplied by the sum of x's block.
//
// Four numbers of k go together: one 32-bit lane of an output's weights times four bytes of x.
#pragma once
#include "gemm.h"

namespace {

static constexpr int64_t BLOCK_PIECE = 512;  // numbers of k of Q4 that are unpacked at a time

// ---- four products at a time, by instruction set -------------------------------------------------------------------
// Dot8: weights -127 .. 127. Dot4: weights 0 .. 15. GROUPS: of four numbers in a block. LANES: accumulators a panel.
// Group: four numbers of x as they are kept in a tile. begin: a sum before the first product, from the sum of x.
// KEPT: registers hold the float sums of a tile as well, so that they stay there from the first block to the last.

#if defined(__AVX512VNNI__)
// One side of the products is without sign: weights are moved up by 128, which is taken off again before it is added.
struct Dot8 {
    typedef int32_t Group;
    typedef __m512i Sum;
    static constexpr int LANES = 1, ROWS = at_most(6), PANELS = 2, GROUPS = 16;
    static constexpr bool KEPT = true;
    INLINE Sum begin(int32_t x_sum) { return _mm512_set1_epi32(-128 * x_sum); }
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi32(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(s, w, x); }
    INLINE vi total(const Sum* s, int) { return reinterpret_cast<vi>(s[0]); }
};
struct Dot4 : Dot8 {
    static constexpr int GROUPS = 8;
    INLINE Sum begin(int32_t) { return Sum{}; }
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_loadu_si512(p); }
    INLINE __m512i low(__m512i both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
    INLINE __m512i high(__m512i both) { return low(_mm512_srli_epi16(both, 4)); }
};
#elif defined(__AVX2__)
// 8 bits by 8 bits do not fit the 16-bit sums of maddubs, so these are widened to 16 first. Every sum is of two of the
// four products: `total` adds neighbours.
struct Dot8 {
    typedef int64_t Group;
    static constexpr int GROUPS = 16;
    static constexpr bool KEPT = false;
#if defined(__AVX512F__)
    typedef __m512i Sum;
    static constexpr int LANES = 2, ROWS = at_most(12), PANELS = 1;
    INLINE __m512i weights(const int8_t* p, int lane) {
        return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane));
    }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi64(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_add_epi32(s, _mm512_madd_epi16(w, x)); }
    INLINE vi total(const Sum* s, int) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        return reinterpret_cast<vi>(_mm512_add_epi32(_mm512_permutex2var_epi32(s[0], even, s[1]),
                                                     _mm512_permutex2var_epi32(s[0], odd, s[1])));
    }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 4, ROWS = at_most(2), PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + lane));
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi64x(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi32(s, _mm256_madd_epi16(w, x)); }
    INLINE vi total(const Sum* s, int v) {
        return reinterpret_cast<vi>(_mm256_permute4x64_epi64(_mm256_hadd_epi32(s[2 * v], s[2 * v + 1]), 0xd8));
    }
#endif
    INLINE Sum begin(int32_t) { return Sum{}; }
};
// 4 bits by 8 bits do fit: a whole block is summed in 16 bits (8 * 2 * 15 * 127 < 2^15).
struct Dot4 {
    typedef int32_t Group;
    static constexpr int GROUPS = 8;
    static constexpr bool KEPT = false;
#if defined(__AVX512F__)
    typedef __m512i Sum;
    static constexpr int LANES = 1, ROWS = at_most(12), PANELS = 2;
    INLINE __m512i weights(const int8_t* p, int) { return _mm512_loadu_si512(p); }
    INLINE __m512i numbers(Group g) { return _mm512_set1_epi32(g); }
    INLINE Sum add(Sum s, __m512i w, __m512i x) { return _mm512_add_epi16(s, _mm512_maddubs_epi16(w, x)); }
    INLINE vi total(const Sum* s, int) { return reinterpret_cast<vi>(_mm512_madd_epi16(s[0], _mm512_set1_epi16(1))); }
#else
    typedef __m256i Sum;
    static constexpr int LANES = 2, ROWS = at_most(6), PANELS = 1;
    INLINE __m256i weights(const int8_t* p, int lane) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + lane);
    }
    INLINE __m256i numbers(Group g) { return _mm256_set1_epi32(g); }
    INLINE Sum add(Sum s, __m256i w, __m256i x) { return _mm256_add_epi16(s, _mm256_maddubs_epi16(w, x)); }
    INLINE vi total(const Sum* s, int v) { return reinterpret_cast<vi>(_mm256_madd_epi16(s[v], _mm256_set1_epi16(1))); }
#endif
    INLINE Sum begin(int32_t) { return Sum{}; }
};
#else
struct Dot8 {
    typedef int32_t Group;
    typedef vi Sum;
    static constexpr int LANES = 4, ROWS = at_most(6), PANELS = 1, GROUPS = 16;
    static constexpr bool KEPT = false;
    INLINE Sum begin(int32_t) { return Sum{}; }
    INLINE vi weights(const int8_t* p, int lane) { return bits(load(reinterpret_cast<const float*>(p) + lane * W)); }
    INLINE vi numbers(Group g) { return vi{} + g; }
    INLINE Sum add(Sum s, vi w, vi x) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(s, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
#else
        each<4>(EACH(j) { s += ((w << (24 - 8 * j)) >> 24) * ((x << (24 - 8 * j)) >> 24); });
        return s;
#endif
    }
    INLINE vi total(const Sum* s, int v) { return s[v]; }
};
struct Dot4 : Dot8 {
    static constexpr int GROUPS = 8;
};
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

// What a tile of rows is multiplied by, for one or two panels. scales: Q4 [blocks][16], INT8 [16].
struct Panels {
    const int8_t *first, *second;
    const float *first_scales, *second_scales;
};

// multiply_blocks where registers hold all sums. A block is unrolled: with as many rows as fit, each product waits for
// none of the others.
template <class D, int ROWS>
static void multiply_kept(const typename D::Group* tile, int64_t groups, const Panels& w, const float* x_scales,
                          const float* x_sums, float* sums) {
    constexpr int N = D::PANELS;
    constexpr bool Q4 = D::GROUPS == 8;
    vf total[ROWS][N];
    each<ROWS>(EACH(r) { each<N>(EACH(p) { total[r][p] = Q4 ? load(sums + r * 2 * PANEL + p * PANEL) : vf{}; }); });
    for (int64_t from = 0, b = 0; from < groups; from += D::GROUPS, ++b) {
        typename D::Sum acc[ROWS][N];
        each<ROWS>(EACH(r) {
            const auto start = D::begin(int32_t(x_sums[b * ROWS + r]));
            each<N>(EACH(p) { acc[r][p] = start; });
        });
        const int64_t past = from + D::GROUPS < groups ? from + D::GROUPS : groups;
        for (int64_t g = from; g < past; ++g)
            add_group<D, ROWS>(tile + g * ROWS, w.first + g * 4 * PANEL, w.second + g * 4 * PANEL, acc);
        vf scale[N];
        if (Q4) each<N>(EACH(p) { scale[p] = load((p == 0 ? w.first_scales : w.second_scales) + b * PANEL); });
        each<ROWS>(EACH(r) {
            const vf x_scale = splat(x_scales[b * ROWS + r]);
            each<N>(EACH(p) {
                const vf value = __builtin_convertvector(D::total(&acc[r][p], 0), vf);
                total[r][p] += Q4 ? value * scale[p] * x_scale : value * x_scale;
            });
        });
    }
    if (!Q4) {
        vf scale[N];
        each<N>(EACH(p) { scale[p] = load(p == 0 ? w.first_scales : w.second_scales); });
        each<ROWS>(EACH(r) { each<N>(EACH(p) { total[r][p] *= scale[p]; }); });
    }
    each<ROWS>(EACH(r) { each<N>(EACH(p) { store(sums + r * 2 * PANEL + p * PANEL, total[r][p]); }); });
}

// sums [ROWS][32] of groups of x [groups][ROWS] times panels [groups][16][4], block by block: each scaled by x_scales
// [blocks][ROWS] and by the panels' scales. Q4: added to the sums. x_sums [blocks][ROWS]: of the integers, for `begin`.
template <class D, int ROWS>
static void multiply_blocks(const typename D::Group* tile, int64_t groups, const Panels& w, const float* x_scales,
                            const float* x_sums, float* sums) {
    constexpr int N = D::PANELS * D::LANES;
    if (D::GROUPS != 8) for (int r = 0; r < ROWS; ++r) std::memset(sums + r * 2 * PANEL, 0, D::PANELS * PANEL * 4);
    for (int64_t from = 0, b = 0; from < groups; from += D::GROUPS, ++b) {
        typename D::Sum acc[ROWS][N];
        each<ROWS>(EACH(r) {
            const auto start = D::begin(int32_t(x_sums[b * ROWS + r]));
            each<N>(EACH(v) { acc[r][v] = start; });
        });
        const int64_t past = from + D::GROUPS < groups ? from + D::GROUPS : groups;
        for (int64_t g = from; g < past; ++g)
            add_group<D, ROWS>(tile + g * ROWS, w.first + g * 4 * PANEL, w.second + g * 4 * PANEL, acc);
        // through memory: else the compiler has too few registers for what follows and takes them from the loop above
        alignas(64) int32_t found[ROWS][D::PANELS * PANEL];
        each<ROWS>(EACH(r) {
            each<D::PANELS>(EACH(p) {
                typename D::Sum part[D::LANES];
                each<D::LANES>(EACH(i) { part[i] = acc[r][p * D::LANES + i]; });
                each<PANEL_VECTORS>(EACH(v) {
                    const vi total = D::total(part, v);
                    std::memcpy(found[r] + p * PANEL + v * W, &total, sizeof(total));
                });
            });
        });
        __asm__ volatile("" ::: "memory");
        for (int v = 0; v < D::PANELS * PANEL; v += W) {
            const float* scales = v < PANEL ? w.first_scales + v : w.second_scales + v - PANEL;
            const vf scale = D::GROUPS == 8 ? load(scales + b * PANEL) : vf{};
            for (int r = 0; r < ROWS; ++r) {
                vf value = __builtin_convertvector(bits(load(reinterpret_cast<const float*>(found[r] + v))), vf);
                if (D::GROUPS == 8) value *= scale;
                float* sum = sums + r * 2 * PANEL + v;
                store(sum, load(sum) + value * splat(x_scales[b * ROWS + r]));
            }
        }
    }
    if (D::GROUPS == 8) return;
    for (int v = 0; v < D::PANELS * PANEL; v += W) {
        const vf scale = load(v < PANEL ? w.first_scales + v : w.second_scales + v - PANEL);
        for (int r = 0; r < ROWS; ++r) store(sums + r * 2 * PANEL + v, load(sums + r * 2 * PANEL + v) * scale);
    }
}

template <class D, int ROWS>
static void multiply_tile(const typename D::Group* tile, int64_t groups, const Panels& w, const float* x_scales,
                          const float* x_sums, float* sums) {
    if constexpr (D::KEPT) multiply_kept<D, ROWS>(tile, groups, w, x_scales, x_sums, sums);
    else multiply_blocks<D, ROWS>(tile, groups, w, x_scales, x_sums, sums);
}

// Where a tile's integers, scales and block sums lie.
template <class D>
struct IntegerTile {
    typename D::Group* groups;  // [k / 4][height]
    float* scales;              // [blocks][height]
    float* totals;              // [blocks][height]: the sum of the integers; Q4: times the scale
};

// Q4 without unpacking it first, for a single tile: sums [ROWS][32] of x [k / 4][ROWS] times two panels as they are kept.
template <class D, int ROWS>
static void multiply_packed(const NexWeight& w, const int64_t* panel, const IntegerTile<D>& x, float* sums) {
    constexpr int N = 2;
    const int64_t blocks = w.k / 32;
    const int8_t* data[N];
    const half *scales[N], *minima[N];
    each<N>(EACH(p) {
        data[p] = static_cast<const int8_t*>(w.data) + panel[p] * panel_bytes(w);
        scales[p] = static_cast<const half*>(w.scale) + panel[p] * blocks * PANEL;
        minima[p] = static_cast<const half*>(w.minimum) + panel[p] * blocks * PANEL;
    });
    vf total[ROWS][N] = {};
    for (int64_t b = 0; b < blocks; ++b) {
        typename D::Sum acc[ROWS][N] = {};
        each<4>(EACH(i) {
            decltype(D::numbers(0)) low[N], high[N];
            each<N>(EACH(p) {
                const auto both = D::weights(data[p] + (4 * b + i) * 4 * PANEL, 0);
                low[p] = D::low(both), high[p] = D::high(both);
            });
            each<ROWS>(EACH(r) {
                const typename D::Group* at = x.groups + (8 * b + 2 * i) * ROWS + r;
                const auto first = D::numbers(at[0]), second = D::numbers(at[ROWS]);
                each<N>(EACH(p) { acc[r][p] = D::add(D::add(acc[r][p], low[p], first), high[p], second); });
            });
        });
        each<N>(EACH(p) {
            const vf scale = load(scales[p] + b * PANEL), minimum = load(minima[p] + b * PANEL);
            each<ROWS>(EACH(r) {
                const vf value = __builtin_convertvector(D::total(&acc[r][p], 0), vf);
                total[r][p] += value * scale * splat(x.scales[b * ROWS + r]) + minimum * splat(x.totals[b * ROWS + r]);
            });
        });
    }
    each<ROWS>(EACH(r) { each<N>(EACH(p) { store(sums + r * 2 * PANEL + p * PANEL, total[r][p]); }); });
}

#define NEX_CASES(FUNCTION) \
    NEX_CASE(FUNCTION, 1) NEX_CASE(FUNCTION, 2) NEX_CASE(FUNCTION, 3) NEX_CASE(FUNCTION, 4) NEX_CASE(FUNCTION, 5) \
    NEX_CASE(FUNCTION, 6) NEX_CASE(FUNCTION, 7) NEX_CASE(FUNCTION, 8) NEX_CASE(FUNCTION, 9) NEX_CASE(FUNCTION, 10) \
    NEX_CASE(FUNCTION, 11) NEX_CASE(FUNCTION, 12)
#define NEX_CASE(FUNCTION, R) \
    case R: return FUNCTION<D, (R <= D::ROWS ? R : 1)>;

template <class D>
static auto multiply_tile_for(int rows)
    -> void (*)(const typename D::Group*, int64_t, const Panels&, const float*, const float*, float*) {
    switch (rows) { NEX_CASES(multiply_tile) }
    return nullptr;
}

template <class D>
static auto multiply_packed_for(int rows) -> void (*)(const NexWeight&, const int64_t*, const IntegerTile<D>&, float*) {
    switch (rows) { NEX_CASES(multiply_packed) }
    return nullptr;
}
#undef NEX_CASE
#undef NEX_CASES

// ---- x in integers ---------------------------------------------------------------------------------------------------

// Groups of W numbers, `stride` groups apart; the first `count` groups only.
INLINE void put_groups(int32_t* to, int64_t stride, vi q, int count) {
    int32_t packed[W / 4];
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(q));
    std::memcpy(packed, &bytes, sizeof(packed));
#else
    int32_t numbers[W];
    std::memcpy(numbers, &q, sizeof(q));
    for (int i = 0; i < W / 4; ++i) {
        const int32_t* four = numbers + 4 * i;
        packed[i] = int32_t(uint32_t(four[0] & 255) | uint32_t(four[1] & 255) << 8 | uint32_t(four[2] & 255) << 16 |
                            uint32_t(four[3] & 255) << 24);
    }
#endif
    if (count >= W / 4) each<W / 4>(EACH(i) { to[i * stride] = packed[i]; });
    else
        for (int i = 0; i < count; ++i) to[i * stride] = packed[i];
}
INLINE void put_groups(int64_t* to, int64_t stride, vi q, int count) {
    int32_t numbers[W];
    std::memcpy(numbers, &q, sizeof(q));
    for (int i = 0; i < W / 4 && i < count; ++i) {
        const int32_t* four = numbers + 4 * i;
        const int16_t narrow[4] = {int16_t(four[0]), int16_t(four[1]), int16_t(four[2]), int16_t(four[3])};
        std::memcpy(to + i * stride, narrow, 8);
    }
}

// Rows of x, normalised, as integers of `block` numbers a scale. A block with a NaN or an infinity gets a NaN for a scale.
template <class D>
static void quantise_tile(const NexLinear& op, int64_t row, int height, const IntegerTile<D>& to) {
    constexpr int BLOCK = 4 * D::GROUPS, N = BLOCK / W;
    const int64_t k = op.weight->k;
    for (int r = 0; r < height; ++r) {
        const float* x = op.x + (row + r) * op.x_stride;
        const vf factor = splat(op.norm == nullptr ? 1.0f : inverse_rms(x, k, op.eps));
        for (int64_t b = 0, at = 0; at < k; ++b, at += BLOCK) {
            const float *from = x + at, *norm = op.norm == nullptr ? nullptr : op.norm + at;
            float last[BLOCK], last_norm[BLOCK];  // filled up with zeros
            if (at + BLOCK > k) {
                for (int64_t i = 0; i < BLOCK; ++i) {
                    last[i] = at + i < k ? from[i] : 0.0f;
                    last_norm[i] = norm != nullptr && at + i < k ? norm[i] : 0.0f;
                }
                from = last;
                if (norm != nullptr) norm = last_norm;
            }
            vf v[N];
            each<N>(EACH(i) { v[i] = load(from + i * W); });
            if (norm != nullptr) each<N>(EACH(i) { v[i] = v[i] * factor * load(norm + i * W); });
            vf peak{}, strange{};
            each<N>(EACH(i) {
                peak = larger(select(v[i] < vf{}, -v[i], v[i]), peak);
                strange += v[i] * 0.0f;
            });
            const float size = largest(peak);
            const bool odd = any_nan(strange);
            const float scale = odd ? __builtin_nanf("") : size / 127.0f, inverse = size > 0.0f && !odd ? 127.0f / size : 0.0f;
            const vf round = splat(12582912.0f);  // see exponential
            const int64_t groups = (k + 3) / 4 - at / 4;
            vi total{};
            each<N>(EACH(i) {
                const vi q = odd ? vi{} : bits(v[i] * inverse + round) - bits(round);
                total += q;
                put_groups(to.groups + (at / 4 + i * W / 4) * height + r, height, q, int(groups - i * W / 4));
            });
            to.scales[b * height + r] = scale;
            to.totals[b * height + r] = sum(__builtin_convertvector(total, vf)) * (D::GROUPS == 8 ? scale : 1.0f);
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
    float *sums, *scales, *minima;
    int8_t* numbers;
};

// sums of a tile += its integers times a pair of panels; one panel at a time where the registers hold no more.
template <class D>
static void multiply_panels(int height, const typename D::Group* tile, int64_t groups, Panels w, const float* x_scales,
                            const float* x_sums, float* sums) {
    auto kernel = multiply_tile_for<D>(height);
    const Panels other{w.second, w.second, w.second_scales, w.second_scales};
    if (w.second == nullptr) w.second = w.first, w.second_scales = w.first_scales;  // into columns that do not matter
    kernel(tile, groups, w, x_scales, x_sums, sums);
    if (other.first != nullptr && D::PANELS == 1) kernel(tile, groups, other, x_scales, x_sums, sums + PANEL);
}

template <class D>
static void int8_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t first, int64_t second,
                      int64_t t0, int64_t t1, float* sums) {
    const NexWeight& w = *op.weight;
    const int64_t groups = (w.k + 3) / 4;
    const int8_t* data = static_cast<const int8_t*>(w.data);
    const float* scales = static_cast<const float*>(w.scale);
    const bool two = second >= 0;
    const Panels panels{data + first * groups * 4 * PANEL, two ? data + second * groups * 4 * PANEL : nullptr,
                        scales + first * PANEL, two ? scales + second * PANEL : nullptr};
    for (int64_t t = t0; t < t1; ++t)
        multiply_panels<D>(tiles.height(t), copied[t].groups, groups, panels, copied[t].scales, copied[t].totals,
                           sums + (tiles.begin(t) - tiles.begin(t0)) * 2 * PANEL);
}

template <class D>
static void q4_task(const NexLinear& op, const Tiles& tiles, const IntegerTile<D>* copied, int64_t first, int64_t second,
                    int64_t t0, int64_t t1, const IntegerScratch& s) {
    const NexWeight& w = *op.weight;
    constexpr int64_t BLOCKS = BLOCK_PIECE / 32 * PANEL;
    const bool two = second >= 0;
    if constexpr (D::KEPT) {
        if (t1 - t0 == 1) {
            const int64_t pair[2] = {first, two ? second : first};  // one: into columns that do not matter
            multiply_packed_for<D>(tiles.height(t0))(w, pair, copied[t0], s.sums);
            return;
        }
    }
    const Panels panels{s.numbers, two ? s.numbers + BLOCK_PIECE * PANEL : nullptr, s.scales, two ? s.scales + BLOCKS : nullptr};
    for (int64_t k = 0; k < w.k; k += BLOCK_PIECE) {
        const int64_t count = w.k - k < BLOCK_PIECE ? w.k - k : BLOCK_PIECE, block = k / 32, blocks = count / 32;
        for (int p = 0; p < (two ? 2 : 1); ++p) {
            const int64_t panel = p == 0 ? first : second, at = (panel * (w.k / 32) + block) * PANEL;
            unpack_integers(w, panel, k, count, s.numbers + p * BLOCK_PIECE * PANEL);
            unpack_halves(w.scale, at, blocks * PANEL, s.scales + p * BLOCKS);
            unpack_halves(w.minimum, at, blocks * PANEL, s.minima + p * BLOCKS);
        }
        for (int64_t t = t0; t < t1; ++t) {
            const int height = tiles.height(t);
            float* out = s.sums + (tiles.begin(t) - tiles.begin(t0)) * 2 * PANEL;
            const float *scales = copied[t].scales + block * height, *totals = copied[t].totals + block * height;
            // the minima times the sums of x: an ordinary product over blocks
            multiply_pair(height, totals, blocks, s.minima, two ? s.minima + BLOCKS : nullptr, out, k > 0);
            multiply_panels<D>(height, copied[t].groups + k / 4 * height, count / 4, panels, scales, totals, out);
        }
    }
}

template <class D, bool Q4>
static void linear_integers(const NexLinear& op, const NexTeam& team) {
    const NexWeight& w = *op.weight;
    const Tiles tiles(op.rows, D::ROWS);
    const int64_t pairs = op.finish == NEX_GATED ? panels_of(w.n / 2) : (panels_of(w.n) + 1) / 2;
    const int64_t shares = shares_of(tiles, pairs, team.threads);
    const int64_t groups = (w.k + 3) / 4, blocks = (groups + D::GROUPS - 1) / D::GROUPS;
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
    if (shared)
        parallel_for(team, tiles.count, 1, [&](int64_t t) {
            quantise_tile<D>(op, tiles.begin(t), tiles.height(t), list[t]);
        });
    const int64_t together = together_of(pairs * shares, 2 * panel_bytes(w), op.rows, team.threads);
    parallel(team, pairs * shares, together, [&](NexClaims& claims) {
        constexpr int64_t sums = TASK_TILES * D::ROWS * 2 * PANEL, blocks_piece = 2 * BLOCK_PIECE / 32 * PANEL;
        const int64_t floats = sums + 2 * blocks_piece, numbers = 2 * BLOCK_PIECE * PANEL;
        char* memory = locals.get<char>(size_t(4 * floats + numbers) + (shared ? 0 : copy_bytes));
        float* pieces = reinterpret_cast<float*>(memory) + sums;
        const IntegerScratch s{reinterpret_cast<float*>(memory), pieces, pieces + blocks_piece,
                               reinterpret_cast<int8_t*>(memory) + 4 * floats};
        IntegerTile<D>* mine = list;
        if (!shared) {
            mine = lay_out(memory + 4 * floats + numbers);
            for (int64_t t = 0; t < tiles.count; ++t)
                quantise_tile<D>(op, tiles.begin(t), tiles.height(t), mine[t]);
        }
        for (int64_t task; (task = next(claims)) >= 0;) {
            const int64_t pair = task / shares, share = task % shares;
            const int64_t t0 = share * tiles.count / shares, t1 = (share + 1) * tiles.count / shares;
            const bool gated = op.finish == NEX_GATED;
            const int64_t first = gated ? pair : 2 * pair, next = gated ? pairs + pair : first + 1;
            const int64_t second = gated || next < panels_of(w.n) ? next : -1;
            if constexpr (Q4) q4_task<D>(op, tiles, mine, first, second, t0, t1, s);
            else int8_task<D>(op, tiles, mine, first, second, t0, t1, s.sums);
            finish(op, pair, tiles.begin(t0), tiles.begin(t1) - tiles.begin(t0), s.sums);
        }
    });
}

}  // namespace
